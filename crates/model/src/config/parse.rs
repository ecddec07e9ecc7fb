//! From `config.json` to [`ModelConfig`]: field defaults per family, both generations of names.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Architecture, ModelConfig, RopeConfig, RopeScaling, config_error};
use crate::error::{Error, Result};

const FAMILIES: &str = "use a Llama, Mistral, Qwen2 or Qwen3 model";

/// The file, before family defaults.
#[derive(Deserialize)]
struct File {
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Map<String, Value>>,
    rope_parameters: Option<Map<String, Value>>,
    partial_rotary_factor: Option<f64>,
    tie_word_embeddings: Option<bool>,
    max_position_embeddings: Option<usize>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
    quantization_config: Option<Value>,
}

pub(super) fn parse(json: &[u8]) -> Result<ModelConfig> {
    let file: File = serde_json::from_slice(json).map_err(|error| {
        config_error(
            format!("line {} column {}", error.line(), error.column()),
            reason(&error),
        )
    })?;
    let architecture = architecture(&file.model_type)?;
    refuse_what_we_do_not_do(&file)?;
    let bias = file.attention_bias.unwrap_or(false);
    let head_dim = match (file.head_dim, architecture) {
        (Some(head_dim), _) => head_dim,
        (None, Architecture::Qwen3) => 128,
        (None, _) => file
            .hidden_size
            .checked_div(file.num_attention_heads)
            .ok_or_else(|| config_error("num_attention_heads", "0 is not a plausible size"))?,
    };
    Ok(ModelConfig {
        architecture,
        hidden_size: file.hidden_size,
        intermediate_size: file.intermediate_size,
        num_hidden_layers: file.num_hidden_layers,
        num_attention_heads: file.num_attention_heads,
        num_key_value_heads: file.num_key_value_heads.unwrap_or(file.num_attention_heads),
        head_dim,
        vocab_size: file.vocab_size,
        rms_norm_eps: file.rms_norm_eps.unwrap_or(1e-6),
        rope: rope(&file)?,
        tie_word_embeddings: file.tie_word_embeddings.unwrap_or(false),
        max_position_embeddings: file.max_position_embeddings.unwrap_or(match architecture {
            Architecture::Llama => 2048,
            Architecture::Qwen2 | Architecture::Qwen3 => 32_768,
            Architecture::Mistral => 131_072,
        }),
        sliding_window: sliding_window(&file, architecture),
        qkv_bias: match architecture {
            Architecture::Qwen2 => true,
            Architecture::Llama | Architecture::Qwen3 => bias,
            Architecture::Mistral => false,
        },
        o_bias: matches!(architecture, Architecture::Llama | Architecture::Qwen3) && bias,
        mlp_bias: architecture == Architecture::Llama && file.mlp_bias.unwrap_or(false),
        qk_norm: architecture == Architecture::Qwen3,
    })
}

/// serde's sentence without the position, which the error carries as its field.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ")
        .map_or(text.clone(), |(head, _)| head.to_owned())
}

fn architecture(model_type: &str) -> Result<Architecture> {
    match model_type {
        "llama" => Ok(Architecture::Llama),
        "mistral" => Ok(Architecture::Mistral),
        "qwen2" => Ok(Architecture::Qwen2),
        "qwen3" => Ok(Architecture::Qwen3),
        other => Err(Error::Unsupported {
            what: format!("model_type {other:?}"),
            instead: FAMILIES,
        }),
    }
}

fn refuse_what_we_do_not_do(file: &File) -> Result<()> {
    if let Some(act) = file
        .hidden_act
        .as_deref()
        .filter(|&act| act != "silu" && act != "swish")
    {
        return Err(Error::Unsupported {
            what: format!("hidden_act {act:?}"),
            instead: FAMILIES,
        });
    }
    if file
        .quantization_config
        .as_ref()
        .is_some_and(|quantization| !quantization.is_null())
    {
        return Err(Error::Unsupported {
            what: "quantization_config".to_owned(),
            instead: "use the f32, f16 or bf16 version of the model",
        });
    }
    Ok(())
}

/// Qwen writes a window and switches it off beside it; transformers 5 lists each layer's type.
fn sliding_window(file: &File, architecture: Architecture) -> Option<usize> {
    let used = match (&file.layer_types, architecture) {
        (Some(types), _) => types.iter().any(|kind| kind == "sliding_attention"),
        (None, Architecture::Qwen2 | Architecture::Qwen3) => {
            file.use_sliding_window.unwrap_or(false)
        }
        (None, Architecture::Mistral) => true,
        (None, Architecture::Llama) => false,
    };
    file.sliding_window.filter(|_| used)
}

/// `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of transformers 4.
fn rope(file: &File) -> Result<RopeConfig> {
    let (name, parameters) = match (&file.rope_parameters, &file.rope_scaling) {
        (Some(parameters), _) => ("rope_parameters", Some(parameters)),
        (None, scaling) => ("rope_scaling", scaling.as_ref()),
    };
    let number = |field: &str| -> Result<Option<f64>> {
        match parameters.and_then(|parameters| parameters.get(field)) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or_else(|| {
                config_error(
                    format!("{name}.{field}"),
                    format!("{value} is not a number"),
                )
            }),
        }
    };
    let needed = |field: &str| {
        number(field)?.ok_or_else(|| config_error(format!("{name}.{field}"), "missing".to_owned()))
    };
    if let Some(factor) = number("partial_rotary_factor")?
        .or(file.partial_rotary_factor)
        .filter(|&factor| factor != 1.0)
    {
        return Err(Error::Unsupported {
            what: format!("partial_rotary_factor {factor}"),
            instead: FAMILIES,
        });
    }
    let kind = parameters
        .and_then(|parameters| {
            parameters
                .get("rope_type")
                .or_else(|| parameters.get("type"))
        })
        .and_then(Value::as_str)
        .unwrap_or("default");
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear {
            factor: needed("factor")?,
        },
        "llama3" => RopeScaling::Llama3 {
            factor: needed("factor")?,
            low_freq_factor: needed("low_freq_factor")?,
            high_freq_factor: needed("high_freq_factor")?,
            original_max_position_embeddings: needed("original_max_position_embeddings")?,
        },
        other => {
            return Err(Error::Unsupported {
                what: format!("rope_type {other:?}"),
                instead: "use a model with default, linear or llama3 rotary positions",
            });
        }
    };
    let theta = match number("rope_theta")? {
        Some(theta) => theta,
        None => file.rope_theta.unwrap_or(10_000.0),
    };
    Ok(RopeConfig { theta, scaling })
}
