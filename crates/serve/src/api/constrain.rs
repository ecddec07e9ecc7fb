//! The fields that say what form an answer must have, of OpenAI's, vLLM's and llama.cpp's.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

use crate::constraint::Constraint;
use crate::error::{Error, Result};

#[derive(Debug, Default, Deserialize)]
pub(crate) struct FormatFields {
    #[serde(default)]
    response_format: Option<ResponseFormat>,
    /// vLLM's.
    #[serde(default)]
    structured_outputs: Option<StructuredOutputs>,
    /// llama.cpp's.
    #[serde(default)]
    json_schema: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct ResponseFormat {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    json_schema: Option<NamedSchema>,
    /// llama.cpp takes one for a `json_object` too.
    #[serde(default)]
    schema: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct NamedSchema {
    #[serde(default)]
    schema: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct StructuredOutputs {
    /// A schema, or one written as a string.
    #[serde(default)]
    json: Option<Value>,
    #[serde(default)]
    json_object: Option<bool>,
    #[serde(default)]
    regex: Option<IgnoredAny>,
    #[serde(default)]
    choice: Option<IgnoredAny>,
    #[serde(default)]
    grammar: Option<IgnoredAny>,
    #[serde(default)]
    structural_tag: Option<IgnoredAny>,
}

impl FormatFields {
    /// The form asked for, if any.
    pub(crate) fn constraint(&self) -> Result<Option<Constraint>> {
        let format = match &self.response_format {
            Some(format) => format.constraint()?,
            None => None,
        };
        let structured = match &self.structured_outputs {
            Some(structured) => structured.constraint()?,
            None => None,
        };
        let schema = match &self.json_schema {
            None | Some(Value::Null) => None,
            Some(schema) => Some(of_schema("json_schema", schema)?),
        };
        let mut asked = [format, structured, schema].into_iter().flatten();
        let first = asked.next();
        match asked.next() {
            Some(_) => Err(Error::invalid(
                "structured_outputs",
                "the answer's form is given twice; leave one out",
            )),
            None => Ok(first),
        }
    }
}

impl ResponseFormat {
    fn constraint(&self) -> Result<Option<Constraint>> {
        let param = "response_format";
        match (self.kind.as_str(), &self.json_schema, &self.schema) {
            ("text", ..) => Ok(None),
            ("json_object", _, None | Some(Value::Null)) => Ok(Some(Constraint::JsonObject)),
            ("json_object" | "json_schema", _, Some(schema))
            | (
                "json_schema",
                Some(NamedSchema {
                    schema: Some(schema),
                }),
                None,
            ) => of_schema(param, schema).map(Some),
            ("json_schema", ..) => Err(Error::invalid(
                "response_format.json_schema",
                "the schema is missing",
            )),
            _ => Err(Error::invalid(
                "response_format.type",
                "the type must be text, json_object or json_schema",
            )),
        }
    }
}

impl StructuredOutputs {
    fn constraint(&self) -> Result<Option<Constraint>> {
        for (field, is_asked) in [
            ("regex", self.regex.is_some()),
            ("choice", self.choice.is_some()),
            ("grammar", self.grammar.is_some()),
            ("structural_tag", self.structural_tag.is_some()),
        ] {
            if is_asked {
                let message = format!("`{field}` is not supported by this server; use `json`");
                return Err(Error::invalid(
                    format!("structured_outputs.{field}"),
                    message,
                ));
            }
        }
        let param = "structured_outputs.json";
        match (&self.json, self.json_object) {
            (Some(Value::String(text)), _) => {
                let schema = serde_json::from_str(text);
                let schema = schema.map_err(|error| Error::invalid(param, error.to_string()))?;
                of_schema(param, &schema).map(Some)
            }
            (Some(schema), _) => of_schema(param, schema).map(Some),
            (None, Some(true)) => Ok(Some(Constraint::JsonObject)),
            (None, _) => Ok(None),
        }
    }
}

/// What `text.format` of a response asks: OpenAI's `response_format` with one level less.
pub(crate) fn of_text_format(param: &str, format: &Value) -> Result<Option<Constraint>> {
    match (format["type"].as_str(), &format["schema"]) {
        (Some("text"), _) => Ok(None),
        (Some("json_object"), _) => Ok(Some(Constraint::JsonObject)),
        (Some("json_schema"), schema) => of_schema(param, schema).map(Some),
        _ => {
            let message = "the type must be text, json_object or json_schema";
            Err(Error::invalid(format!("{param}.type"), message))
        }
    }
}

fn of_schema(param: &str, schema: &Value) -> Result<Constraint> {
    if !(schema.is_object() || schema.is_boolean()) {
        return Err(Error::invalid(param, "a schema is an object"));
    }
    Constraint::json_schema(schema.clone())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn constraint(fields: Value) -> Result<Option<Constraint>> {
        serde_json::from_value::<FormatFields>(fields)
            .expect("fields")
            .constraint()
    }

    #[test]
    fn a_schema_comes_in_every_dialect() {
        let schema = json!({"type": "integer"});
        let expected = Some(Constraint::JsonSchema(schema.clone().into()));
        for fields in [
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}),
            json!({"response_format": {"type": "json_object", "schema": schema}}),
            json!({"structured_outputs": {"json": schema}}),
            json!({"structured_outputs": {"json": schema.to_string()}}),
            json!({"json_schema": schema}),
        ] {
            assert_eq!(
                constraint(fields.clone()).expect("sound"),
                expected,
                "{fields}"
            );
        }
        for fields in [
            json!({"response_format": {"type": "json_object"}}),
            json!({"structured_outputs": {"json_object": true}}),
        ] {
            let any = constraint(fields).expect("sound");
            assert_eq!(any, Some(Constraint::JsonObject));
        }
        for fields in [json!({}), json!({"response_format": {"type": "text"}})] {
            assert_eq!(constraint(fields).expect("sound"), None);
        }
    }

    #[test]
    fn what_is_no_schema_is_refused() {
        for fields in [
            json!({"response_format": {"type": "sound"}}),
            json!({"response_format": {"type": "json_schema"}}),
            json!({"response_format": {"type": "json_object", "schema": 123}}),
            json!({"structured_outputs": {"regex": "a+"}}),
            json!({"structured_outputs": {"choice": ["a"]}}),
            json!({"structured_outputs": {"json": "{"}}),
            json!({"json_schema": {}, "structured_outputs": {"json_object": true}}),
        ] {
            assert!(constraint(fields.clone()).is_err(), "{fields}");
        }
    }
}
