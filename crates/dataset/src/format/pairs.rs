//! Two columns that are a prompt and its answer.

use serde_json::{Map, Value};
use updraft_chat::Message;

use super::Format;
use super::columns::{Columns, find, has_text};
use super::message::messages;
use crate::Record;

const QUESTION: [&str; 1] = ["question"];
const ANSWER: [&str; 2] = ["answer", "response"];
pub(super) const PROMPT: [&str; 1] = ["prompt"];
pub(super) const COMPLETION: [&str; 3] = ["completion", "generation", "response"];

/// `question` with `answer` or `response`.
#[derive(Debug, Clone, Copy, Default)]
pub struct QuestionAnswer;

impl Format for QuestionAnswer {
    fn name(&self) -> &'static str {
        "question-answer"
    }

    fn detect(&self, row: &Map<String, Value>) -> bool {
        has_text(row, &QUESTION) && has_text(row, &ANSWER)
    }

    fn convert(&self, row: &mut Map<String, Value>) -> Result<Record, String> {
        let mut columns = Columns(row);
        let question = columns.require_text(&QUESTION)?;
        let answer = columns.require_text(&ANSWER)?;
        Ok(columns
            .conversation(vec![Message::user(question), Message::assistant(answer)])?
            .into())
    }
}

/// `prompt` with `completion`, `generation` or `response`, each a text or a list of messages.
#[derive(Debug, Clone, Copy, Default)]
pub struct PromptCompletion;

impl Format for PromptCompletion {
    fn name(&self) -> &'static str {
        "prompt-completion"
    }

    fn detect(&self, row: &Map<String, Value>) -> bool {
        find(row, &PROMPT).is_some() && find(row, &COMPLETION).is_some()
    }

    fn convert(&self, row: &mut Map<String, Value>) -> Result<Record, String> {
        let mut columns = Columns(row);
        let mut messages = turn(&mut columns, &PROMPT, Message::user)?;
        messages.extend(turn(&mut columns, &COMPLETION, Message::assistant)?);
        Ok(columns.conversation(messages)?.into())
    }
}

/// A column that is one side's text or a list of messages.
pub(super) fn turn(
    columns: &mut Columns<'_>,
    names: &[&str],
    speaker: fn(String) -> Message,
) -> Result<Vec<Message>, String> {
    match columns.take(names) {
        Some(Value::String(text)) => Ok(vec![speaker(text)]),
        Some(list) => messages(list),
        None => Err(format!("column {} is missing or null", names.join(" or "))),
    }
}
