//! Conversations as templates see them.
//!
//! The serde form is the one of the OpenAI API and of transformers; fields
//! that no type here names are kept in [`Message::extra`], because a template
//! may read them.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

/// Messages, with everything else a chat template may ask for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Conversation {
    /// The messages, in order.
    pub messages: Vec<Message>,
    /// Tool definitions, in the JSON the template prints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Value>,
    /// Documents for templates that ground their answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub documents: Option<Value>,
    /// Extra template variables, such as `enable_thinking`.
    #[serde(
        default,
        skip_serializing_if = "Map::is_empty",
        alias = "chat_template_kwargs"
    )]
    pub variables: Map<String, Value>,
}

impl Conversation {
    /// A conversation of these messages and nothing else.
    pub fn new(messages: impl Into<Vec<Message>>) -> Conversation {
        Conversation {
            messages: messages.into(),
            ..Conversation::default()
        }
    }
}

impl From<Vec<Message>> for Conversation {
    fn from(messages: Vec<Message>) -> Conversation {
        Conversation::new(messages)
    }
}

/// One turn of a conversation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    #[serde(default, skip_serializing_if = "Content::is_absent")]
    pub content: Content,
    /// The name of the speaker or of the tool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The model's thoughts before its answer.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        alias = "reasoning",
        alias = "thinking"
    )]
    pub reasoning_content: Option<String>,
    /// Calls the assistant makes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCall>>,
    /// Which call a tool message answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// 0 leaves an assistant message out of the loss, 1 (or nothing) keeps it in.
    /// Templates never see it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f32>,
    /// Any other field; templates see it under its own name.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A message of one text.
    pub fn new(role: impl Into<Role>, content: impl Into<Content>) -> Message {
        Message {
            role: role.into(),
            content: content.into(),
            ..Message::default()
        }
    }

    /// A system message.
    pub fn system(text: impl Into<String>) -> Message {
        Message::new(Role::System, Content::Text(text.into()))
    }

    /// A user message.
    pub fn user(text: impl Into<String>) -> Message {
        Message::new(Role::User, Content::Text(text.into()))
    }

    /// An assistant message.
    pub fn assistant(text: impl Into<String>) -> Message {
        Message::new(Role::Assistant, Content::Text(text.into()))
    }

    /// Whether the loss counts this message: an assistant's, of weight other than 0.
    pub fn is_trained(&self) -> bool {
        self.role == Role::Assistant && self.weight != Some(0.0)
    }
}

/// Who speaks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Instructions for the whole conversation.
    System,
    /// The person asking.
    #[default]
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
    /// Anything else; whether it is understood is the template's business.
    Other(String),
}

impl Role {
    /// The word templates compare with.
    pub fn as_str(&self) -> &str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
            Role::Other(role) => role,
        }
    }
}

impl From<&str> for Role {
    fn from(role: &str) -> Role {
        match role {
            "system" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "tool" => Role::Tool,
            other => Role::Other(other.to_owned()),
        }
    }
}

impl From<String> for Role {
    fn from(role: String) -> Role {
        Role::from(role.as_str())
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Role {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Role {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Role, D::Error> {
        String::deserialize(deserializer).map(Role::from)
    }
}

/// What a message says. A missing field and a null one differ, because
/// templates can tell them apart.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Content {
    /// The field is missing.
    #[default]
    Absent,
    /// The field is null, as beside tool calls.
    Null,
    /// One text.
    Text(String),
    /// Typed parts.
    Parts(Vec<Part>),
}

impl Content {
    /// Whether the field is missing.
    pub fn is_absent(&self) -> bool {
        matches!(self, Content::Absent)
    }

    /// The texts, in order.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let (one, many) = match self {
            Content::Text(text) => (Some(text.as_str()), &[][..]),
            Content::Parts(parts) => (None, parts.as_slice()),
            Content::Absent | Content::Null => (None, &[][..]),
        };
        one.into_iter().chain(many.iter().filter_map(Part::text))
    }
}

impl From<&str> for Content {
    fn from(text: &str) -> Content {
        Content::Text(text.to_owned())
    }
}

impl From<String> for Content {
    fn from(text: String) -> Content {
        Content::Text(text)
    }
}

impl From<Vec<Part>> for Content {
    fn from(parts: Vec<Part>) -> Content {
        Content::Parts(parts)
    }
}

impl Serialize for Content {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Content::Absent | Content::Null => serializer.serialize_none(),
            Content::Text(text) => serializer.serialize_str(text),
            Content::Parts(parts) => parts.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Content, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "content must be a text, a list of parts or null"
        )]
        enum Form {
            Null(()),
            Text(String),
            Parts(Vec<Part>),
        }
        Ok(match Form::deserialize(deserializer)? {
            Form::Null(()) => Content::Null,
            Form::Text(text) => Content::Text(text),
            Form::Parts(parts) => Content::Parts(parts),
        })
    }
}

/// One part of a message's content.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// `{"type": "text", "text": …}`
    Text(String),
    /// Any other object, an image for example, as the template will see it.
    Other(Map<String, Value>),
}

