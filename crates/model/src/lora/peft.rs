//! PEFT's files: `adapter_config.json` and `adapter_model.safetensors`, read and written.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::adapter::Adapter;
use super::config::{LoraConfig, TargetModules, whole_if_whole};
use super::plan::{PREFIX, Parameter};
use super::saved::{SavedModules, module};
use crate::config::{EMBEDDING, HEAD, ModelConfig, Projection};
use crate::error::{Error, Result};
use crate::weights::{Weights, decode, f32_bytes, f32_header, f32_pieces};

/// The settings file.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The weights file.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// The version of PEFT whose files these are.
pub const PEFT_VERSION: &str = "0.21.2";

/// An adapter as PEFT lays it out on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeftFiles {
    /// `adapter_config.json`: keys sorted, two spaces.
    pub config_json: Vec<u8>,
    /// `adapter_model.safetensors`: F32, the adapter's name stripped from the keys.
    pub safetensors: Vec<u8>,
}

/// Settings that change what the adapter computes and are not done here, when set at all.
const REFUSED: [&str; 14] = [
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "lora_ga_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
    "eva_config",
];

/// Reads an adapter made by PEFT, Unsloth, or [`write_adapter`].
///
/// The tensors decide which modules are adapted and which are held whole, so a regular expression in
/// `target_modules` is no obstacle. Nothing is skipped: a tensor that is neither the `A` or `B` of a
/// known module nor a weight of the model is an error.
///
/// # Errors
/// [`Error::Config`] and [`Error::Unsupported`] name the setting, [`Error::Adapter`],
/// [`Error::MissingTensor`] and [`Error::Shape`] the tensor, [`Error::Corrupt`] the file.
pub fn read_adapter(
    config_json: &[u8],
    safetensors: &[u8],
    model: &ModelConfig,
) -> Result<Adapter> {
    let mut config = read_config(config_json)?;
    let weights = Weights::from_one(WEIGHTS_FILE, Bytes::copy_from_slice(safetensors))?;
    let (adapted, whole) = modules(&weights, model)?;
    if !agrees(&config, &adapted, model) {
        config.target_modules = name_modules(&adapted, model);
    }
    let tie = config.ensure_weight_tying && model.tie_word_embeddings;
    let in_file = |name: &str| whole.contains(name);
    let saved = SavedModules::select(model, tie, in_file)?;
    let named = SavedModules::new(&config, model)?;
    if let Some((name, _)) = named.missing_in(&saved) {
        return Err(Error::MissingTensor {
            name: format!("{PREFIX}{name}"),
            files: 1,
        });
    }
    if named != saved {
        config.modules_to_save = whole.iter().map(|name| module(name).to_owned()).collect();
        config.modules_to_save.dedup();
    }
    if saved.tied_head && in_file(EMBEDDING) && in_file(HEAD) {
        let read = |name: &str| weights.bytes(&format!("{PREFIX}{name}"));
        if read(EMBEDDING)? != read(HEAD)? {
            return Err(Error::adapter(
                "its head differs from its embedding, though ensure_weight_tying is set",
            ));
        }
    }
    let targets = |projection, layer| adapted.contains(&(layer, projection));
    Adapter::from_parameters(config, model, targets, saved, |parameter, values| {
        let shape = weights.shape(&parameter.name)?;
        if shape != parameter.shape {
            let (name, expected, actual) = (
                parameter.name.clone(),
                parameter.shape.to_vec(),
                shape.to_vec(),
            );
            return Err(Error::Shape {
                name,
                expected,
                actual,
            });
        }
        let (name, dtype) = (&parameter.name, weights.dtype(&parameter.name)?);
        values.copy_from_slice(&decode::<f32>(name, dtype, &weights.bytes(name)?)?);
        Ok(())
    })
}

/// Writes an adapter as PEFT does; PEFT, transformers and vLLM load it.
///
/// # Errors
/// [`Error::Corrupt`] if safetensors refuses the tensors, which no adapter makes it do.
pub fn write_adapter(adapter: &Adapter) -> Result<PeftFiles> {
    let mut safetensors = Vec::new();
    for piece in weights_pieces(adapter)? {
        safetensors.extend_from_slice(&piece?);
    }
    Ok(PeftFiles {
        config_json: config_json(adapter),
        safetensors,
    })
}

/// [`CONFIG_FILE`] of an adapter.
pub fn config_json(adapter: &Adapter) -> Vec<u8> {
    write_config(adapter.config())
}

