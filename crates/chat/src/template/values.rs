//! Conversations as minijinja values, without a detour over serde.

use std::borrow::Cow;
use std::sync::Arc;

use minijinja::Value;
use minijinja::value::{Enumerator, Object};
use serde_json::{Map, Value as Json};

use super::{LocalTime, RenderOptions};
use crate::message::{Arguments, Content, Conversation, Message, Part, Role, ToolCall};
use crate::span::{Origin, Sentinels};

pub(super) const STRFTIME_NOW: &str = "strftime_now";

/// What a template sees of a conversation's strings.
pub(crate) enum Strings<'a> {
    /// The strings themselves.
    Plain,
    /// The strings between sentinels.
    Marked(&'a mut Sentinels),
}

impl Strings<'_> {
    fn value(&mut self, origin: Origin, text: &str) -> Value {
        match self {
            Strings::Plain => Value::from(text),
            Strings::Marked(sentinels) => Value::from(sentinels.wrap(origin, text)),
        }
    }
}

/// The names a template can look up.
#[derive(Debug)]
pub(super) struct ContextObject {
    messages: Value,
    add_generation_prompt: bool,
    tools: Value,
    documents: Value,
    variables: Vec<(String, Value)>,
    special_tokens: Arc<[(String, Value)]>,
    now: Option<LocalTime>,
}

impl ContextObject {
    pub(super) fn new(
        conversation: &Conversation,
        options: &RenderOptions,
        special_tokens: Arc<[(String, Value)]>,
        mut strings: Strings<'_>,
    ) -> ContextObject {
        let messages: Vec<Value> = conversation
            .messages
            .iter()
            .enumerate()
            .map(|(index, message)| message_value(index, message, &mut strings))
            .collect();
        let variables = conversation.variables.iter();
        ContextObject {
            messages: Value::from(messages),
            add_generation_prompt: options.add_generation_prompt,
            tools: conversation.tools.as_ref().map(json_value).into(),
            documents: conversation.documents.as_ref().map(json_value).into(),
            variables: variables
                .filter(|(_, value)| !value.is_null())
                .map(|(name, value)| (name.clone(), json_value(value)))
                .collect(),
            special_tokens,
            now: options.now,
        }
    }
}

