//! A `config.json` of transformers 4 or 5 in the form that candle-transformers reads.

use serde_json::{Map, Value};

use crate::error::BoxError;

/// What is read of a configuration besides the architecture's own settings.
#[derive(Debug)]
pub(super) struct ModelSettings {
    pub(super) model_type: String,
    pub(super) vocab_size: usize,
    /// The longest sequence: within a sliding window there is no difference to full attention,
    /// which is what some of the architectures compute.
    pub(super) max_len: u32,
    /// With rotary settings where transformers 4 wrote them.
    pub(super) config: Value,
}

/// # Errors
/// What is missing, or what candle-transformers would silently ignore.
pub(super) fn settings(json: &[u8]) -> Result<ModelSettings, BoxError> {
    let mut fields: Map<String, Value> = serde_json::from_slice(json)?;
    let model_type = text(&fields, "model_type")?.to_owned();
    if fields
        .get("quantization_config")
        .is_some_and(|value| !value.is_null())
    {
        return Err("quantized weights are not supported; use the model's 16-bit weights".into());
    }
    if let Some(Value::Object(rope)) = fields.remove("rope_parameters") {
        lift_rope(&mut fields, &rope)?;
    }
    if fields
        .get("rope_scaling")
        .is_some_and(|scaling| !scaling.is_null())
    {
        return Err("scaled rotary positions are not supported for this architecture".into());
    }
    if let Some(pattern) = fields.remove("_sliding_window_pattern") {
        fields.insert("sliding_window_pattern".to_owned(), pattern);
    }
    let window = fields.get("sliding_window").and_then(Value::as_u64);
    let positions = number(&fields, "max_position_embeddings")?;
    let max_len = u32::try_from(window.map_or(positions, |window| window.min(positions)))?;
    let vocab_size = usize::try_from(number(&fields, "vocab_size")?)?;
    Ok(ModelSettings {
        model_type,
        vocab_size,
        max_len,
        config: Value::Object(fields),
    })
}

/// transformers 5 keeps rotary settings together, for each kind of attention if there are two.
fn lift_rope(fields: &mut Map<String, Value>, rope: &Map<String, Value>) -> Result<(), BoxError> {
    let kinds = [
        ("full_attention", "rope_theta"),
        ("sliding_attention", "rope_local_base_freq"),
    ];
    if !kinds.iter().any(|(kind, _)| rope.contains_key(*kind)) {
        return lift(fields, rope, "rope_theta");
    }
    for (kind, name) in kinds {
        if let Some(Value::Object(rope)) = rope.get(kind) {
            lift(fields, rope, name)?;
        }
    }
    Ok(())
}

fn lift(
    fields: &mut Map<String, Value>,
    rope: &Map<String, Value>,
    name: &str,
) -> Result<(), BoxError> {
    match rope.get("rope_type").and_then(Value::as_str) {
        None | Some("default") => {}
        Some(other) => {
            let reason = format!("rotary positions of type {other:?} are not supported");
            return Err(reason.into());
        }
    }
    let theta = rope.get("rope_theta").ok_or("there is no rope_theta")?;
    fields.insert(name.to_owned(), theta.clone());
    if let Some(factor) = rope.get("partial_rotary_factor") {
        fields.insert("partial_rotary_factor".to_owned(), factor.clone());
    }
    Ok(())
}

fn text<'a>(fields: &'a Map<String, Value>, name: &str) -> Result<&'a str, BoxError> {
    let value = fields.get(name).and_then(Value::as_str);
    value.ok_or_else(|| format!("config.json has no {name}").into())
}

fn number(fields: &Map<String, Value>, name: &str) -> Result<u64, BoxError> {
    let value = fields.get(name).and_then(Value::as_u64);
    value.ok_or_else(|| format!("config.json has no {name}").into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(extra: Value) -> Result<ModelSettings, BoxError> {
        let mut config = json!({
            "model_type": "gemma3_text", "vocab_size": 40, "max_position_embeddings": 128,
        });
        let (Some(config), Value::Object(extra)) = (config.as_object_mut(), extra) else {
            panic!("both are objects");
        };
        config.extend(extra);
        settings(&serde_json::to_vec(config).expect("JSON"))
    }

    #[test]
    fn rotary_settings_of_transformers_5_are_found() {
        let read = read(json!({
            "sliding_window": 64, "_sliding_window_pattern": 6,
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
        }));
        let read = read.expect("a configuration");
        assert_eq!((read.max_len, read.vocab_size), (64, 40));
        assert_eq!(read.config["rope_theta"], 1e6);
        assert_eq!(read.config["rope_local_base_freq"], 1e4);
        assert_eq!(read.config["sliding_window_pattern"], 6);
    }

    #[test]
    fn what_would_be_ignored_is_refused() {
        for (extra, expected) in [
            (
                json!({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}),
                "yarn",
            ),
            (
                json!({"rope_scaling": {"type": "linear", "factor": 2}}),
                "scaled rotary",
            ),
            (json!({"quantization_config": {"bits": 4}}), "quantized"),
            (json!({"model_type": null}), "no model_type"),
        ] {
            let error = read(extra).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
