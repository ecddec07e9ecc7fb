//! Control tokens spelled in a conversation, kept plain text.

use std::ops::Range;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::message::{Content, Conversation, Message, Part};
use crate::template::{ChatTemplate, RenderOptions};

/// Brackets a control token that a message spells. Private-use characters,
/// which a text that holds them must not be asked to hold.
const OPEN: char = '\u{F8F0}';
const CLOSE: char = '\u{F8F1}';

/// Where in the rendered `text` the conversation's own strings spell a control
/// token.
///
/// # Errors
/// [`Error::Unsanitizable`] if that cannot be told, because the template looks
/// into the strings.
pub(crate) fn spelled_control_tokens(
    template: &ChatTemplate,
    conversation: &Conversation,
    options: &RenderOptions,
    text: &str,
    control: &[&str],
) -> Result<Vec<Range<usize>>> {
    let mut bracketed = conversation.clone();
    let mut brackets = Brackets {
        control,
        found: false,
    };
    brackets.conversation(&mut bracketed);
    if !brackets.found {
        return Ok(Vec::new());
    }
    if text.contains([OPEN, CLOSE]) {
        return Err(Error::Unsanitizable);
    }
    let marked = template.render(&bracketed, options)?;
    let mut spelled = Vec::new();
    let mut plain = String::with_capacity(text.len());
    for piece in marked.split_inclusive(CLOSE) {
        let Some((before, token)) = piece.trim_end_matches(CLOSE).split_once(OPEN) else {
            plain.push_str(piece);
            continue;
        };
        plain.push_str(before);
        spelled.push(plain.len()..plain.len() + token.len());
        plain.push_str(token);
    }
    match plain == text {
        true => Ok(spelled),
        false => Err(Error::Unsanitizable),
    }
}

struct Brackets<'a> {
    control: &'a [&'a str],
    found: bool,
}

impl Brackets<'_> {
    fn conversation(&mut self, conversation: &mut Conversation) {
        for message in &mut conversation.messages {
            self.message(message);
        }
        let values = [&mut conversation.tools, &mut conversation.documents];
        for value in values.into_iter().flatten() {
            self.value(value);
        }
    }

    fn message(&mut self, message: &mut Message) {
        match &mut message.content {
            Content::Absent | Content::Null => {}
            Content::Text(text) => self.text(text),
            Content::Parts(parts) => {
                for part in parts {
                    match part {
                        Part::Text(text) => self.text(text),
                        Part::Other(object) => object.values_mut().for_each(|v| self.value(v)),
                    }
                }
            }
        }
        let calls = message.tool_calls.iter_mut().flatten();
        let mut texts = Vec::new();
        for call in calls {
            texts.push(&mut call.function.name);
            texts.push(call.function.arguments.text_mut());
            texts.extend(&mut call.id);
        }
        texts.extend(&mut message.name);
        texts.extend(&mut message.reasoning_content);
        texts.extend(&mut message.tool_call_id);
        for text in texts {
            self.text(text);
        }
        for value in message.extra.values_mut() {
            self.value(value);
        }
    }

    fn value(&mut self, value: &mut Value) {
        match value {
            Value::String(text) => self.text(text),
            Value::Array(items) => items.iter_mut().for_each(|item| self.value(item)),
            Value::Object(object) => object.values_mut().for_each(|item| self.value(item)),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    fn text(&mut self, text: &mut String) {
        let mut bracketed = String::new();
        let mut rest = text.as_str();
        while let Some((at, token)) = self.first(rest) {
            bracketed.push_str(&rest[..at]);
            bracketed.push(OPEN);
            bracketed.push_str(token);
            bracketed.push(CLOSE);
            rest = &rest[at + token.len()..];
        }
        if !bracketed.is_empty() {
            self.found = true;
            bracketed.push_str(rest);
            *text = bracketed;
        }
    }

    /// The first control token in a text; of several there, the longest.
    fn first(&self, text: &str) -> Option<(usize, &str)> {
        let found = self.control.iter().filter_map(|&token| {
            let at = text.find(token)?;
            Some((at, token))
        });
        found.min_by_key(|&(at, token)| (at, std::cmp::Reverse(token.len())))
    }
}
