//! Where a file's bytes lie, and how to read them by range.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::future::{BoxFuture, try_join_all};
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
#[cfg(feature = "hub")]
use updraft_store::hub::{HubClient, RepoFile, ResolvedRepo};
use updraft_store::{FileHash, Store};

use crate::error::BoxError;
use crate::source::footer;

/// A larger range, such as a column of a row group, comes by several requests at a time.
const PIECE_BYTES: u64 = 8 << 20;
const PIECES_AT_ONCE: usize = 4;

/// A file's bytes.
#[derive(Debug, Clone)]
pub(crate) enum Location {
    /// A file, and what it was when it was hashed.
    Local(PathBuf, Arc<FileHash>),
    Remote(Remote),
}

/// Bytes that come over a network, a range at a time.
#[derive(Debug, Clone)]
pub(crate) enum Remote {
    Object {
        store: Store,
        path: String,
        /// The version that is meant.
        etag: Option<String>,
    },
    #[cfg(feature = "hub")]
    Hub {
        client: HubClient,
        repo: Arc<ResolvedRepo>,
        file: RepoFile,
    },
}

impl Remote {
    /// The bytes in `range`, which memory holds.
    pub(crate) async fn range(&self, range: Range<u64>) -> Result<Bytes, BoxError> {
        match self {
            Self::Object { store, path, etag } if range.end - range.start <= PIECE_BYTES => {
                Ok(store.get_range_of(path, range, etag.as_deref()).await?)
            }
            Self::Object { store, path, etag } => {
                let mut bytes = BytesMut::with_capacity((range.end - range.start) as usize);
                let pieces = range.clone().step_by(PIECE_BYTES as usize).map(|start| {
                    let end = range.end.min(start + PIECE_BYTES);
                    store.get_range_of(path, start..end, etag.as_deref())
                });
                let mut pieces = stream::iter(pieces).buffered(PIECES_AT_ONCE);
                while let Some(piece) = pieces.try_next().await? {
                    bytes.extend_from_slice(&piece);
                }
                Ok(bytes.freeze())
            }
            #[cfg(feature = "hub")]
            Self::Hub { client, repo, file } => {
                let mut bytes = BytesMut::with_capacity((range.end - range.start) as usize);
                let mut body = client.read_in_pieces(repo, file, range);
                while let Some(part) = body.try_next().await? {
                    bytes.extend_from_slice(&part);
                }
                Ok(bytes.freeze())
            }
        }
    }
}

/// Opens a local file, if it is still the one that was hashed.
pub(crate) fn open_local(path: &Path, hash: &FileHash) -> io::Result<File> {
    let file = File::open(path)?;
    if hash.is_of(&file.metadata()?) {
        return Ok(file);
    }
    Err(io::Error::other(
        "it has changed since it was looked at; run again to read the new version",
    ))
}

/// A remote file as Parquet's asynchronous reader wants it.
#[derive(Debug, Clone)]
pub(crate) struct RangedFile {
    remote: Remote,
    size: u64,
}

impl RangedFile {
    pub(crate) fn new(remote: Remote, size: u64) -> Self {
        Self { remote, size }
    }
}

impl AsyncFileReader for RangedFile {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ParquetError>> {
        async move {
            self.remote
                .range(range)
                .await
                .map_err(ParquetError::External)
        }
        .boxed()
    }

    fn get_byte_ranges(
        &mut self,
        ranges: Vec<Range<u64>>,
    ) -> BoxFuture<'_, Result<Vec<Bytes>, ParquetError>> {
        async move {
            try_join_all(ranges.into_iter().map(|range| self.remote.range(range)))
                .await
                .map_err(ParquetError::External)
        }
        .boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>, ParquetError>> {
        async move {
            let size = self.size;
            let mut end = self
                .get_bytes(size.saturating_sub(FOOTER_BYTES)..size)
                .await?;
            let first = |end: &Bytes| size - end.len() as u64;
            if let Some(start) = footer::start(&end, size).map_err(ParquetError::General)? {
                if start < first(&end) {
                    end = self.get_bytes(start..size).await?;
                }
                let footer =
                    (start - first(&end)) as usize..end.len() - footer::TAIL_BYTES as usize;
                footer::check(&end[footer]).map_err(ParquetError::General)?;
            }
            let mut reader = ParquetMetaDataReader::new().with_arrow_reader_options(options);
            reader.try_parse_sized(&end, size)?;
            Ok(Arc::new(reader.finish()?))
        }
        .boxed()
    }
}

/// Bytes asked for at a file's end: enough for most footers in one request.
const FOOTER_BYTES: u64 = 64 << 10;
