//! The fields of one YAML mapping, each taken once, none overlooked.

use std::collections::BTreeMap;

use super::node::{Node, Value};
use crate::error::{Error, Result};

/// The fields of a mapping whose names have been checked.
pub(crate) struct Fields {
    block: String,
    nodes: BTreeMap<String, Node>,
}

impl Fields {
    /// Checks the names of `node`'s fields against what is `known` and what is `unsupported`.
    ///
    /// `block` is the dotted path of the mapping itself, empty at the top. A null mapping
    /// (`resources:` with nothing below) has no fields.
    pub(crate) fn of(
        block: &str,
        node: Node,
        known: &[&str],
        unsupported: &[&str],
    ) -> Result<Self> {
        let entries = match node.value {
            Value::Null => Vec::new(),
            Value::Mapping(entries) => entries,
            _ if block.is_empty() => {
                return Err(node.invalid("task", "must be a mapping of fields"));
            }
            _ => return Err(node.invalid(block, "must be a mapping of fields")),
        };
        let mut fields = Fields {
            block: block.to_owned(),
            nodes: BTreeMap::new(),
        };
        for (key, value) in entries {
            let name = key.scalar_text().unwrap_or_default();
            let field = fields.path(&name);
            let (line, column) = (key.line, key.column);
            if unsupported.contains(&name.as_str()) {
                return Err(Error::Unsupported {
                    field,
                    line,
                    column,
                });
            }
            if !known.contains(&name.as_str()) {
                return Err(Error::UnknownField {
                    field,
                    line,
                    column,
                    hint: hint(&name, known),
                });
            }
            fields.nodes.insert(name, value);
        }
        Ok(fields)
    }

    /// Takes the field out, unless it is absent or null.
    pub(crate) fn take(&mut self, name: &str) -> Option<Node> {
        self.nodes
            .remove(name)
            .filter(|node| !matches!(node.value, Value::Null))
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
            match node.value {
                Value::Integer(value) => Some(value as f64),
                Value::Float(value) => Some(value),
                _ => None,
            }
            .filter(|value| value.is_finite() && *value >= 0.0)
        })
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

/// The nearest known name if one is near, else all of them.
fn hint(name: &str, known: &[&str]) -> String {
    let nearest = known
        .iter()
        .map(|candidate| (edit_distance(name, candidate), candidate))
        .min();
    match nearest {
        Some((distance, candidate)) if distance <= 2 => format!("did you mean `{candidate}`?"),
        _ => format!("known fields are {}", known.join(", ")),
    }
}

/// Levenshtein distance in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
