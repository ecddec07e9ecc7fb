//! The shape a YAML value must have: a table that is checked before any meaning is read.

use super::node::{Node, Value};
use crate::error::{Error, Result};

/// What a value may be.
#[derive(Debug)]
pub(crate) enum Shape {
    /// Anything but null.
    Any,
    /// A null.
    Null,
    /// A string.
    Text,
    /// `true` or `false`.
    Boolean,
    /// A whole number in this range.
    Integer(i64, i64),
    /// A number of at least this.
    Number(f64),
    /// A whole number with or without a unit of memory, such as `100GB`.
    Size,
    /// A whole number with or without a unit of time, such as `2h`.
    Minutes,
    /// One of these words, in any case.
    Choice(&'static [&'static str]),
    /// A list of at least so many.
    List(usize, &'static Shape),
    /// A mapping with at most so many keys, whatever they are called.
    MapOf(usize, &'static Shape),
    /// A mapping of these fields and no others; a null field is as good as an absent one.
    Fields(&'static [Field]),
    /// One of these.
    Either(&'static [Shape]),
}

/// A field of a mapping.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) name: &'static str,
    pub(crate) shape: Shape,
    /// Whether Updraft acts on it; the others are checked, then refused.
    pub(crate) supported: bool,
    pub(crate) required: bool,
}

/// A field that Updraft acts on.
pub(crate) const fn field(name: &'static str, shape: Shape) -> Field {
    Field {
        name,
        shape,
        supported: true,
        required: false,
    }
}

/// A field of SkyPilot's that Updraft refuses.
pub(crate) const fn refused(name: &'static str, shape: Shape) -> Field {
    Field {
        supported: false,
        ..field(name, shape)
    }
}

/// A field that must be there.
pub(crate) const fn required(name: &'static str, shape: Shape) -> Field {
    Field {
        required: true,
        ..field(name, shape)
    }
}

impl Shape {
    /// Checks `node`, and adds to `refused` every field that is set and not supported.
    pub(crate) fn check(&self, path: &str, node: &Node, refused: &mut Vec<Error>) -> Result<()> {
        match (self, &node.value) {
            (Shape::Either(shapes), _) => check_either(shapes, path, node, refused),
            (Shape::List(min, shape), Value::Sequence(items)) if items.len() >= *min => items
                .iter()
                .try_for_each(|item| shape.check(path, item, refused)),
            (Shape::MapOf(max, shape), Value::Mapping(entries)) if entries.len() <= *max => entries
                .iter()
                .try_for_each(|(key, value)| shape.check(&join(path, key), value, refused)),
            (Shape::Fields(fields), Value::Mapping(entries)) => {
                check_fields(fields, path, node, entries, refused)
            }
            (shape, value) if shape.admits(value) => Ok(()),
            _ => {
                let name = if path.is_empty() { "task" } else { path };
                Err(node.invalid(name, format!("must be {}", self.words())))
            }
        }
    }

    /// Whether a scalar is of this shape.
    fn admits(&self, value: &Value) -> bool {
        match (self, value) {
            (Shape::Any, value) => !matches!(value, Value::Null),
            (Shape::Null, Value::Null)
            | (Shape::Text, Value::String(_))
            | (Shape::Boolean, Value::Bool(_)) => true,
            (Shape::Integer(min, max), Value::Integer(value)) => (*min..=*max).contains(value),
            (Shape::Number(min), Value::Integer(value)) => *value as f64 >= *min,
            (Shape::Number(min), Value::Float(value)) => value >= min,
            (Shape::Size | Shape::Minutes, Value::Integer(_)) => true,
            (Shape::Size, Value::String(text)) => has_unit(
                text,
                &["kb", "ki", "mb", "mi", "gb", "gi", "tb", "ti", "pb", "pi"],
            ),
            (Shape::Minutes, Value::String(text)) => has_unit(text, &["m", "h", "d", "w"]),
            (Shape::Choice(words), Value::String(text)) => {
                words.iter().any(|word| word.eq_ignore_ascii_case(text))
            }
            _ => false,
        }
    }

    /// What would be right, in words.
    fn words(&self) -> String {
        match self {
            Shape::Any => "set".to_owned(),
            Shape::Null => "empty".to_owned(),
            Shape::Text => "a string".to_owned(),
            Shape::Boolean => "true or false".to_owned(),
            Shape::Integer(1, i64::MAX) => "a whole number of at least 1".to_owned(),
            Shape::Integer(0, i64::MAX) => "a whole number of at least 0".to_owned(),
            Shape::Integer(i64::MIN, i64::MAX) => "a whole number".to_owned(),
            Shape::Integer(min, max) => format!("a whole number from {min} to {max}"),
            Shape::Number(min) if min.is_infinite() => "a number".to_owned(),
            Shape::Number(_) => "a number that is not negative".to_owned(),
            Shape::Size => "a size such as 100 or 100GB".to_owned(),
            Shape::Minutes => "minutes, or a time such as 2h".to_owned(),
            Shape::Choice(words) => format!("one of {}", words.join(", ")),
            Shape::List(0, _) => "a list".to_owned(),
            Shape::List(min, _) => format!("a list of at least {min}"),
            Shape::MapOf(1, _) => "a mapping of at most one key".to_owned(),
            Shape::MapOf(..) => "a mapping".to_owned(),
            Shape::Fields(_) => "a mapping of fields".to_owned(),
            Shape::Either(shapes) => {
                let words: Vec<_> = shapes.iter().map(Shape::words).collect();
                words.join(" or ")
            }
        }
    }

    /// Whether the node is of the container that this shape wants, so that its errors are worth
    /// more than "must be one of".
    fn is_kin(&self, node: &Node) -> bool {
        matches!(
            (self, &node.value),
            (Shape::Fields(_) | Shape::MapOf(..), Value::Mapping(_))
                | (Shape::List(..), Value::Sequence(_))
        )
    }
}

fn check_either(shapes: &[Shape], path: &str, node: &Node, refused: &mut Vec<Error>) -> Result<()> {
    let mut kin = None;
    for shape in shapes {
        let mut found = Vec::new();
        match shape.check(path, node, &mut found) {
            Ok(()) => {
                refused.append(&mut found);
                return Ok(());
            }
            Err(error) if shape.is_kin(node) => kin = kin.or(Some(error)),
            Err(_) => {}
        }
    }
    Err(kin.unwrap_or_else(|| {
        let words: Vec<_> = shapes.iter().map(Shape::words).collect();
        node.invalid(path, format!("must be {}", words.join(" or ")))
    }))
}

fn check_fields(
    fields: &[Field],
    path: &str,
    node: &Node,
    entries: &[(Node, Node)],
    refused: &mut Vec<Error>,
) -> Result<()> {
    for (key, value) in entries {
        let name = key.scalar_text().unwrap_or_default();
        let (line, column) = (key.line, key.column);
        let Some(field) = fields.iter().find(|field| field.name == name) else {
            return Err(Error::UnknownField {
                field: join(path, key),
                line,
                column,
                hint: hint(&name, fields),
            });
        };
        if matches!(value.value, Value::Null) {
            continue;
        }
        field.shape.check(&join(path, key), value, refused)?;
        if !field.supported {
            refused.push(Error::Unsupported {
                field: join(path, key),
                line,
                column,
            });
        }
    }
    for field in fields.iter().filter(|field| field.required) {
        let given = |(key, value): &(Node, Node)| {
            key.scalar_text().as_deref() == Some(field.name) && !matches!(value.value, Value::Null)
        };
        if !entries.iter().any(given) {
            return Err(node.invalid(path, format!("needs the field `{}`", field.name)));
        }
    }
    Ok(())
}

fn join(path: &str, key: &Node) -> String {
    let name = key.scalar_text().unwrap_or_default();
    match path {
        "" => name,
        path => format!("{path}.{name}"),
    }
}

/// Whether `text` is digits with or without one of these units.
fn has_unit(text: &str, units: &[&str]) -> bool {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    !digits.is_empty()
        && digits.bytes().all(|byte| byte.is_ascii_digit())
        && (unit.is_empty() || units.iter().any(|known| known.eq_ignore_ascii_case(unit)))
}

/// The nearest known name if one is near, else all of them.
fn hint(name: &str, fields: &[Field]) -> String {
    let known = fields.iter().map(|field| field.name);
    let nearest = known
        .clone()
        .map(|candidate| (edit_distance(name, candidate), candidate))
        .min();
    match nearest {
        Some((distance, candidate)) if distance <= 2 => format!("did you mean `{candidate}`?"),
        _ => {
            let known: Vec<_> = known.filter(|name| !name.starts_with('_')).collect();
            format!("known fields are {}", known.join(", "))
        }
    }
}

/// Levenshtein distance in characters.
pub(crate) fn edit_distance(a: &str, b: &str) -> usize {
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
