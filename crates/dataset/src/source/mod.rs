//! Where rows come from: the [`Source`] trait and the sources built in.

mod arrow_ipc;
mod arrow_rows;
mod bytes;
mod card;
mod choose;
mod csv;
mod files;
pub(crate) mod footer;
#[cfg(feature = "hub")]
mod hub;
mod json_elements;
mod json_lines;
mod memory;
mod name;
mod parquet;
mod resolve;
mod row;
mod split;

use std::fmt::Debug;

use async_trait::async_trait;
use futures::stream::BoxStream;

use crate::Result;

pub use files::Files;
pub(crate) use files::hex;
pub use memory::MemorySource;
pub use name::default_name;
pub(crate) use parquet::not_readable;
pub use resolve::{SourceOptions, resolve_source, resolve_source_with};
pub(crate) use row::too_long;
pub use row::{Batch, Cursor, MAX_ROW_BYTES, Origin, Row};

/// Rows in their one order, in batches.
pub type BatchStream = BoxStream<'static, Result<Batch>>;

/// A finite sequence of rows that can be read again, from any row on.
///
/// # Contract
/// - The rows and their order depend on [`identity`](Self::identity) alone: two sources with
///   equal identities yield equal rows, however often they are opened.
/// - Opening at the `next` cursor of row *n* yields exactly the rows after *n*.
/// - Memory stays bounded: a row longer than [`MAX_ROW_BYTES`] and a row that cannot be parsed
///   come as rejects (`Err(reason)` in [`Row::value`]), and the rows after them still come.
/// - An `Err` in the stream ends it.
/// - Dropping the stream stops the reading behind it.
#[async_trait]
pub trait Source: Debug + Send + Sync {
    /// What decides the rows: names and content hashes, never absolute paths or times. Enters
    /// the key of the import stage.
    fn identity(&self) -> serde_json::Value;

    /// A name for people: the path, URL or repository.
    fn label(&self) -> String;

    /// The number of rows, where the source knows it without reading them.
    fn num_rows(&self) -> Option<u64> {
        None
    }

    /// Streams the rows from `from` on; `Cursor::default()` is the first row.
    async fn open(&self, from: Cursor) -> Result<BatchStream>;
}
