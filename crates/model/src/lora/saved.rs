//! Weights of the base model that are trained whole, PEFT's `modules_to_save`.

use std::collections::BTreeMap;

use super::config::LoraConfig;
use super::plan::PREFIX;
use crate::config::{EMBEDDING, HEAD, ModelConfig, Projection};
use crate::error::{Error, Result};
use crate::layers::Group;
use crate::tensor::Tensor;

/// Names and shapes of weights that a layer holds as one tensor, one below the other.
pub(crate) type Stack = Vec<(String, Vec<usize>)>;

/// The weights that are trained whole, as the layers hold them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct SavedModules {
    pub(crate) stacks: Vec<Stack>,
    /// Whether the embedding is among them and stays the head.
    pub(crate) tied_head: bool,
}

impl SavedModules {
    /// Those that a configuration names.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that no module ends with, or a module that is adapted too;
    /// [`Error::Unsupported`] if only some of the maps that share an input are named.
    pub(crate) fn new(config: &LoraConfig, model: &ModelConfig) -> Result<Self> {
        if config.modules_to_save.is_empty() {
            return Ok(Self::default());
        }
        let stacks = stacks(model);
        let modules = || stacks.iter().flatten().map(|(name, _)| module(name));
        let unknown = config
            .modules_to_save
            .iter()
            .find(|name| !modules().any(|module| ends_with(module, name)));
        if let Some(name) = unknown {
            return Err(config_error(format!(
                "no module of the model ends with {name:?}"
            )));
        }
        for layer in 0..model.num_hidden_layers {
            for projection in Projection::ALL {
                let path = projection.path(layer);
                if config.targets(projection, layer) && config.saves(&path) {
                    return Err(config_error(format!(
                        "{path} is among the target_modules too"
                    )));
                }
            }
        }
        Self::select(model, config.ensure_weight_tying, |name| {
            config.saves(module(name))
        })
    }

    /// Those of which `saves` says so by their names in the model's files.
    pub(crate) fn select(
        model: &ModelConfig,
        ensure_weight_tying: bool,
        saves: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let tie = ensure_weight_tying && model.tie_word_embeddings;
        let tied_head = tie && (saves(EMBEDDING) || saves(HEAD));
        let mut selected = Vec::new();
        for stack in stacks(model) {
            let chosen = |(name, _): &(String, Vec<usize>)| match &name[..] {
                EMBEDDING => tied_head || saves(EMBEDDING),
                HEAD => !tied_head && saves(HEAD),
                name => saves(name),
            };
            match stack.iter().filter(|weight| chosen(weight)).count() {
                0 => {}
                all if all == stack.len() => selected.push(stack),
                _ => {
                    let names: Vec<&str> = stack.iter().map(|(name, _)| module(name)).collect();
                    return Err(Error::Unsupported {
                        what: format!("saving only some of {}", names.join(", ")),
                        instead: "name all of them in modules_to_save, or adapt them with LoRA",
                    });
                }
            }
        }
        Ok(Self {
            stacks: selected,
            tied_head,
        })
    }

    /// The first of these that others lack.
    pub(crate) fn missing_in(&self, others: &Self) -> Option<&(String, Vec<usize>)> {
        let mut stacks = self.stacks.iter();
        let missing = stacks.find(|stack| !others.stacks.contains(stack))?;
        missing.first()
    }

    /// How many numbers they hold.
    pub(crate) fn num_parameters(&self) -> u64 {
        let len = |(_, shape): &(String, Vec<usize>)| shape.iter().product::<usize>() as u64;
        self.stacks.iter().flatten().map(len).sum()
    }
}

impl LoraConfig {
    /// Whether a module, such as `lm_head`, is trained whole: PEFT asks whether its path ends with
    /// one of the names, be that within a word.
    pub fn saves(&self, module: &str) -> bool {
        self.modules_to_save
            .iter()
            .any(|name| ends_with(module, name))
    }
}

fn ends_with(module: &str, name: &str) -> bool {
    format!("{PREFIX}{module}").ends_with(name)
}

/// The module a tensor belongs to.
pub(super) fn module(tensor: &str) -> &str {
    tensor.rsplit_once('.').map_or(tensor, |(module, _)| module)
}

/// All weights of a model as the layers hold them; the head even where it is tied.
fn stacks(model: &ModelConfig) -> Vec<Stack> {
    let (width, table) = (model.hidden_size, vec![model.vocab_size, model.hidden_size]);
    let one = |name: String, shape: Vec<usize>| vec![(name, shape)];
    let mut stacks = vec![one(EMBEDDING.to_owned(), table.clone())];
    for layer in 0..model.num_hidden_layers {
        for group in Group::ALL {
            let maps = group.projections().iter();
            let weights = maps.clone().map(|&map| {
                let (d_in, d_out) = model.projection_dims(map);
                (format!("{}.weight", map.path(layer)), vec![d_out, d_in])
            });
            stacks.push(weights.collect());
            let biased = maps.filter(|&&map| model.projection_bias(map));
            let biases: Stack = biased
                .map(|&map| {
                    let (_, d_out) = model.projection_dims(map);
                    (format!("{}.bias", map.path(layer)), vec![d_out])
                })
                .collect();
            if !biases.is_empty() {
                stacks.push(biases);
            }
        }
        let mut norm = |name: &str, width: usize| {
            let name = format!("model.layers.{layer}.{name}.weight");
            stacks.push(one(name, vec![width]));
        };
        norm("input_layernorm", width);
        norm("post_attention_layernorm", width);
        if model.qk_norm {
            norm("self_attn.q_norm", model.head_dim);
            norm("self_attn.k_norm", model.head_dim);
        }
    }
    stacks.push(one("model.norm.weight".to_owned(), vec![width]));
    stacks.push(one(HEAD.to_owned(), table));
    stacks
}

/// Views of the weights that are trained whole, or of their gradients.
#[derive(Debug, Default)]
pub(crate) struct Saved {
    tensors: BTreeMap<String, Tensor>,
    tied_head: bool,
}

impl Saved {
    pub(super) fn new(tensors: BTreeMap<String, Tensor>, tied_head: bool) -> Self {
        Self { tensors, tied_head }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// By the name of the first weight in it.
    pub(crate) fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// The head, the embedding itself where that stays tied.
    pub(crate) fn head(&self) -> Option<&Tensor> {
        self.get(if self.tied_head { EMBEDDING } else { HEAD })
    }

    /// A weight of the base model's, or what is trained in its place.
    pub(crate) fn or(&self, name: &str, base: &Tensor) -> Tensor {
        self.get(name).unwrap_or(base).clone()
    }
}

fn config_error(reason: String) -> Error {
    Error::Config {
        file: "adapter_config.json",
        field: "modules_to_save".to_owned(),
        reason,
    }
}
