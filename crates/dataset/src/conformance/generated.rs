//! Rows made as they are read: any number of them, without a file.

use std::sync::Arc;

use async_trait::async_trait;
use futures::{StreamExt as _, stream};
use serde_json::{Map, Value, json};

use crate::source::{Batch, BatchStream, Cursor, Origin, Row};
use crate::{Result, Source};

/// Rows a batch holds.
const BATCH_ROWS: u64 = 256;
const SYLLABLES: [&str; 16] = [
    "ba", "den", "fi", "gor", "hu", "ja", "kel", "lo", "mi", "nar", "pe", "qui", "ros", "sta",
    "tu", "ve",
];

/// `rows` conversations of two turns and about `row_bytes` bytes each, the same every time.
#[derive(Debug, Clone, Copy)]
pub struct Generated {
    /// How many.
    pub rows: u64,
    /// Bytes of a row as a line of JSON, roughly.
    pub row_bytes: usize,
}

impl Generated {
    /// Row `index`: a question and an answer of made-up words.
    pub fn row(&self, index: u64) -> Value {
        let question = words(index, self.row_bytes / 4);
        let answer = words(!index, self.row_bytes * 3 / 4 - 80.min(self.row_bytes / 2));
        json!({ "conversations": [{ "from": "human", "value": question }, { "from": "gpt", "value": answer }] })
    }
}

/// Made-up words, about `bytes` of them.
fn words(seed: u64, bytes: usize) -> String {
    let mut text = String::with_capacity(bytes + 16);
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    while text.len() < bytes {
        // Marsaglia's xorshift; a word takes a few bits, a letter's worth of them the next.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        for syllable in 0..=(state >> 60) % 4 {
            text.push_str(SYLLABLES[(state >> (8 * syllable)) as usize % SYLLABLES.len()]);
        }
        text.push(' ');
    }
    text
}

#[async_trait]
impl Source for Generated {
    fn identity(&self) -> Value {
        json!({ "generated": self.rows, "row_bytes": self.row_bytes })
    }

    fn label(&self) -> String {
        "generated".to_owned()
    }

    fn num_rows(&self) -> Option<u64> {
        Some(self.rows)
    }

    async fn open(&self, from: Cursor) -> Result<BatchStream> {
        let (this, file): (Self, Arc<str>) = (*self, "generated".into());
        let starts = (from.row..self.rows).step_by(BATCH_ROWS as usize);
        let batch = move |start: u64| {
            let (file, end) = (file.clone(), this.rows.min(start + BATCH_ROWS));
            let bytes = (end - start) as usize * this.row_bytes;
            let rows = move || {
                let row = |index| Row {
                    origin: Origin {
                        file: file.clone(),
                        position: index + 1,
                    },
                    next: Cursor {
                        row: index + 1,
                        ..Cursor::default()
                    },
                    value: Ok(object(this.row(index))),
                };
                (start..end).map(row).collect()
            };
            Ok(Batch::deferred(rows).with_bytes(bytes))
        };
        Ok(stream::iter(starts).map(batch).boxed())
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}
