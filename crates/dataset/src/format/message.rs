//! One message in any dialect: whose turn, what is said, what is called.

use serde_json::{Map, Value};
use updraft_chat::{Arguments, Content, FunctionCall, Message, Part, Role, ToolCall};

use super::train;

/// A list of messages in any dialect, or one message.
pub(super) fn messages(value: Value) -> Result<Vec<Message>, String> {
    let list = match value {
        Value::Array(list) => list,
        one @ Value::Object(_) => vec![one],
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|_| "the messages are neither a list nor JSON".to_owned())?,
        _ => return Err("the messages are not a list".to_owned()),
    };
    let mut messages = Vec::with_capacity(list.len());
    for (index, item) in list.into_iter().enumerate() {
        let Value::Object(fields) = item else {
            return Err(format!("message {index} is not an object"));
        };
        read(fields, &mut messages).map_err(|reason| format!("message {index} {reason}"))?;
    }
    if messages.is_empty() {
        Err("no messages".to_owned())
    } else {
        Ok(messages)
    }
}

/// The keys that name the speaker.
pub(super) const ROLE_KEYS: [&str; 2] = ["role", "from"];
/// The keys that hold what is said.
pub(super) const CONTENT_KEYS: [&str; 2] = ["content", "value"];
/// The keys of messages that name the speaker by the key itself.
const TURN_KEYS: [&str; 5] = ["system", "user", "human", "assistant", "gpt"];

/// Whether a message names its speakers by its keys: `{"user": …, "assistant": …}`.
pub(super) fn is_keyed_turn(fields: &Map<String, Value>) -> bool {
    !ROLE_KEYS.iter().any(|key| fields.contains_key(*key))
        && fields.keys().any(|key| TURN_KEYS.contains(&key.as_str()))
}

/// The role of a turn whose text is a function call.
const CALL: &str = "function_call";

/// The role that a dialect's word stands for; `None` for an unknown word.
fn role(word: &str) -> Option<Role> {
    Some(match word.to_ascii_lowercase().as_str() {
        "user" | "human" | "input" | "prompter" => Role::User,
        "assistant" | "gpt" | "model" | "bot" | "chatbot" | "output" | CALL => Role::Assistant,
        "system" | "developer" => Role::System,
        "tool" | "observation" | "function" | "function_response" | "ipython" => Role::Tool,
        _ => return None,
    })
}

/// The role of a turn whose text is a text and nothing else.
pub(super) fn plain_role(word: &str) -> Option<Role> {
    if word.eq_ignore_ascii_case(CALL) {
        return None;
    }
    role(word)
}

fn read(mut fields: Map<String, Value>, messages: &mut Vec<Message>) -> Result<(), String> {
    if is_keyed_turn(&fields) {
        let before = messages.len();
        for key in TURN_KEYS {
            match fields.get_mut(key).map(Value::take) {
                None | Some(Value::Null) => {}
                Some(Value::String(text)) => {
                    messages.push(Message::new(role(key).unwrap_or_default(), text));
                }
                Some(_) => return Err(format!("has under {key} what is not text")),
            }
        }
        if messages.len() == before {
            return Err("has no content".to_owned());
        }
        for message in &mut messages[before..] {
            if message.role == Role::Assistant {
                train::read(&mut fields, message)?;
            }
        }
        return Ok(());
    }
    let word = match ROLE_KEYS.iter().find_map(|key| fields.get(*key)) {
        Some(Value::String(word)) => word.clone(),
        Some(_) => return Err("has a role that is not text".to_owned()),
        None => return Err("has no role".to_owned()),
    };
    let mut message = Message {
        role: role(&word).ok_or_else(|| format!("has the unknown role {word:?}"))?,
        ..Message::default()
    };
    match CONTENT_KEYS
        .iter()
        .find_map(|key| fields.shift_remove(*key))
    {
        None | Some(Value::Null) => message.content = Content::Null,
        Some(Value::String(text)) if word.eq_ignore_ascii_case(CALL) => {
            message.content = Content::Null;
            message.tool_calls = Some(calls(&text)?);
        }
        Some(Value::String(text)) => message.content = Content::Text(text),
        Some(Value::Array(parts)) => read_parts(parts, &mut message)?,
        Some(_) => return Err("has a content that is neither text nor parts".to_owned()),
    }
    let text = |key: &str| fields.get(key).and_then(Value::as_str).map(str::to_owned);
    let reasoning = ["reasoning_content", "reasoning", "thinking"]
        .iter()
        .find_map(|key| text(key));
    message.reasoning_content = reasoning.or(message.reasoning_content);
    message.name = text("name");
    message.tool_call_id = text("tool_call_id");
    train::read(&mut fields, &mut message)?;
    if let Some(given) = tool_calls(&mut fields)? {
        message.tool_calls.get_or_insert_default().extend(given);
    }
    if message.content == Content::Null && message.tool_calls.is_none() {
        return Err("has no content".to_owned());
    }
    messages.push(message);
    Ok(())
}

