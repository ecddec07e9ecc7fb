//! ShareGPT: `conversations` of `{"from", "value"}`, or of `{"user", "assistant"}`.

use serde_json::{Map, Value};

use super::Format;
use super::columns::{Columns, find};
use super::message::{is_keyed_turn, messages};
use crate::Record;

/// The columns that hold a conversation.
pub(super) const CONVERSATION: [&str; 3] = ["conversations", "messages", "conversation"];

/// ShareGPT and its dialects.
///
/// `human`, `gpt`, `function_call`, `observation` and their like become the four roles; a
/// `function_call` becomes an assistant message with tool calls.
#[derive(Debug, Clone, Copy, Default)]
pub struct ShareGpt;

impl Format for ShareGpt {
    fn name(&self) -> &'static str {
        "sharegpt"
    }

    fn detect(&self, row: &Map<String, Value>) -> bool {
        first_message(row).is_some_and(|first| first.contains_key("from") || is_keyed_turn(first))
    }

    fn convert(&self, row: &mut Map<String, Value>) -> Result<Record, String> {
        conversation(row)
    }
}

/// The first message of a row's conversation.
pub(super) fn first_message(row: &Map<String, Value>) -> Option<&Map<String, Value>> {
    row.get(find(row, &CONVERSATION)?)?
        .as_array()?
        .first()?
        .as_object()
}

/// A row with a list of messages in any dialect.
pub(super) fn conversation(row: &mut Map<String, Value>) -> Result<Record, String> {
    let mut columns = Columns(row);
    let list = columns
        .take(&CONVERSATION)
        .ok_or("column conversations or messages is missing or null")?;
    Ok(columns.conversation(messages(list)?)?.into())
}
