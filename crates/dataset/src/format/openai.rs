//! OpenAI messages: `messages` of `{"role", "content", "tool_calls", …}`.

use serde_json::{Map, Value};

use super::Format;
use super::sharegpt::{conversation, first_message};
use crate::Record;

/// OpenAI's fine-tuning form, with parts, tools, reasoning and weights.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenAi;

impl Format for OpenAi {
    fn name(&self) -> &'static str {
        "openai"
    }

    fn detect(&self, row: &Map<String, Value>) -> bool {
        first_message(row).is_some_and(|first| first.contains_key("role"))
    }

    fn convert(&self, row: &mut Map<String, Value>) -> Result<Record, String> {
        conversation(row)
    }
}
