//! What makes two runs one run: everything that a resume must share.

use serde::{Deserialize, Serialize};
use updraft_model::{Adapter, LoraConfig, ModelConfig, f32_bytes, f32_pieces};
use updraft_store::sha256_hex;

use crate::{Result, TrainConfig};

/// Names a run by everything that decides what it ends with, but for the machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunIdentity {
    /// The settings that decide the result, the others at their defaults.
    pub config: TrainConfig,
    /// What is trained.
    pub lora: LoraConfig,
    /// The names and shapes of the base model's weights, hashed.
    pub shape: String,
    /// The base model's content, where the run was [told](crate::Trainer::with_base).
    pub base: Option<String>,
    /// The id of the data's plan, which names content and order.
    pub data: String,
    /// The id of the held-out data's plan, where there is some.
    pub held_out: Option<String>,
    /// The parameters that the run began with, hashed.
    pub start: String,
}

impl RunIdentity {
    /// The whole as one SHA-256.
    ///
    /// # Panics
    /// If the settings do not serialize; they do.
    #[must_use]
    pub fn key(&self) -> String {
        sha256_hex(&serde_json::to_vec(self).expect("plain settings serialize"))
    }

    /// The first thing in which another run differs.
    pub(crate) fn difference(&self, other: &Self) -> Option<&'static str> {
        let pairs = [
            (SHAPE, self.shape == other.shape),
            ("the base model", self.base == other.base),
            ("the data", self.data == other.data),
            ("the held-out data", self.held_out == other.held_out),
            ("TrainConfig", self.config == other.config),
            ("LoraConfig", self.lora == other.lora),
            ("the adapter it began with", self.start == other.start),
        ];
        let found = pairs.into_iter().find(|(_, same)| !same);
        found.map(|(what, _)| what)
    }
}

/// What differs when the weights of two base models have other names or sizes.
pub(crate) const SHAPE: &str = "the base model's shape";

/// An adapter's parameters, hashed a mebibyte at a time.
pub(crate) fn values_of(adapter: &Adapter) -> Result<String> {
    let pieces = |values: &[f32]| -> String {
        let pieces = f32_pieces(0..values.len());
        pieces
            .map(|piece| sha256_hex(&f32_bytes(&values[piece])))
            .collect()
    };
    Ok(sha256_hex(adapter.with(pieces)?.as_bytes()))
}

/// The names and shapes of a model's weights, hashed.
pub(crate) fn shape_of(model: &ModelConfig) -> String {
    let tensors = model.tensors().into_iter();
    let lines = tensors.map(|(name, shape)| format!("{name} {shape:?}\n"));
    let tied = format!("tied {}\n", model.tie_word_embeddings);
    sha256_hex((lines.collect::<String>() + &tied).as_bytes())
}
