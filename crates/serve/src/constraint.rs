//! What form an answer must have.

use std::sync::Arc;

use serde_json::Value;

use crate::error::{Error, Result};

/// The longest schema, as JSON: a longer one is more work to compile than an answer is worth.
const MAX_SCHEMA_BYTES: usize = 64 << 10;
/// The deepest.
const MAX_SCHEMA_DEPTH: usize = 64;

/// The form of an answer. An [`Engine`](crate::Engine) that cannot promise it refuses the request.
#[derive(Debug, Clone, PartialEq)]
pub enum Constraint {
    /// Any JSON object.
    JsonObject,
    /// JSON that follows a schema.
    JsonSchema(Arc<Value>),
}

impl Constraint {
    /// A schema within the limits.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if it is too long or too deep.
    pub fn json_schema(schema: Value) -> Result<Self> {
        let refuse = |message: String| Err(Error::invalid("response_format", message));
        if schema.to_string().len() > MAX_SCHEMA_BYTES {
            return refuse(format!(
                "the schema is longer than {MAX_SCHEMA_BYTES} bytes"
            ));
        }
        if depth(&schema) > MAX_SCHEMA_DEPTH {
            return refuse(format!(
                "the schema is deeper than {MAX_SCHEMA_DEPTH} levels"
            ));
        }
        Ok(Self::JsonSchema(schema.into()))
    }
}

/// The parser of the body has bounded it already.
fn depth(value: &Value) -> usize {
    let deepest = match value {
        Value::Array(items) => items.iter().map(depth).max(),
        Value::Object(fields) => fields.values().map(depth).max(),
        _ => return 0,
    };
    1 + deepest.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemas_are_bounded() {
        let deep = |levels| (0..levels).fold(Value::Null, |inner, _| serde_json::json!([inner]));
        assert!(Constraint::json_schema(deep(MAX_SCHEMA_DEPTH)).is_ok());
        assert!(Constraint::json_schema(deep(MAX_SCHEMA_DEPTH + 1)).is_err());
        let long = Value::from("x".repeat(MAX_SCHEMA_BYTES));
        assert!(Constraint::json_schema(long).is_err());
    }
}