/// OpenAI's `tool_calls`, or the `function_call` it had before, each as JSON or as its text.
fn tool_calls(fields: &mut Map<String, Value>) -> Result<Option<Vec<ToolCall>>, String> {
    let mut given = Vec::new();
    for key in ["tool_calls", "function_call"] {
        let calls = match fields.get_mut(key).map(Value::take) {
            None | Some(Value::Null) => continue,
            Some(Value::String(text)) if text.trim().is_empty() => continue,
            Some(Value::String(text)) => calls(&text)?,
            Some(Value::Array(list)) => list.into_iter().map(call).collect::<Result<_, _>>()?,
            Some(one @ Value::Object(_)) => vec![call(one)?],
            Some(_) => return Err(format!("has {key} that are no calls")),
        };
        if !given.is_empty() && !calls.is_empty() {
            return Err("has both tool_calls and function_call".to_owned());
        }
        given.extend(calls);
    }
    Ok((!given.is_empty()).then_some(given))
}

/// The calls in a text: an object or a list of them.
fn calls(text: &str) -> Result<Vec<ToolCall>, String> {
    match serde_json::from_str(text) {
        Ok(Value::Array(list)) => list.into_iter().map(call).collect(),
        Ok(one @ Value::Object(_)) => Ok(vec![call(one)?]),
        Ok(Value::Null) => Ok(Vec::new()),
        _ => Err("has a function call that is not JSON".to_owned()),
    }
}

/// One call, wrapped in `function` or bare.
fn call(value: Value) -> Result<ToolCall, String> {
    let Value::Object(mut fields) = value else {
        return Err("has a tool call that is not an object".to_owned());
    };
    let text = |fields: &Map<String, Value>, key: &str| {
        fields.get(key).and_then(Value::as_str).map(str::to_owned)
    };
    let (id, kind) = (text(&fields, "id"), text(&fields, "type"));
    let mut function = match fields.get_mut("function").map(Value::take) {
        Some(Value::Object(function)) => function,
        _ => fields,
    };
    let name = text(&function, "name").ok_or("has a tool call without a name")?;
    let arguments = match ["arguments", "parameters"]
        .iter()
        .find_map(|key| function.shift_remove(*key))
    {
        None | Some(Value::Null) => Arguments::default(),
        Some(Value::String(text)) => Arguments::Text(text).into_json(),
        Some(value) => Arguments::Json(value.to_string()),
    };
    Ok(ToolCall {
        id,
        kind: kind.or_else(|| Some("function".to_owned())),
        function: FunctionCall { name, arguments },
    })
}

/// Parts, in OpenAI's form or LLaMA-Factory's `{"type", "value"}`. Parts that are all text
/// become one text, because the templates of text models read nothing else.
fn read_parts(parts: Vec<Value>, message: &mut Message) -> Result<(), String> {
    let mut content = Vec::with_capacity(parts.len());
    let mut flags = train::PartFlags::default();
    let mut reasoning: Option<String> = None;
    for part in parts {
        let Value::Object(mut fields) = part else {
            return Err("has a part that is not an object".to_owned());
        };
        let flag = train::flag(&fields)?;
        let kind = fields
            .get("type")
            .and_then(Value::as_str)
            .unwrap_or("text")
            .to_owned();
        let text = ["text", "value"]
            .iter()
            .find_map(|key| fields.shift_remove(*key));
        match (kind.as_str(), text) {
            ("text" | "input_text" | "output_text", Some(Value::String(text))) => {
                flags.push(&text, flag);
                content.push(Part::Text(text));
                continue;
            }
            ("reasoning" | "thinking", Some(Value::String(text))) => {
                reasoning.get_or_insert_default().push_str(&text);
            }
            ("tool_call", Some(Value::String(text))) => message
                .tool_calls
                .get_or_insert_default()
                .extend(calls(&text)?),
            (kind, value) => content.push(other_part(kind, value, fields)),
        }
        if flag.is_some() {
            return Err(format!(
                "has a train on a part of type {kind}: only texts take one"
            ));
        }
    }
    message.reasoning_content = reasoning;
    flags.put(message);
    message.content = if content.is_empty() && message.tool_calls.is_some() {
        Content::Null
    } else if content.iter().all(|part| matches!(part, Part::Text(_))) {
        Content::Text(content.iter().filter_map(Part::text).collect())
    } else {
        Content::Parts(content)
    };
    Ok(())
}

/// An image, sound or video, its `value` under the name that templates look for.
fn other_part(kind: &str, value: Option<Value>, mut fields: Map<String, Value>) -> Part {
    fields.shift_remove("value");
    fields.shift_remove("text");
    if let Some(value) = value {
        let value = if kind == "image_url" {
            serde_json::json!({ "url": value })
        } else {
            value
        };
        fields.insert(kind.to_owned(), value);
    }
    Part::Other(fields)
}
