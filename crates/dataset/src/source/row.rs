//! One row on its way in: its value or why it has none, where it stood, where the next begins.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::arrow_rows::ArrowRows;

/// A row may have at most this many bytes in its source; a longer one is a reject.
pub const MAX_ROW_BYTES: usize = 16 << 20;

/// A place between two rows of a source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Which file of the source, from 0.
    pub file: u32,
    /// Bytes of the decompressed file before the place; 0 in formats that count rows only.
    pub byte: u64,
    /// Lines (of line formats) or records (of others) before the place.
    pub row: u64,
}

/// Where a row stands in its source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The file, relative to the source.
    pub file: Arc<str>,
    /// The line in a line format, the number of the record in others; both from 1.
    pub position: u64,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.position)
    }
}

/// A row, or the reason why the source could not make one.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Where it stands.
    pub origin: Origin,
    /// The place right after it.
    pub next: Cursor,
    /// Its columns, or why it is rejected.
    pub value: Result<Map<String, Value>, String>,
}

/// Some consecutive rows, perhaps not yet parsed.
///
/// A source reads in one thread; parsing is the expensive part, so a source may hand out a batch
/// whose parsing waits inside until [`rows`](Self::rows) is called, on whichever thread.
pub struct Batch {
    inner: Inner,
    /// About how much memory it takes.
    bytes: usize,
}

enum Inner {
    Ready(Vec<Row>),
    Deferred(Box<dyn FnOnce() -> Vec<Row> + Send>),
    Arrow(ArrowRows),
}

impl Batch {
    /// A batch of rows at hand.
    pub fn new(rows: Vec<Row>) -> Self {
        Self::of(Inner::Ready(rows), 0)
    }

    /// A batch that is parsed when it is needed.
    pub fn deferred(parse: impl FnOnce() -> Vec<Row> + Send + 'static) -> Self {
        Self::of(Inner::Deferred(Box::new(parse)), 0)
    }

    pub(crate) fn arrow(rows: ArrowRows) -> Self {
        let bytes = rows.batch.get_array_memory_size();
        Self::of(Inner::Arrow(rows), bytes)
    }

    fn of(inner: Inner, bytes: usize) -> Self {
        Self { inner, bytes }
    }

    /// The same batch, known to take about this much memory: an import holds fewer batches at a
    /// time where they are large.
    #[must_use]
    pub fn with_bytes(self, bytes: usize) -> Self {
        Self { bytes, ..self }
    }

    /// About how much memory the batch takes, as far as its source knows.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The rows as Arrow columns, if they came so.
    pub(crate) fn as_arrow(&self) -> Option<&ArrowRows> {
        match &self.inner {
            Inner::Arrow(rows) => Some(rows),
            _ => None,
        }
    }

    /// The rows, parsed now if they were not.
    pub fn rows(self) -> Vec<Row> {
        match self.inner {
            Inner::Ready(rows) => rows,
            Inner::Deferred(parse) => parse(),
            Inner::Arrow(rows) => rows.all(),
        }
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.inner {
            Inner::Ready(rows) => f.debug_tuple("Batch").field(rows).finish(),
            Inner::Deferred(_) => f.write_str("Batch(deferred)"),
            Inner::Arrow(rows) => f.debug_tuple("Batch").field(&rows.batch).finish(),
        }
    }
}

/// Parses one JSON record into a row's value.
pub(crate) fn parse_record(bytes: &[u8]) -> Result<Map<String, Value>, String> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(format!("not a JSON object but {}", kind(&other))),
        Err(err) => Err(format!("malformed JSON: {err}")),
    }
}

pub(crate) fn too_long() -> String {
    format!("longer than {} MB", MAX_ROW_BYTES >> 20)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