impl Part {
    /// The part's text, if it has one.
    pub fn text(&self) -> Option<&str> {
        match self {
            Part::Text(text) => Some(text),
            Part::Other(object) => object.get("text").and_then(Value::as_str),
        }
    }
}

impl Serialize for Part {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Part::Text(text) => {
                use serde::ser::SerializeMap as _;
                let mut object = serializer.serialize_map(Some(2))?;
                object.serialize_entry("type", "text")?;
                object.serialize_entry("text", text)?;
                object.end()
            }
            Part::Other(object) => object.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Part, D::Error> {
        let mut object = Map::deserialize(deserializer)?;
        let plain = object.len() == 2 && object.get("type").is_some_and(|kind| kind == "text");
        match object.get_mut("text") {
            Some(Value::String(text)) if plain => Ok(Part::Text(std::mem::take(text))),
            _ => Ok(Part::Other(object)),
        }
    }
}

/// One call of a tool.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ToolCall {
    /// The name by which the tool's answer refers to this call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// `function`, wherever it is given.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// What is called.
    pub function: FunctionCall,
}

impl ToolCall {
    /// A call of a function with arguments in JSON.
    pub fn new(name: impl Into<String>, arguments: impl Into<String>) -> ToolCall {
        ToolCall {
            kind: Some("function".to_owned()),
            function: FunctionCall {
                name: name.into(),
                arguments: Arguments::Json(arguments.into()),
            },
            ..ToolCall::default()
        }
    }
}

/// The function of a [`ToolCall`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FunctionCall {
    /// Its name.
    pub name: String,
    /// Its arguments.
    #[serde(default)]
    pub arguments: Arguments,
}

/// A call's arguments, kept as JSON text so that key order, number form and
/// absent keys survive every store on the way.
///
/// In JSON an object is [`Arguments::Json`] and a string, the form the OpenAI
/// API uses, is [`Arguments::Text`]; a template sees the one as a mapping and
/// the other as a string, as in transformers.
#[derive(Clone, Debug, PartialEq)]
pub enum Arguments {
    /// The text of a JSON value, which templates see parsed.
    Json(String),
    /// A string, which templates see as it is.
    Text(String),
}

impl Arguments {
    /// The text, of whichever form.
    pub fn as_str(&self) -> &str {
        match self {
            Arguments::Json(text) | Arguments::Text(text) => text,
        }
    }

    pub(crate) fn text_mut(&mut self) -> &mut String {
        match self {
            Arguments::Json(text) | Arguments::Text(text) => text,
        }
    }

    /// The same arguments as a mapping for templates, if the text is a JSON object.
    #[must_use]
    pub fn into_json(self) -> Arguments {
        match self {
            Arguments::Text(text) if serde_json::from_str::<Map<String, Value>>(&text).is_ok() => {
                Arguments::Json(text)
            }
            same => same,
        }
    }
}

impl Default for Arguments {
    fn default() -> Arguments {
        Arguments::Json("{}".to_owned())
    }
}

impl Serialize for Arguments {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Arguments::Text(text) => serializer.serialize_str(text),
            Arguments::Json(text) => serde_json::from_str::<Value>(text)
                .map_err(serde::ser::Error::custom)?
                .serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Arguments {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Arguments, D::Error> {
        Ok(match Value::deserialize(deserializer)? {
            Value::String(text) => Arguments::Text(text),
            value => Arguments::Json(value.to_string()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(text: &str) {
        let conversation: Conversation = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&conversation).unwrap(), text);
    }

    #[test]
    fn json_in_is_json_out() {
        round_trip(r#"{"messages":[{"role":"user","content":"hi"}]}"#);
        round_trip(r#"{"messages":[{"role":"assistant"}]}"#);
        round_trip(
            r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"image","url":"x"}],"custom":[1,2.5,null]}],"tools":[{"b":1,"a":2}],"variables":{"enable_thinking":false}}"#,
        );
        round_trip(
            r#"{"messages":[{"role":"assistant","content":null,"tool_calls":[{"id":"x","type":"function","function":{"name":"f","arguments":{"z":1,"a":1.0}}},{"function":{"name":"g","arguments":"{\"z\":1}"}}],"weight":0.0}]}"#,
        );
    }

    #[test]
    fn a_null_content_is_not_a_missing_one() {
        let null: Message = serde_json::from_str(r#"{"role":"tool","content":null}"#).unwrap();
        let absent: Message = serde_json::from_str(r#"{"role":"tool"}"#).unwrap();
        assert_eq!(
            (null.content, absent.content),
            (Content::Null, Content::Absent)
        );
    }

    #[test]
    fn the_reasoning_field_has_three_names() {
        for name in ["reasoning_content", "reasoning", "thinking"] {
            let text = format!(r#"{{"role":"assistant","{name}":"because"}}"#);
            let message: Message = serde_json::from_str(&text).unwrap();
            assert_eq!(message.reasoning_content.as_deref(), Some("because"));
        }
    }

    #[test]
    fn a_malformed_message_says_what_it_lacks() {
        let error = serde_json::from_str::<Message>(r#"{"role":"user","content":7}"#).unwrap_err();
        assert!(error.to_string().contains("content must be a text"));
    }
}
