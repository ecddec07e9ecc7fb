//! Taking columns out of a row, whatever the case of their names.

use serde_json::{Map, Value};
use updraft_chat::{Conversation, Message};

/// What some rows keep beside their messages; templates get it under the same names.
const MEDIA: [&str; 3] = ["images", "videos", "audios"];

/// Every column that [`Columns::conversation`] reads.
pub(super) const SIDE_COLUMNS: [&str; 8] = [
    "system",
    "system_prompt",
    "chat_template_kwargs",
    "tools",
    "documents",
    "images",
    "videos",
    "audios",
];

/// A row's columns, taken out one by one.
pub(super) struct Columns<'a>(pub(super) &'a mut Map<String, Value>);

impl Columns<'_> {
    /// The first of these columns that is there and not null.
    pub(super) fn take(&mut self, names: &[&str]) -> Option<Value> {
        let key = find(self.0, names)?.to_owned();
        self.0.shift_remove(&key)
    }

    /// The same as text.
    pub(super) fn take_text(&mut self, names: &[&str]) -> Result<Option<String>, String> {
        match self.take(names) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(Value::Number(number)) => Ok(Some(number.to_string())),
            Some(_) => Err(format!("column {} is not text", names[0])),
        }
    }

    /// A text that must be there.
    pub(super) fn require_text(&mut self, names: &[&str]) -> Result<String, String> {
        self.take_text(names)?
            .ok_or_else(|| format!("column {} is missing or null", names.join(" or ")))
    }

    /// A conversation of these messages and the columns that templates read.
    pub(super) fn conversation(
        &mut self,
        mut messages: Vec<Message>,
    ) -> Result<Conversation, String> {
        let system = self
            .take_text(&["system", "system_prompt"])?
            .filter(|system| !system.is_empty());
        let first = (messages.first()).filter(|first| first.role == updraft_chat::Role::System);
        match (system, first) {
            (None, _) => {}
            (Some(system), None) => messages.insert(0, Message::system(system)),
            (Some(system), Some(first)) if is_text(first, &system) => {}
            (Some(_), Some(_)) => {
                return Err("column system is not what the system message says".to_owned());
            }
        }
        if messages.is_empty() {
            return Err("no messages".to_owned());
        }
        let mut variables = match self.take_json("chat_template_kwargs")? {
            None => Map::new(),
            Some(Value::Object(variables)) => variables,
            Some(_) => return Err("column chat_template_kwargs is not an object".to_owned()),
        };
        for name in MEDIA {
            if let Some(media) = self.take_json_list(name) {
                variables.insert(name.to_owned(), media);
            }
        }
        let tools = self.take_json("tools")?.map(function_tools);
        Ok(Conversation {
            messages,
            tools,
            documents: self.take_json("documents")?,
            variables,
        })
    }

    /// A column that holds a list with something in it; any other is left.
    fn take_json_list(&mut self, name: &str) -> Option<Value> {
        let is_filled = |value: &Value| value.as_array().is_some_and(|list| !list.is_empty());
        self.0.get(name).filter(|value| is_filled(value))?;
        self.take(&[name])
    }

    /// A column that holds JSON or the text of JSON; empty lists and texts count as absent.
    fn take_json(&mut self, name: &str) -> Result<Option<Value>, String> {
        let value = match self.take(&[name]) {
            Some(Value::String(text)) if text.trim().is_empty() => None,
            Some(Value::String(text)) => Some(
                serde_json::from_str(&text)
                    .map_err(|err| format!("column {name} is not JSON: {err}"))?,
            ),
            other => other,
        };
        Ok(value.filter(|value| {
            !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty())
        }))
    }
}

/// The column's name as the row spells it: exactly, or else in another case.
pub(super) fn find<'a>(row: &'a Map<String, Value>, names: &[&str]) -> Option<&'a str> {
    let filled = |(key, value): (&'a String, &'a Value)| (!value.is_null()).then_some(key.as_str());
    names.iter().find_map(|name| {
        let exact = row.get_key_value(*name).and_then(filled);
        exact.or_else(|| {
            row.iter()
                .filter(|(key, _)| key.eq_ignore_ascii_case(name))
                .find_map(filled)
        })
    })
}

/// Whether a message says this and nothing else.
fn is_text(message: &Message, text: &str) -> bool {
    let said: String = message.content.texts().collect();
    said.trim() == text.trim()
}

/// Whether one of these columns holds text.
pub(super) fn has_text(row: &Map<String, Value>, names: &[&str]) -> bool {
    find(row, names).is_some_and(|key| row[key].is_string())
}

/// Wraps bare function schemas (`{"name": …, "parameters": …}`) as templates expect them.
fn function_tools(tools: Value) -> Value {
    let wrap = |tool: Value| match &tool {
        Value::Object(schema)
            if schema.contains_key("name")
                && !schema.contains_key("function")
                && schema.get("type").is_none_or(|t| t != "function") =>
        {
            serde_json::json!({ "type": "function", "function": tool })
        }
        _ => tool,
    };
    match tools {
        Value::Array(tools) => Value::Array(tools.into_iter().map(wrap).collect()),
        other => other,
    }
}
