//! Arrow files, as `datasets` saves them: the stream format, or the file format, whose inside is a
//! stream too. Read in order; a resumed read decodes and drops the batches before.

use std::io::{self, Read};
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_ipc::reader::StreamReader;
use arrow_ipc::{MetadataVersion, root_as_message};
use arrow_schema::ArrowError;

use super::arrow_rows::{rows, supported};
use super::bytes;
use super::files::{BatchReader, DataFile, Io};
use super::json_lines::is_damage;
use super::row::{Batch, Cursor, Origin, Row};
use crate::{Error, Result};

/// What the file format begins with: a name, and zeros up to the first message.
const MAGIC: &[u8; 8] = b"ARROW1\0\0";
/// The widest alignment of that message.
const MAX_PADDING: usize = 512;
/// What stands before each message's length.
const CONTINUATION: [u8; 4] = [0xff; 4];
/// The longest description of a message.
const MAX_METADATA: u32 = 16 << 20;
/// The largest batch: memory holds one.
const MAX_BODY: i64 = 256 << 20;
/// Rows handed on at a time.
const BATCH_ROWS: usize = 1024;

pub(super) fn open(file: &DataFile, start: Cursor, io: &Io) -> Result<Box<dyn BatchReader>> {
    let name = file.name.clone();
    let bytes = Framed::new(bytes::open(file, 0, io)?).map_err(|err| read_error(&name, err))?;
    let reader = StreamReader::try_new(bytes, None).map_err(|err| damaged(&name, err))?;
    let fields = reader.schema();
    let columns = (0..fields.fields().len())
        .filter(|&i| supported(fields.field(i).data_type()))
        .collect();
    let first = Cursor { row: 0, ..start };
    Ok(Box::new(ArrowReader {
        name,
        reader,
        columns,
        at: first,
        from: start.row,
        rest: None,
    }))
}

fn read_error(file: &str, err: io::Error) -> Error {
    if is_damage(err.kind()) {
        Error::corrupt(file, err.to_string())
    } else {
        Error::read(file, err)
    }
}

fn damaged(file: &str, err: ArrowError) -> Error {
    match err {
        ArrowError::IoError(_, err) => read_error(file, err),
        other => Error::corrupt(file, other.to_string()),
    }
}

struct ArrowReader {
    name: Arc<str>,
    reader: StreamReader<Framed>,
    /// The columns that can become JSON.
    columns: Vec<usize>,
    /// The place before `rest`.
    at: Cursor,
    /// Rows to drop.
    from: u64,
    /// Rows of a batch that are not handed on yet.
    rest: Option<RecordBatch>,
}

impl BatchReader for ArrowReader {
    fn next_batch(&mut self) -> Result<Option<Batch>> {
        loop {
            let batch = match self.rest.take() {
                Some(batch) => batch,
                None => match self.reader.next() {
                    Some(batch) => batch.map_err(|err| damaged(&self.name, err))?,
                    None => return Ok(None),
                },
            };
            let skip = batch
                .num_rows()
                .min((self.from.saturating_sub(self.at.row)) as usize);
            let take = (batch.num_rows() - skip).min(BATCH_ROWS);
            self.at.row += skip as u64;
            let wanted = batch.slice(skip, take);
            let left = batch.num_rows() - skip - take;
            self.rest = (left > 0).then(|| batch.slice(skip + take, left));
            if take > 0 {
                return self.hand_on(&wanted).map(Some);
            }
        }
    }
}

impl ArrowReader {
    fn hand_on(&mut self, batch: &RecordBatch) -> Result<Batch> {
        let batch = batch
            .project(&self.columns)
            .map_err(|err| damaged(&self.name, err))?;
        let (file, first) = (self.name.clone(), self.at);
        self.at.row += batch.num_rows() as u64;
        Ok(Batch::deferred(move || {
            let row = |(position, value)| Row {
                origin: Origin {
                    file: Arc::clone(&file),
                    position,
                },
                next: Cursor {
                    row: position,
                    ..first
                },
                value: Ok(value),
            };
            (first.row + 1..).zip(rows(&batch)).map(row).collect()
        }))
    }
}

/// Passes a stream's bytes on, message by message, and refuses a message whose own description
/// asks for more memory than a batch may have: the reader behind would believe it.
struct Framed {
    bytes: Box<dyn Read + Send>,
    /// Bytes to hand out before anything more is read.
    ready: io::Cursor<Vec<u8>>,
    /// Bytes of the message's body that may pass unseen.
    body: u64,
    ended: bool,
}

impl Framed {
    fn new(mut bytes: Box<dyn Read + Send>) -> io::Result<Self> {
        let mut next = |length: u64| {
            let mut start = Vec::new();
            (&mut bytes)
                .take(length)
                .read_to_end(&mut start)
                .map(|_| start)
        };
        let mut start = next(MAGIC.len() as u64)?;
        if start == MAGIC {
            start = next(4)?;
            let mut padding = MAGIC.len();
            while start == [0; 4] && padding < MAX_PADDING {
                start = next(4)?;
                padding += 4;
            }
        }
        let bytes: Box<dyn Read + Send> = Box::new(io::Cursor::new(start).chain(bytes));
        Ok(Self {
            bytes,
            ready: io::Cursor::default(),
            body: 0,
            ended: false,
        })
    }

    /// Reads and checks the description of the next message.
    fn message(&mut self) -> io::Result<()> {
        let invalid = |problem: String| io::Error::new(io::ErrorKind::InvalidData, problem);
        let mut length = [0; 4];
        if self.bytes.read(&mut length[..1])? == 0 {
            self.ended = true; // A stream may end without its mark.
            return Ok(());
        }
        self.bytes.read_exact(&mut length[1..])?;
        let mut head = Vec::new();
        if length == CONTINUATION {
            head.extend_from_slice(&length);
            self.bytes.read_exact(&mut length)?;
        }
        head.extend_from_slice(&length);
        let length = u32::from_le_bytes(length);
        if length > MAX_METADATA {
            return Err(invalid(format!(
                "a message's description has {length} bytes"
            )));
        }
        self.ended = length == 0;
        let start = head.len();
        let read = (&mut self.bytes)
            .take(u64::from(length))
            .read_to_end(&mut head)?;
        if read < length as usize {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if !self.ended {
            let message =
                root_as_message(&head[start..]).map_err(|err| invalid(err.to_string()))?;
            let body = message.bodyLength();
            if !(0..=MAX_BODY).contains(&body) {
                return Err(invalid(format!(
                    "a batch of {body} bytes is over the limit of {} MB",
                    MAX_BODY >> 20
                )));
            }
            if message.version() < MetadataVersion::V4 {
                return Err(invalid("it was written by an Arrow before 0.8".to_owned()));
            }
            self.body = body as u64;
        }
        self.ready = io::Cursor::new(head);
        Ok(())
    }
}

impl Read for Framed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.ready.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            if self.body > 0 {
                let most = buffer
                    .len()
                    .min(usize::try_from(self.body).unwrap_or(usize::MAX));
                let read = self.bytes.read(&mut buffer[..most])?;
                self.body -= read as u64;
                if read == 0 {
                    self.ended = true;
                    self.body = 0;
                }
                return Ok(read);
            }
            if self.ended {
                return Ok(0);
            }
            self.message()?;
        }
    }
}
