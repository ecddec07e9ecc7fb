//! The `config.json` of a decoder model, as transformers 4 and 5 write it.

mod parse;
mod rope;

use crate::error::{Error, Result};

pub use rope::{RopeConfig, RopeScaling};

/// The embedding's name in a checkpoint.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
/// The head's, where it is not the embedding.
pub(crate) const HEAD: &str = "lm_head.weight";

/// The model families the decoder covers.
///
/// SmolLM2, TinyLlama and many others are [`Llama`](Self::Llama).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Architecture {
    /// Llama 2 and 3, and what is built like them.
    Llama,
    /// Mistral; a sliding window bounds the length, see [`ModelConfig::max_len`].
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: RMS norms on the heads of q and k.
    Qwen3,
}

impl Architecture {
    /// The `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// What decides the shapes and the arithmetic of a decoder; fields carry the names of `config.json`.
///
/// Read it with [`from_json`](Self::from_json); what the file leaves out is filled in as
/// transformers does for the family.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Width of the residual stream, `C`.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// How many blocks.
    pub num_hidden_layers: usize,
    /// Query heads, `H`.
    pub num_attention_heads: usize,
    /// Key and value heads, `H_kv`; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of one head, `D`; even.
    pub head_dim: usize,
    /// Rows of the embedding, `V`.
    pub vocab_size: usize,
    /// Added to the mean square before its root.
    pub rms_norm_eps: f64,
    /// Rotary positions.
    pub rope: RopeConfig,
    /// Whether the head is the embedding itself.
    pub tie_word_embeddings: bool,
    /// The longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// How far back a token sees, if less than everything.
    pub sliding_window: Option<usize>,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// A bias on o.
    pub o_bias: bool,
    /// Biases on gate, up and down.
    pub mlp_bias: bool,
    /// RMS norms over each head of q and k.
    pub qk_norm: bool,
}

impl ModelConfig {
    /// Parses a `config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] names the field that is missing, of the wrong type or contradictory;
    /// [`Error::Unsupported`] names what the decoder does not do (another family, activation,
    /// rotary scaling or quantization), never ignored.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let config = parse::parse(json)?;
        config.validate()?;
        Ok(config)
    }

    /// Checks that the numbers fit together.
    ///
    /// # Errors
    /// [`Error::Config`] with the field at fault.
    pub fn validate(&self) -> Result<()> {
        let positive = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (field, value) in positive {
            // 2^28 is beyond every model there is, and keeps products of two within u64.
            if value == 0 || value > 1 << 28 {
                return Err(config_error(
                    field,
                    format!("{value} is not a plausible size"),
                ));
            }
        }
        if !self
            .num_attention_heads
            .is_multiple_of(self.num_key_value_heads)
        {
            let reason = format!(
                "{} does not divide {} query heads",
                self.num_key_value_heads, self.num_attention_heads
            );
            return Err(config_error("num_key_value_heads", reason));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(config_error(
                "head_dim",
                format!("{} is odd, rotary positions need pairs", self.head_dim),
            ));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            return Err(config_error(
                "rms_norm_eps",
                format!("{} is not a small positive number", self.rms_norm_eps),
            ));
        }
        self.rope.validate()
    }

    /// The longest sequence [`Decoder`](crate::Decoder) accepts: `max_position_embeddings`, or the
    /// sliding window where that is shorter, because within the window the two are the same.
    pub fn max_len(&self) -> usize {
        self.sliding_window
            .map_or(self.max_position_embeddings, |window| {
                window.min(self.max_position_embeddings)
            })
    }

    /// Width of all query heads, `H·D`.
    pub fn q_dim(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key (or value) heads, `H_kv·D`.
    pub fn kv_dim(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// `(D_in, D_out)` of a projection, whose weight is `[D_out, D_in]`.
    pub fn projection_dims(&self, projection: Projection) -> (usize, usize) {
        match projection {
            Projection::Q => (self.hidden_size, self.q_dim()),
            Projection::K | Projection::V => (self.hidden_size, self.kv_dim()),
            Projection::O => (self.q_dim(), self.hidden_size),
            Projection::Gate | Projection::Up => (self.hidden_size, self.intermediate_size),
            Projection::Down => (self.intermediate_size, self.hidden_size),
        }
    }

    /// Whether a projection carries a bias.
    pub fn projection_bias(&self, projection: Projection) -> bool {
        match projection {
            Projection::Q | Projection::K | Projection::V => self.qkv_bias,
            Projection::O => self.o_bias,
            Projection::Gate | Projection::Up | Projection::Down => self.mlp_bias,
        }
    }

    /// The names and shapes of the tensors a checkpoint must hold.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let table = vec![self.vocab_size, self.hidden_size];
        let mut tensors = vec![(EMBEDDING.to_owned(), table.clone())];
        for layer in 0..self.num_hidden_layers {
            for projection in Projection::ALL {
                let ((d_in, d_out), path) =
                    (self.projection_dims(projection), projection.path(layer));
                tensors.push((format!("{path}.weight"), vec![d_out, d_in]));
                if self.projection_bias(projection) {
                    tensors.push((format!("{path}.bias"), vec![d_out]));
                }
            }
            let block_norms = ["input_layernorm", "post_attention_layernorm"]
                .map(|norm| (norm, self.hidden_size));
            let head_norms =
                ["self_attn.q_norm", "self_attn.k_norm"].map(|norm| (norm, self.head_dim));
            let head_norms = head_norms.into_iter().filter(|_| self.qk_norm);
            tensors.extend(
                block_norms
                    .into_iter()
                    .chain(head_norms)
                    .map(|(norm, width)| {
                        (format!("model.layers.{layer}.{norm}.weight"), vec![width])
                    }),
            );
        }
        tensors.push(("model.norm.weight".to_owned(), vec![self.hidden_size]));
        if !self.tie_word_embeddings {
            tensors.push((HEAD.to_owned(), table));
        }
        tensors
    }

    /// How many numbers the base model holds, a tied head counted once.
    pub fn num_parameters(&self) -> u64 {
        self.tensors()
            .iter()
            .map(|(_, shape)| shape.iter().map(|&dim| dim as u64).product::<u64>())
            .sum()
    }
}

/// One of the seven linear maps of a block, the modules LoRA adapts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Projection {
    /// `self_attn.q_proj`
    Q,
    /// `self_attn.k_proj`
    K,
    /// `self_attn.v_proj`
    V,
    /// `self_attn.o_proj`
    O,
    /// `mlp.gate_proj`
    Gate,
    /// `mlp.up_proj`
    Up,
    /// `mlp.down_proj`
    Down,
}

impl Projection {
    /// All seven, in the order the decoder meets them.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// The module's own name, as `target_modules` lists it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// The module's full name in a checkpoint, `model.layers.3.self_attn.q_proj`.
    pub fn path(self, layer: usize) -> String {
        let parent = match self {
            Self::Q | Self::K | Self::V | Self::O => "self_attn",
            Self::Gate | Self::Up | Self::Down => "mlp",
        };
        format!("model.layers.{layer}.{parent}.{}", self.name())
    }
}

pub(crate) fn config_error(field: impl Into<String>, reason: impl Into<String>) -> Error {
    Error::Config {
        file: "config.json",
        field: field.into(),
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests;
