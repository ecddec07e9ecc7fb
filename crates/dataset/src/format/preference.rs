//! Preferences: a chosen and a rejected answer, or one answer with a verdict.

use serde_json::{Map, Value};
use updraft_chat::{Content, Message, Role};

use super::Format;
use super::columns::{Columns, find};
use super::message::messages;
use super::pairs::{COMPLETION, PROMPT, turn};
use super::sharegpt::CONVERSATION;
use crate::{Preference, Record};

const VERDICT: [&str; 2] = ["label", "kto_tag"];

/// `chosen` and `rejected` (text, message, list of messages or an hh-rlhf transcript) after a
/// prompt of their own or the prefix they share; or a conversation with a `label`, as KTO has it.
#[derive(Debug, Clone, Copy, Default)]
pub struct PreferencePairs;

impl Format for PreferencePairs {
    fn name(&self) -> &'static str {
        "preference"
    }

    fn detect(&self, row: &Map<String, Value>) -> bool {
        let pair = find(row, &["chosen"]).is_some() && find(row, &["rejected"]).is_some();
        let verdict = find(row, &VERDICT).is_some_and(|key| row[key].is_boolean());
        let answer = find(row, &CONVERSATION).is_some()
            || (find(row, &PROMPT).is_some() && find(row, &COMPLETION).is_some());
        pair || (verdict && answer)
    }

    fn convert(&self, row: &mut Map<String, Value>) -> Result<Record, String> {
        let mut columns = Columns(row);
        let verdict = columns.take(&VERDICT);
        let (prompt, chosen, rejected) = match verdict {
            Some(Value::Bool(good)) => {
                let (prompt, answer) = judged(&mut columns)?;
                if good {
                    (prompt, Some(answer), None)
                } else {
                    (prompt, None, Some(answer))
                }
            }
            _ => {
                let (prompt, [chosen, rejected]) = pair(&mut columns)?;
                (prompt, Some(chosen), Some(rejected))
            }
        };
        Ok(Record::Preference(Preference {
            prompt: columns.conversation(prompt)?,
            chosen,
            rejected,
        }))
    }
}

/// The prompt and the answer that a verdict is about.
fn judged(columns: &mut Columns<'_>) -> Result<(Vec<Message>, Vec<Message>), String> {
    let Some(list) = columns.take(&CONVERSATION) else {
        return Ok((
            turn(columns, &PROMPT, Message::user)?,
            turn(columns, &COMPLETION, Message::assistant)?,
        ));
    };
    let mut prompt = messages(list)?;
    let last = prompt.pop().filter(|last| last.role == Role::Assistant);
    let answer = last.ok_or("the last message is not the assistant's")?;
    Ok((prompt, vec![answer]))
}

/// The prompt and two answers.
fn pair(columns: &mut Columns<'_>) -> Result<(Vec<Message>, [Vec<Message>; 2]), String> {
    let prompt = match columns.take(&CONVERSATION) {
        Some(list) => Some(messages(list)?),
        None if find(columns.0, &PROMPT).is_some() => Some(asked(columns)?),
        None => None,
    };
    let mut chosen = answer(columns, "chosen")?;
    let mut rejected = answer(columns, "rejected")?;
    // A list that repeats the prompt, or both transcripts of hh-rlhf, share their first messages.
    let shared = match &prompt {
        Some(prompt) if chosen.starts_with(prompt) && rejected.starts_with(prompt) => prompt.len(),
        Some(_) => 0,
        None => common_prefix(&chosen, &rejected),
    };
    if shared >= chosen.len() || shared >= rejected.len() {
        return Err("an answer is empty".to_owned());
    }
    let prefix: Vec<Message> = chosen.drain(..shared).collect();
    rejected.drain(..shared);
    let prompt = prompt.unwrap_or(prefix);
    if prompt.is_empty() {
        return Err(
            "no prompt: there is no column prompt, and the answers share no first message"
                .to_owned(),
        );
    }
    if shared == 0
        && [&chosen, &rejected]
            .into_iter()
            .any(|answer| repeats(answer, &prompt))
    {
        return Err("an answer repeats the prompt, and not as the prompt has it".to_owned());
    }
    Ok((prompt, [chosen, rejected]))
}

/// The prompt of its own column: a text, messages, or a transcript that the answer goes on with.
fn asked(columns: &mut Columns<'_>) -> Result<Vec<Message>, String> {
    let mut prompt = turn(columns, &PROMPT, Message::user)?;
    if let [only] = &prompt[..]
        && let Content::Text(text) = &only.content
        && let Some(turns) = transcript(text)
    {
        prompt = turns;
        let is_open = |last: &mut Message| last.content == Content::Text(String::new());
        prompt.pop_if(|last| last.role == Role::Assistant && is_open(last));
    }
    Ok(prompt)
}

/// Whether an answer begins with another's turn, or with the text of the prompt and a line's end.
fn repeats(answer: &[Message], prompt: &[Message]) -> bool {
    let text = |message: &Message| message.content.texts().collect::<String>();
    let (Some(first), Some(last)) = (answer.first(), prompt.last()) else {
        return false;
    };
    let after = text(first);
    let after = after.strip_prefix(text(last).trim_end());
    matches!(first.role, Role::User | Role::System)
        || (last.role == Role::User && after.is_some_and(|after| after.starts_with('\n')))
}

fn answer(columns: &mut Columns<'_>, name: &str) -> Result<Vec<Message>, String> {
    match columns.take(&[name]) {
        Some(Value::String(text)) => {
            Ok(transcript(&text).unwrap_or_else(|| vec![Message::assistant(text)]))
        }
        Some(list) => messages(list).map_err(|reason| format!("{name}: {reason}")),
        None => Err(format!("column {name} is missing or null")),
    }
}

/// How many first messages are equal, leaving each side at least one.
fn common_prefix(a: &[Message], b: &[Message]) -> usize {
    let most = a.len().min(b.len()).saturating_sub(1);
    a.iter()
        .zip(b)
        .take(most)
        .take_while(|(a, b)| a == b)
        .count()
}

/// Reads `\n\nHuman: … \n\nAssistant: …`; `None` if the text is no transcript.
fn transcript(text: &str) -> Option<Vec<Message>> {
    const HUMAN: &str = "\n\nHuman:";
    const ASSISTANT: &str = "\n\nAssistant:";
    if !text.starts_with(HUMAN) {
        return None;
    }
    let mut messages: Vec<Message> = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (speaker, after): (fn(&str) -> Message, _) = match rest.strip_prefix(HUMAN) {
            Some(after) => (|text| Message::user(text), after),
            None => (
                |text| Message::assistant(text),
                rest.strip_prefix(ASSISTANT)?,
            ),
        };
        let end = [HUMAN, ASSISTANT]
            .iter()
            .filter_map(|mark| after.find(mark))
            .min()
            .unwrap_or(after.len());
        messages.push(speaker(after[..end].trim()));
        rest = &after[end..];
    }
    Some(messages)
}
