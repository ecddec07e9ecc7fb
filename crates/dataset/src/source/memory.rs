//! Rows already in memory: for tests, examples and data a program makes itself.

use std::sync::Arc;

use async_trait::async_trait;
use futures::{StreamExt as _, stream};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::row::{Batch, Cursor, Origin, Row};
use super::{BatchStream, Source};
use crate::{Error, Result};

/// Rows a batch holds.
const BATCH_ROWS: usize = 256;

/// Rows held in memory, in order.
#[derive(Debug, Clone)]
pub struct MemorySource {
    name: Arc<str>,
    rows: Arc<Vec<Map<String, Value>>>,
    sha256: String,
}

impl MemorySource {
    /// Takes `rows`, each a JSON object.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming the first row that is not an object.
    pub fn new(name: &str, rows: impl IntoIterator<Item = Value>) -> Result<Self> {
        let mut hash = Sha256::new();
        let rows = (rows.into_iter().enumerate())
            .map(|(i, row)| {
                hash.update(row.to_string().as_bytes());
                hash.update(b"\n");
                match row {
                    Value::Object(map) => Ok(map),
                    _ => Err(Error::corrupt(
                        format!("{name}:{}", i + 1),
                        "not a JSON object",
                    )),
                }
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            name: name.into(),
            rows: Arc::new(rows),
            sha256: super::files::hex(&hash.finalize()),
        })
    }
}

#[async_trait]
impl Source for MemorySource {
    fn identity(&self) -> Value {
        json!({ "memory": &*self.name, "sha256": self.sha256 })
    }

    fn label(&self) -> String {
        self.name.to_string()
    }

    fn num_rows(&self) -> Option<u64> {
        Some(self.rows.len() as u64)
    }

    async fn open(&self, from: Cursor) -> Result<BatchStream> {
        let this = self.clone();
        let starts = (from.row as usize..this.rows.len()).step_by(BATCH_ROWS);
        Ok(stream::iter(starts)
            .map(move |start| {
                let end = (start + BATCH_ROWS).min(this.rows.len());
                let rows = (start..end).map(|i| this.row(i)).collect();
                Ok(Batch::new(rows))
            })
            .boxed())
    }
}

impl MemorySource {
    fn row(&self, index: usize) -> Row {
        let position = index as u64 + 1;
        Row {
            origin: Origin {
                file: self.name.clone(),
                position,
            },
            next: Cursor {
                row: position,
                ..Cursor::default()
            },
            value: Ok(self.rows[index].clone()),
        }
    }
}