/// [`WEIGHTS_FILE`] of an adapter in pieces of about a mebibyte, so that one too large to exist twice
/// can be written.
///
/// # Errors
/// As [`write_adapter`]; from the iterator [`Error::Candle`] if the device fails.
pub fn weights_pieces(adapter: &Adapter) -> Result<impl Iterator<Item = Result<Bytes>>> {
    let parameters = adapter.parameters().iter();
    let mut tensors: Vec<_> = parameters
        .map(|parameter| (parameter.name.clone(), parameter))
        .collect();
    if adapter.plan().tied_head() {
        let own = |parameter: &&Parameter| parameter.name.ends_with(EMBEDDING);
        let embedding = adapter.parameters().iter().find(own);
        tensors.extend(embedding.map(|parameter| (format!("{PREFIX}{HEAD}"), parameter)));
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0)); // As safetensors itself orders them.
    let shapes = tensors
        .iter()
        .map(|(name, parameter)| (name.clone(), parameter.shape.clone()));
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let header = f32_header(shapes, Some(metadata)).map_err(|error| Error::Corrupt {
        file: WEIGHTS_FILE.to_owned(),
        reason: error.to_string(),
    })?;
    // From another number type or device all of it comes at once.
    let copy = match adapter.is_plain() {
        true => None,
        false => Some(adapter.values()?),
    };
    let pieces = tensors
        .into_iter()
        .flat_map(|(_, parameter)| f32_pieces(parameter.range.clone()))
        .map(move |piece| match &copy {
            Some(values) => Ok(f32_bytes(&values[piece])),
            None => adapter.with(|values| f32_bytes(&values[piece])),
        });
    Ok(std::iter::once(Ok(header)).chain(pieces))
}

fn read_config(json: &[u8]) -> Result<LoraConfig> {
    /// The fields that decide what is computed; the rest is looked at by name.
    #[derive(Deserialize)]
    struct File {
        peft_type: String,
        r: Option<usize>,
        lora_alpha: Option<f64>,
        lora_dropout: Option<f64>,
        target_modules: Option<TargetModules>,
        bias: Option<String>,
        use_rslora: Option<bool>,
        rank_pattern: Option<BTreeMap<String, usize>>,
        alpha_pattern: Option<BTreeMap<String, f64>>,
        base_model_name_or_path: Option<String>,
        revision: Option<String>,
        init_lora_weights: Option<Value>,
        modules_to_save: Option<Vec<String>>,
        ensure_weight_tying: Option<bool>,
        #[serde(flatten)]
        others: Map<String, Value>,
    }
    let config_error = |field: String, reason: String| Error::Config {
        file: CONFIG_FILE,
        field,
        reason,
    };
    let file: File = serde_json::from_slice(json).map_err(|error| {
        config_error(
            format!("line {} column {}", error.line(), error.column()),
            error.to_string(),
        )
    })?;
    if file.peft_type != "LORA" {
        return Err(unsupported(format!("peft_type {:?}", file.peft_type)));
    }
    if let Some(bias) = file.bias.filter(|bias| bias != "none") {
        return Err(unsupported(format!("bias {bias:?}")));
    }
    if let Some(field) = REFUSED
        .iter()
        .find(|&&field| file.others.get(field).is_some_and(is_set))
    {
        return Err(unsupported((*field).to_owned()));
    }
    if let Some(Value::String(init)) = file.init_lora_weights.filter(changes_the_base) {
        return Err(unsupported(format!(
            "init_lora_weights {init:?}, which changes the base model,"
        )));
    }
    let config = LoraConfig {
        r: file.r.unwrap_or(8),
        lora_alpha: file.lora_alpha.unwrap_or(8.0),
        lora_dropout: file.lora_dropout.unwrap_or(0.0),
        target_modules: file
            .target_modules
            .unwrap_or(TargetModules::Names(Vec::new())),
        use_rslora: file.use_rslora.unwrap_or(false),
        rank_pattern: file.rank_pattern.unwrap_or_default(),
        alpha_pattern: file.alpha_pattern.unwrap_or_default(),
        modules_to_save: file.modules_to_save.unwrap_or_default(),
        ensure_weight_tying: file.ensure_weight_tying.unwrap_or(false),
        base_model_name_or_path: file.base_model_name_or_path,
        revision: file.revision,
    };
    config.validate_numbers()?;
    Ok(config)
}

fn unsupported(what: String) -> Error {
    Error::Unsupported {
        what,
        instead: "use a plain LoRA adapter, or merge it with PEFT and use the merged model",
    }
}

fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    }
}

/// PiSSA, OLoRA, CorDA and LoftQ train against a base with the initial product taken out of it.
fn changes_the_base(init: &Value) -> bool {
    init.as_str()
        .is_some_and(|init| !["gaussian", "eva", "orthogonal"].contains(&init))
}

/// The linear maps that are adapted, and the weights that are held whole by their names in the base.
type Modules = (BTreeSet<(usize, Projection)>, BTreeSet<String>);

fn modules(weights: &Weights, model: &ModelConfig) -> Result<Modules> {
    let mut known: BTreeMap<String, (usize, Projection)> = BTreeMap::new();
    for layer in 0..model.num_hidden_layers {
        for projection in Projection::ALL {
            let module = format!("{PREFIX}{}", projection.path(layer));
            known.insert(format!("{module}.lora_A.weight"), (layer, projection));
            known.insert(format!("{module}.lora_B.weight"), (layer, projection));
        }
    }
    let of_base: BTreeSet<String> = model.tensors().into_iter().map(|(name, _)| name).collect();
    let (mut adapted, mut whole) = (BTreeSet::new(), BTreeSet::new());
    for name in weights.names() {
        match (known.get(name), name.strip_prefix(PREFIX)) {
            (Some(&pair), _) => {
                adapted.insert(pair);
            }
            (None, Some(own)) if own == HEAD || of_base.contains(own) => {
                whole.insert(own.to_owned());
            }
            (None, _) => {
                return Err(Error::adapter(format!(
                    "tensor {name} belongs to no module of the model"
                )));
            }
        }
    }
    if adapted.is_empty() && whole.is_empty() {
        return Err(Error::adapter("it holds no tensors"));
    }
    Ok((adapted, whole))
}

fn agrees(
    config: &LoraConfig,
    adapted: &BTreeSet<(usize, Projection)>,
    model: &ModelConfig,
) -> bool {
    all_modules(model).all(|(layer, projection)| {
        config.targets(projection, layer) == adapted.contains(&(layer, projection))
    })
}

/// Names for exactly these modules: short ones where all layers have them, else full ones.
pub(super) fn name_modules(
    adapted: &BTreeSet<(usize, Projection)>,
    model: &ModelConfig,
) -> TargetModules {
    let short: BTreeSet<_> = adapted.iter().map(|&(_, projection)| projection).collect();
    if adapted.len() == short.len() * model.num_hidden_layers {
        return TargetModules::Names(
            short
                .iter()
                .map(|projection| projection.name().to_owned())
                .collect(),
        );
    }
    TargetModules::Names(
        adapted
            .iter()
            .map(|(layer, projection)| projection.path(*layer))
            .collect(),
    )
}

fn all_modules(model: &ModelConfig) -> impl Iterator<Item = (usize, Projection)> {
    (0..model.num_hidden_layers)
        .flat_map(|layer| Projection::ALL.map(|projection| (layer, projection)))
}

/// Every key PEFT writes, those we have nothing to say about at their defaults.
fn write_config(config: &LoraConfig) -> Vec<u8> {
    let alphas: Map<String, Value> = config
        .alpha_pattern
        .iter()
        .map(|(key, &alpha)| (key.clone(), whole(alpha)))
        .collect();
    let fields = json!({
        "alora_invocation_tokens": null,
        "alpha_pattern": alphas,
        "arrow_config": null,
        "auto_mapping": null,
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": "none",
        "corda_config": null,
        "ensure_weight_tying": config.ensure_weight_tying,
        "eva_config": null,
        "exclude_modules": null,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "loftq_config": {},
        "lora_alpha": whole(config.lora_alpha),
        "lora_bias": false,
        "lora_dropout": config.lora_dropout,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": (!config.modules_to_save.is_empty()).then_some(&config.modules_to_save),
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "qalora_group_size": 16,
        "r": config.r,
        "rank_pattern": config.rank_pattern,
        "revision": config.revision,
        "target_modules": config.target_modules,
        "target_parameters": null,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": null,
        "use_dora": false,
        "use_qalora": false,
        "use_rslora": config.use_rslora,
    });
    serde_json::to_vec_pretty(&fields).expect("JSON values serialize")
}

fn whole(alpha: f64) -> Value {
    whole_if_whole(&alpha, serde_json::value::Serializer).unwrap_or(Value::Null)
}

#[cfg(test)]
mod tests;
