//! Conversations as templates see them.
//!
//! The serde form is the one of the OpenAI API and of transformers; fields
//! that no type here names are kept in [`Message::extra`], because a template
//! may read them.

mod content;
mod tool_call;

use std::borrow::Cow;
use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

pub use content::{Content, Part};
pub use tool_call::{Arguments, FunctionCall, ToolCall};

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
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    #[serde(skip_serializing_if = "Content::is_absent")]
    pub content: Content,
    /// The name of the speaker or of the tool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The model's thoughts before its answer. Templates find them under this
    /// name even where a message has them as `thinking` or `reasoning` in
    /// [`extra`](Message::extra).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// Calls the assistant makes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCall>>,
    /// Which call a tool message answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// 0 leaves the message out of the loss, 1 keeps it in; without it the role decides.
    /// Templates never see it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<f32>,
    /// The parts of a message of one text that the loss counts, where it is not the whole.
    /// Templates never see it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_detail: Option<Vec<TrainDetail>>,
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

    /// Its parts, if there are any.
    pub(crate) fn details(&self) -> Option<&[TrainDetail]> {
        let details = self.train_detail.as_deref();
        details.filter(|details| !details.is_empty())
    }

    /// The model's thoughts, under whichever of their three names.
    pub fn reasoning(&self) -> Option<&str> {
        let other = |name| self.extra.get(name).and_then(Value::as_str);
        let standard = self.reasoning_content.as_deref();
        standard.or_else(|| other("thinking").or_else(|| other("reasoning")))
    }
}

/// A part of a message's text, and whether the loss counts it. What no detail covers is not
/// trained; what several cover is, if one says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainDetail {
    /// The first character, counted from 0.
    pub begin_offset: usize,
    /// The last character: it belongs to the part.
    pub end_offset: usize,
    /// Whether the part is trained; without it, as the message would be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<bool>,
}

// By hand, because serde reads a struct with a flattened map through copies of
// every value, and messages are most of what a dataset holds.
impl<'de> Deserialize<'de> for Message {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Message, D::Error> {
        struct MessageVisitor;

        impl<'de> Visitor<'de> for MessageVisitor {
            type Value = Message;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a message")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Message, A::Error> {
                let mut message = Message::default();
                let mut has_role = false;
                while let Some(Key(name)) = fields.next_key()? {
                    match &*name {
                        "role" => {
                            message.role = fields.next_value()?;
                            has_role = true;
                        }
                        "content" => message.content = fields.next_value()?,
                        "name" => message.name = fields.next_value()?,
                        "reasoning_content" => message.reasoning_content = fields.next_value()?,
                        "tool_calls" => message.tool_calls = fields.next_value()?,
                        "tool_call_id" => message.tool_call_id = fields.next_value()?,
                        "weight" => message.weight = fields.next_value()?,
                        "train_detail" => message.train_detail = fields.next_value()?,
                        _ => drop(
                            message
                                .extra
                                .insert(name.into_owned(), fields.next_value()?),
                        ),
                    }
                }
                match has_role {
                    true => Ok(message),
                    false => Err(serde::de::Error::missing_field("role")),
                }
            }
        }

        deserializer.deserialize_map(MessageVisitor)
    }
}

/// A field's name, borrowed where it can be.
#[derive(Deserialize)]
#[serde(transparent)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

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

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
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
        Key::deserialize(deserializer).map(|Key(role)| Role::from(&*role))
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
            assert_eq!(message.reasoning(), Some("because"));
            assert_eq!(serde_json::to_string(&message).unwrap(), text);
        }
    }

    #[test]
    fn a_malformed_message_says_what_it_lacks() {
        let error = serde_json::from_str::<Message>(r#"{"role":"user","content":7}"#).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("a text, a list of parts or null")
        );
    }
}
