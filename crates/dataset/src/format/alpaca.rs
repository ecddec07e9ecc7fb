//! The Alpaca family: an instruction, perhaps an input, an answer.

use serde_json::{Map, Value};
use updraft_chat::Message;

use super::Format;
use super::columns::{Columns, has_text};
use crate::Record;

const INSTRUCTION: [&str; 1] = ["instruction"];
const INPUT: [&str; 1] = ["input"];
const OUTPUT: [&str; 2] = ["output", "response"];

/// `instruction`, `input`, and `output` or `response`, with `system` and `history` if they are
/// there; column names in any case.
#[derive(Debug, Clone)]
pub struct Alpaca {
    input_separator: String,
}

impl Alpaca {
    /// The input follows the instruction after `input_separator`.
    pub fn new(input_separator: impl Into<String>) -> Self {
        Self {
            input_separator: input_separator.into(),
        }
    }
}

impl Format for Alpaca {
    fn name(&self) -> &'static str {
        "alpaca"
    }

    fn detect(&self, row: &Map<String, Value>) -> bool {
        has_text(row, &INSTRUCTION) && has_text(row, &OUTPUT)
    }

    fn convert(&self, row: &mut Map<String, Value>) -> Result<Record, String> {
        let mut columns = Columns(row);
        let mut prompt = columns.require_text(&INSTRUCTION)?;
        if let Some(input) = columns.take_text(&INPUT)?.filter(|input| !input.is_empty()) {
            if !prompt.is_empty() {
                prompt.push_str(&self.input_separator);
            }
            prompt.push_str(&input);
        }
        let answer = columns.require_text(&OUTPUT)?;
        let mut messages = history(columns.take(&["history"]))?;
        messages.extend([Message::user(prompt), Message::assistant(answer)]);
        Ok(columns.conversation(messages)?.into())
    }
}

/// Earlier turns as a list of `[question, answer]`.
fn history(value: Option<Value>) -> Result<Vec<Message>, String> {
    let turns: Vec<[String; 2]> = match value {
        None => Vec::new(),
        Some(value) => serde_json::from_value(value)
            .map_err(|_| "column history is not a list of [question, answer]")?,
    };
    Ok(turns
        .into_iter()
        .flat_map(|[question, answer]| [Message::user(question), Message::assistant(answer)])
        .collect())
}
