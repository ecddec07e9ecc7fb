//! The fields of one YAML mapping whose shape has been checked, each taken once.

use std::collections::BTreeMap;
use std::time::Duration;

use super::node::{Node, Value};
use crate::error::Result;

/// The fields of a mapping.
pub(crate) struct Fields {
    block: String,
    nodes: BTreeMap<String, Node>,
}

impl Fields {
    /// `block` is the dotted path of the mapping, empty at the top. A node that is no mapping, such
    /// as the null of `resources:` with nothing below, has no fields.
    pub(crate) fn of(block: &str, node: Node) -> Self {
        let entries = match node.value {
            Value::Mapping(entries) => entries,
            _ => Vec::new(),
        };
        let name = |(key, value): (Node, Node)| (key.scalar_text().unwrap_or_default(), value);
        Fields {
            block: block.to_owned(),
            nodes: entries.into_iter().map(name).collect(),
        }
    }

    /// Takes the field out, unless it is absent or null.
    pub(crate) fn take(&mut self, name: &str) -> Option<Node> {
        self.peek(name)?;
        self.nodes.remove(name)
    }

    /// Looks at the field without taking it.
    pub(crate) fn peek(&self, name: &str) -> Option<&Node> {
        let node = self.nodes.get(name)?;
        (!matches!(node.value, Value::Null)).then_some(node)
    }

    /// A string, or a number or boolean as its text.
    pub(crate) fn text(&mut self, name: &str) -> Result<Option<String>> {
        self.take_as(name, "must be a string", Node::scalar_text)
    }

    /// A whole number of at least one.
    pub(crate) fn count(&mut self, name: &str) -> Result<Option<u32>> {
        self.take_as(
            name,
            "must be a whole number of at least 1",
            |node| match node.value {
                Value::Integer(value) => u32::try_from(value).ok().filter(|count| *count > 0),
                _ => None,
            },
        )
    }

    /// A number that is not negative.
    pub(crate) fn number(&mut self, name: &str) -> Result<Option<f64>> {
        self.take_as(name, "must be a number that is not negative", |node| {
            node.number()
                .filter(|value| value.is_finite() && *value >= 0.0)
        })
    }

    /// A time that is not negative, and not longer than there are clocks for.
    pub(crate) fn seconds(&mut self, name: &str) -> Result<Option<Duration>> {
        self.take_as(
            name,
            "must be a number of seconds that is not negative",
            |node| Duration::try_from_secs_f64(node.number()?).ok(),
        )
    }

    /// `true` or `false`.
    pub(crate) fn boolean(&mut self, name: &str) -> Result<Option<bool>> {
        self.take_as(name, "must be true or false", |node| match node.value {
            Value::Bool(value) => Some(value),
            _ => None,
        })
    }

    /// The dotted path of a field.
    pub(crate) fn path(&self, name: &str) -> String {
        match self.block.as_str() {
            "" => name.to_owned(),
            block => format!("{block}.{name}"),
        }
    }

    fn take_as<T>(
        &mut self,
        name: &str,
        problem: &str,
        read: impl FnOnce(&Node) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(node) = self.take(name) else {
            return Ok(None);
        };
        match read(&node) {
            Some(value) => Ok(Some(value)),
            None => Err(node.invalid(&self.path(name), problem)),
        }
    }
}
