//! What a response is asked: a text, or a list of messages.

use serde::Deserialize;
use updraft_chat::{Content, Message, Role};

use crate::error::{Error, Result};

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "input must be a string or a list of messages")]
pub(super) enum Input {
    Text(String),
    Items(Vec<Item>),
}

#[derive(Debug, Deserialize)]
pub(super) struct Item {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    role: Option<String>,
    content: Option<ItemContent>,
}

#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "content must be a string or a list of text parts"
)]
pub(super) enum ItemContent {
    Text(String),
    Parts(Vec<ItemPart>),
}

#[derive(Debug, Deserialize)]
pub(super) struct ItemPart {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    text: Option<String>,
}

impl Input {
    /// As a conversation has it.
    pub(super) fn into_messages(self) -> Result<Vec<Message>> {
        match self {
            Self::Text(text) => Ok(vec![Message::new(Role::User, text)]),
            Self::Items(items) => {
                let messages = items.into_iter().enumerate();
                messages
                    .map(|(index, item)| item.into_message(index))
                    .collect()
            }
        }
    }
}

impl Item {
    fn into_message(self, index: usize) -> Result<Message> {
        let at = |field: &str| format!("input[{index}].{field}");
        if self.kind.as_deref().is_some_and(|kind| kind != "message") {
            return Err(Error::invalid(
                at("type"),
                "only items of type `message` are supported",
            ));
        }
        let role = match self.role.as_deref() {
            Some("system" | "developer") => Role::System,
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            _ => {
                let message = "the role must be developer, system, user or assistant";
                return Err(Error::invalid(at("role"), message));
            }
        };
        let text = match self.content {
            Some(ItemContent::Text(text)) => text,
            Some(ItemContent::Parts(parts)) => {
                let text = |part: ItemPart| match part.kind.as_str() {
                    "input_text" | "output_text" | "text" => part.text,
                    _ => None,
                };
                let texts: Option<Vec<String>> = parts.into_iter().map(text).collect();
                let message = "only parts of type `input_text` and `output_text` are supported";
                texts
                    .ok_or_else(|| Error::invalid(at("content"), message))?
                    .join("\n")
            }
            None => return Err(Error::invalid(at("content"), "the message has no content")),
        };
        Ok(Message {
            content: Content::Text(text),
            ..Message::new(role, "")
        })
    }
}
