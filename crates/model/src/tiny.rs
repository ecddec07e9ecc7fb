//! Random tiny models, for tests here and in the crates above.

use std::collections::HashMap;

use bytes::Bytes;
use half::bf16;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::config::{Architecture, ModelConfig};
use crate::random::Random;
use crate::weights::{SINGLE_FILE, Weights};

/// The devices that tests run on: the emulator if it was compiled, and the first GPU if there is one.
///
/// # Panics
/// If there is no GPU and `UPDRAFT_NEEDS_GPU` is set.
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
pub fn gpus() -> Vec<crate::Gpu> {
    let mut gpus = Vec::new();
    #[cfg(feature = "cuda-emulator")]
    gpus.push(crate::Gpu::emulated());
    #[cfg(feature = "cuda")]
    match crate::Gpu::new(0) {
        Ok(gpu) => gpus.push(gpu),
        Err(error) => assert!(
            std::env::var_os("UPDRAFT_NEEDS_GPU").is_none(),
            "UPDRAFT_NEEDS_GPU is set: {error}"
        ),
    }
    gpus
}

/// A model of two blocks, 32 wide, with grouped heads and a vocabulary of 96, as `config.json`.
///
/// # Panics
/// Never: its own JSON is sound.
pub fn config_json(architecture: Architecture) -> Vec<u8> {
    let mut config = json!({
        "model_type": architecture.model_type(), "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 80,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 256, "dtype": "float32",
        "rope_parameters": { "rope_theta": 10000.0, "rope_type": "default" },
        "tie_word_embeddings": architecture == Architecture::Qwen2,
    });
    if architecture == Architecture::Qwen3 {
        config["head_dim"] = json!(16); // not C / H, as in the real ones
    }
    serde_json::to_vec_pretty(&config).expect("JSON values serialize")
}

/// [`config_json`], parsed.
///
/// # Panics
/// Never: its own JSON is sound.
pub fn config(architecture: Architecture) -> ModelConfig {
    ModelConfig::from_json(&config_json(architecture)).expect("the tiny model's own JSON")
}

/// Random weights for a configuration, as a `model.safetensors` of f32; the same for the same seed.
///
/// # Panics
/// If the configuration is not valid.
pub fn safetensors(config: &ModelConfig, seed: u64) -> Vec<u8> {
    serialize(config, seed, Dtype::F32, |number, bytes| {
        bytes.extend(number.to_le_bytes());
    })
}

fn serialize(
    config: &ModelConfig,
    seed: u64,
    dtype: Dtype,
    encode: impl Fn(f32, &mut Vec<u8>),
) -> Vec<u8> {
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = config
        .tensors()
        .into_iter()
        .map(|(name, shape)| {
            let mut random = Random::new(seed, &name);
            // Norm weights around one, the others so that activations keep their size.
            let (middle, spread) = match shape[..] {
                [_, d_in] => (0.0, (3.0 / d_in as f64).sqrt()),
                _ if name.ends_with("norm.weight") => (1.0, 0.3),
                _ => (0.0, 0.3),
            };
            let mut bytes = Vec::new();
            for _ in 0..shape.iter().product() {
                let number = random.uniform(middle - spread, middle + spread);
                encode(number as f32, &mut bytes);
            }
            (name, shape, bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (
            name,
            TensorView::new(dtype, shape.clone(), bytes).expect("a shape's own bytes"),
        )
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views, Some(metadata)).expect("sound views")
}

/// [`safetensors()`], opened.
///
/// # Panics
/// If the configuration is not valid.
pub fn weights(config: &ModelConfig, seed: u64) -> Weights {
    open(safetensors(config, seed))
}

/// The same weights rounded to bf16, as most models are published.
///
/// # Panics
/// If the configuration is not valid.
pub fn weights_bf16(config: &ModelConfig, seed: u64) -> Weights {
    open(serialize(config, seed, Dtype::BF16, |number, bytes| {
        bytes.extend(bf16::from_f32(number).to_le_bytes());
    }))
}

fn open(file: Vec<u8>) -> Weights {
    let files = vec![(SINGLE_FILE.to_owned(), Bytes::from(file))];
    Weights::from_files(files).expect("the tiny model's own file")
}