impl Object for ContextObject {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_value_by_str(key.as_str()?)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        match key {
            "messages" => Some(self.messages.clone()),
            "add_generation_prompt" => Some(Value::from(self.add_generation_prompt)),
            "tools" => Some(self.tools.clone()),
            "documents" => Some(self.documents.clone()),
            STRFTIME_NOW => self
                .now
                .map(|now| Value::from_function(move |format: Cow<'_, str>| now.strftime(&format))),
            _ => self
                .variables
                .iter()
                .chain(self.special_tokens.iter())
                .find(|(name, _)| name == key)
                .map(|(_, value)| value.clone()),
        }
    }
}

/// A mapping of few keys, in order.
#[derive(Debug)]
struct Pairs(Vec<(Cow<'static, str>, Value)>);

impl Object for Pairs {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_value_by_str(key.as_str()?)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        let found = self.0.iter().find(|(name, _)| name == key)?;
        Some(found.1.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let keys = self.0.iter().map(|(name, _)| Value::from(&**name));
        Enumerator::Values(keys.collect())
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.0.len())
    }
}

fn message_value(index: usize, message: &Message, strings: &mut Strings<'_>) -> Value {
    let content = Origin {
        message: index,
        thinks: message.role == Role::Assistant,
        required: true,
    };
    let thoughts = Origin {
        thinks: false,
        required: false,
        ..content
    };
    let mut reasoning = message
        .reasoning()
        .map(|text| strings.value(thoughts, text));
    let mut pairs: Vec<(Cow<'static, str>, Value)> = Vec::with_capacity(4);
    // As transformers does it: what is not there comes first or last.
    if !message.extra.contains_key("thinking") {
        pairs.extend(reasoning.clone().map(|value| ("thinking".into(), value)));
    }
    pairs.push(("role".into(), Value::from(message.role.as_str())));
    match &message.content {
        Content::Absent => {}
        Content::Null => pairs.push(("content".into(), Value::from(()))),
        Content::Text(text) => pairs.push(("content".into(), strings.value(content, text))),
        Content::Parts(parts) => {
            let parts = parts.iter().map(|part| part_value(content, part, strings));
            pairs.push(("content".into(), parts.collect()));
        }
    }
    if let Some(name) = &message.name {
        pairs.push(("name".into(), Value::from(name)));
    }
    if message.reasoning_content.is_some() {
        let value = reasoning.take();
        pairs.extend(value.map(|value| ("reasoning_content".into(), value)));
    }
    if let Some(calls) = &message.tool_calls {
        let written = Origin {
            thinks: false,
            ..content
        };
        let calls = calls.iter().map(|call| call_value(written, call, strings));
        pairs.push(("tool_calls".into(), calls.collect()));
    }
    if let Some(id) = &message.tool_call_id {
        pairs.push(("tool_call_id".into(), Value::from(id)));
    }
    for (name, value) in &message.extra {
        pairs.push((name.clone().into(), json_value(value)));
    }
    pairs.extend(reasoning.map(|value| ("reasoning_content".into(), value)));
    Value::from_object(Pairs(pairs))
}

fn part_value(origin: Origin, part: &Part, strings: &mut Strings<'_>) -> Value {
    match part {
        Part::Text(text) => Value::from_object(Pairs(vec![
            ("type".into(), Value::from("text")),
            ("text".into(), strings.value(origin, text)),
        ])),
        Part::Other(object) => object_value(object, |key, value| match (key, value) {
            ("text", Json::String(text)) => strings.value(origin, text),
            _ => json_value(value),
        }),
    }
}

fn call_value(origin: Origin, call: &ToolCall, strings: &mut Strings<'_>) -> Value {
    let arguments = match &call.function.arguments {
        Arguments::Text(text) => strings.value(origin, text),
        Arguments::Json(text) => match serde_json::from_str(text) {
            Ok(Json::Object(object)) => {
                object_value(&object, |_, value| marked_json(origin, value, strings))
            }
            Ok(value) => json_value(&value),
            Err(_) => strings.value(origin, text),
        },
    };
    let function = Value::from_object(Pairs(vec![
        ("name".into(), strings.value(origin, &call.function.name)),
        ("arguments".into(), arguments),
    ]));
    let mut pairs: Vec<(Cow<'static, str>, Value)> = Vec::with_capacity(3);
    if let Some(id) = &call.id {
        pairs.push(("id".into(), Value::from(id)));
    }
    if let Some(kind) = &call.kind {
        pairs.push(("type".into(), Value::from(kind)));
    }
    pairs.push(("function".into(), function));
    Value::from_object(Pairs(pairs))
}

/// A tool argument: strings are what the assistant wrote, so they are marked.
fn marked_json(origin: Origin, value: &Json, strings: &mut Strings<'_>) -> Value {
    match value {
        Json::String(text) => strings.value(origin, text),
        other => json_value(other),
    }
}

fn object_value(object: &Map<String, Json>, mut value: impl FnMut(&str, &Json) -> Value) -> Value {
    let pairs = object
        .iter()
        .map(|(key, item)| (Cow::Owned(key.clone()), value(key, item)));
    Value::from_object(Pairs(pairs.collect()))
}

/// A JSON value as a template sees it: numbers keep their kind, objects their order.
pub(super) fn json_value(value: &Json) -> Value {
    match value {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => Value::from(value),
            (None, Some(value)) => Value::from(value),
            (None, None) => number.as_f64().map_or(Value::UNDEFINED, Value::from),
        },
        Json::String(text) => Value::from(text),
        Json::Array(items) => items.iter().map(json_value).collect(),
        Json::Object(object) => object_value(object, |_, item| json_value(item)),
    }
}
