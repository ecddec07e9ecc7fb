//! A YAML document as a tree that remembers where each value stands.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

use super::substitute;
use crate::error::{Error, Result};

/// A YAML value with its position.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) line: u64,
    pub(crate) column: u64,
    pub(crate) value: Value,
}

/// What a YAML value can be. Mappings keep the order of the file.
#[derive(Debug, Clone)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Integer(i64),
    Float(f64),
    String(String),
    Sequence(Vec<Node>),
    Mapping(Vec<(Node, Node)>),
}

impl Node {
    /// Parses every document of `text`; an empty document is `Null`.
    pub(crate) fn parse_documents(text: &str) -> Result<Vec<Node>> {
        let options = serde_saphyr::options! { strict_booleans: false };
        serde_saphyr::from_multiple_with_options::<Node>(text, options).map_err(|error| {
            Error::Yaml {
                message: error.without_snippet().to_string(),
            }
        })
    }

    /// A scalar as the text an environment variable would hold; `None` for null and containers.
    pub(crate) fn scalar_text(&self) -> Option<String> {
        match &self.value {
            Value::Bool(value) => Some(if *value { "True" } else { "False" }.to_owned()),
            Value::Integer(value) => Some(value.to_string()),
            Value::Float(value) => Some(format!("{value:?}")), // with its `.0`, as Python writes it
            Value::String(value) => Some(value.clone()),
            Value::Null | Value::Sequence(_) | Value::Mapping(_) => None,
        }
    }

    /// An integer or a float.
    pub(crate) fn number(&self) -> Option<f64> {
        match self.value {
            Value::Integer(value) => Some(value as f64),
            Value::Float(value) => Some(value),
            _ => None,
        }
    }

    /// The keys of a mapping.
    pub(crate) fn keys(&self) -> Vec<String> {
        match &self.value {
            Value::Mapping(entries) => entries
                .iter()
                .filter_map(|(key, _)| key.scalar_text())
                .collect(),
            _ => Vec::new(),
        }
    }

    /// The value of a key of a mapping.
    pub(crate) fn get(&self, name: &str) -> Option<&Node> {
        let Value::Mapping(entries) = &self.value else {
            return None;
        };
        let found = entries
            .iter()
            .find(|(key, _)| key.scalar_text().as_deref() == Some(name));
        found.map(|(_, value)| value)
    }

    /// A mapping of scalars as text.
    pub(crate) fn text_map(&self) -> BTreeMap<String, String> {
        let Value::Mapping(entries) = &self.value else {
            return BTreeMap::new();
        };
        entries
            .iter()
            .filter_map(|(key, value)| Some((key.scalar_text()?, value.scalar_text()?)))
            .collect()
    }

    /// The same tree with `$NAME` replaced in every string, keys included.
    pub(crate) fn substituted(&self, envs: &BTreeMap<String, String>) -> Node {
        let value = match &self.value {
            Value::String(text) => Value::String(substitute(text, envs)),
            Value::Sequence(items) => {
                Value::Sequence(items.iter().map(|item| item.substituted(envs)).collect())
            }
            Value::Mapping(entries) => Value::Mapping(
                entries
                    .iter()
                    .map(|(key, value)| (key.substituted(envs), value.substituted(envs)))
                    .collect(),
            ),
            scalar => scalar.clone(),
        };
        Node {
            line: self.line,
            column: self.column,
            value,
        }
    }

    /// The tree as JSON, which has no positions.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        match &self.value {
            Value::Null => serde_json::Value::Null,
            Value::Bool(value) => (*value).into(),
            Value::Integer(value) => (*value).into(),
            Value::Float(value) => (*value).into(),
            Value::String(value) => value.clone().into(),
            Value::Sequence(items) => items.iter().map(Node::to_json).collect(),
            Value::Mapping(entries) => entries
                .iter()
                .map(|(key, value)| (key.scalar_text().unwrap_or_default(), value.to_json()))
                .collect::<serde_json::Map<_, _>>()
                .into(),
        }
    }

    /// The error "`field` has a wrong value" at this position.
    pub(crate) fn invalid(&self, field: &str, problem: impl Into<String>) -> Error {
        Error::InvalidField {
            field: field.to_owned(),
            line: self.line,
            column: self.column,
            problem: problem.into(),
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Node {
            line: spanned.referenced.line(),
            column: spanned.referenced.column(),
            value: spanned.value,
        })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Integer(value))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        i64::try_from(value)
            .map(Value::Integer)
            .or(Ok(Value::Float(value as f64)))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element::<Node>()? {
            items.push(item);
        }
        Ok(Value::Sequence(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = access.next_key::<Node>()? {
            entries.push((key, access.next_value::<Node>()?));
        }
        Ok(Value::Mapping(entries))
    }
}
