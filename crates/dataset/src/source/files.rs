//! A source of one or many files, wherever they lie: read one after the other on one thread.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use async_trait::async_trait;
use futures::{StreamExt as _, stream};
use serde_json::Value;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::row::{Batch, Cursor};
use super::{BatchStream, Source, arrow_ipc, csv, json_elements, json_lines, parquet};
use crate::location::Location;
use crate::{Error, Result};

/// Batches read ahead of the consumer.
const READ_AHEAD: usize = 2;

/// One or many data files, in a fixed order, as one sequence of rows.
#[derive(Debug, Clone)]
pub struct Files {
    pub(super) label: String,
    pub(super) identity: Value,
    pub(super) files: Arc<[DataFile]>,
}

/// One file: what it is called, where it lies, how its bytes become rows.
#[derive(Debug, Clone)]
pub(crate) struct DataFile {
    /// Relative to the source; what manifests and messages show.
    pub(crate) name: Arc<str>,
    pub(crate) location: Location,
    pub(crate) size: u64,
    pub(crate) kind: Kind,
    pub(crate) compression: Compression,
}

/// How a file's bytes become rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One JSON object a line.
    JsonLines,
    /// A JSON array of objects, or objects one after the other.
    Json,
    /// One string a line, as the column `text`.
    Text,
    /// A header line and fields between the delimiter.
    Csv {
        delimiter: u8,
    },
    Parquet,
    /// Arrow's stream or file format.
    Arrow,
}

/// Kinds of files that a dataset may mix; of two that are as common the later one is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Family {
    Text,
    Arrow,
    Csv,
    Json,
    Parquet,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Kind {
    /// Kinds of one family belong together: `datasets` reads them by one module.
    pub(super) fn family(self) -> Family {
        match self {
            Self::Parquet => Family::Parquet,
            Self::JsonLines | Self::Json => Family::Json,
            Self::Csv { .. } => Family::Csv,
            Self::Arrow => Family::Arrow,
            Self::Text => Family::Text,
        }
    }

    /// What a file of this name holds, or `None` if it is no data file.
    pub(crate) fn of(name: &str) -> Option<(Self, Compression)> {
        let name = name.to_ascii_lowercase();
        let (stem, compression) = if let Some(stem) = name.strip_suffix(".gz") {
            (stem, Compression::Gzip)
        } else if let Some(stem) = name.strip_suffix(".zst") {
            (stem, Compression::Zstd)
        } else {
            (&*name, Compression::None)
        };
        let kind = match stem.rsplit_once('.')?.1 {
            "jsonl" | "ndjson" => Self::JsonLines,
            "json" => Self::Json,
            "txt" => Self::Text,
            "csv" => Self::Csv { delimiter: b',' },
            "tsv" => Self::Csv { delimiter: b'\t' },
            "arrow" => Self::Arrow,
            "parquet" if compression == Compression::None => Self::Parquet,
            _ => return None,
        };
        Some((kind, compression))
    }
}

/// What a reading thread needs of the outside.
#[derive(Debug, Clone)]
pub(super) struct Io {
    pub(super) runtime: Handle,
    /// Closed when nobody wants the rows any more.
    wanted: mpsc::Sender<Result<Batch>>,
}

impl Io {
    /// Drives a future on this thread; `None` when the rows are no longer wanted.
    pub(super) fn block_on<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                () = self.wanted.closed() => None,
                done = future => Some(done),
            }
        })
    }
}

/// One open file.
pub(super) trait BatchReader {
    /// The next batch, or `None` at the end of the file.
    fn next_batch(&mut self) -> Result<Option<Batch>>;
}

#[async_trait]
impl Source for Files {
    fn identity(&self) -> Value {
        self.identity.clone()
    }

    fn label(&self) -> String {
        self.label.clone()
    }

    async fn open(&self, from: Cursor) -> Result<BatchStream> {
        let files = Arc::clone(&self.files);
        let (sender, receiver) = mpsc::channel(READ_AHEAD);
        let io = Io {
            runtime: Handle::current(),
            wanted: sender.clone(),
        };
        tokio::task::spawn_blocking(move || {
            if let Err(err) = read_all(&files, from, &io, &sender) {
                // Nobody listens any more: nobody needs the error either.
                sender.blocking_send(Err(err)).ok();
            }
        });
        Ok(stream::unfold(receiver, |mut receiver| async {
            receiver.recv().await.map(|batch| (batch, receiver))
        })
        .boxed())
    }
}

/// Reads every file from `from` on, until the end or until nobody wants more.
fn read_all(
    files: &[DataFile],
    from: Cursor,
    io: &Io,
    sender: &mpsc::Sender<Result<Batch>>,
) -> Result<()> {
    for (index, file) in (0..).zip(files).skip(from.file as usize) {
        let start = if index == from.file {
            from
        } else {
            Cursor {
                file: index,
                ..Cursor::default()
            }
        };
        let mut reader = guarded(file, || open(file, start, io))?;
        while let Some(batch) = guarded(file, || reader.next_batch())? {
            if sender.blocking_send(Ok(batch)).is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

fn open(file: &DataFile, start: Cursor, io: &Io) -> Result<Box<dyn BatchReader>> {
    match file.kind {
        Kind::JsonLines => json_lines::open(file, start, io, json_lines::Line::Json),
        Kind::Text => json_lines::open(file, start, io, json_lines::Line::Text),
        Kind::Json => json_elements::open(file, start, io),
        Kind::Csv { delimiter } => csv::open(file, start, io, delimiter),
        Kind::Parquet => parquet::open(file, start, io),
        Kind::Arrow => arrow_ipc::open(file, start, io),
    }
}

/// Makes a panic in a decoder an error: were the thread to end by it, the rows would seem to end.
fn guarded<T>(file: &DataFile, read: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| {
        Err(Error::corrupt(
            &*file.name,
            "its decoder gave up on it: fetch or write it again",
        ))
    })
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").expect("writing to a String cannot fail");
        hex
    })
}
