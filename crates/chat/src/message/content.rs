//! A message's content: nothing, a text, or typed parts.

use std::fmt;

use serde::de::value::SeqAccessDeserializer;
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

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
        struct ContentVisitor;

        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("content that is a text, a list of parts or null")
            }

            fn visit_unit<E>(self) -> Result<Content, E> {
                Ok(Content::Null)
            }

            fn visit_str<E>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }

            fn visit_string<E>(self, text: String) -> Result<Content, E> {
                Ok(Content::Text(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, parts: A) -> Result<Content, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(parts)).map(Content::Parts)
            }
        }

        deserializer.deserialize_any(ContentVisitor)
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
