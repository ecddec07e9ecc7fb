//! The calls an assistant makes of tools.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

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
