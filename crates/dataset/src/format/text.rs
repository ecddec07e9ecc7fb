//! Plain text: one column, no roles.

use serde_json::{Map, Value};

use super::Format;
use super::columns::{Columns, has_text};
use crate::Record;

/// A `text` column, for language modelling: every token is trained.
#[derive(Debug, Clone, Copy, Default)]
pub struct Text;

impl Format for Text {
    fn name(&self) -> &'static str {
        "text"
    }

    fn detect(&self, row: &Map<String, Value>) -> bool {
        has_text(row, &["text"])
    }

    fn convert(&self, row: &mut Map<String, Value>) -> Result<Record, String> {
        let text = Columns(row).require_text(&["text"])?;
        if text.is_empty() {
            Err("the text is empty".to_owned())
        } else {
            Ok(Record::Text(text))
        }
    }
}
