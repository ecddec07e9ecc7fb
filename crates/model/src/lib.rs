//! One decoder for training, prefill and decode, with LoRA adapters and PEFT files.
//!
//! A model folder as transformers writes it becomes a [`Decoder`]: Llama 2 and 3 (SmolLM2 too),
//! Mistral, Qwen2 and Qwen3. The same forward pass serves training, prompts and single tokens; what
//! goes through it is a [`Batch`]. The backward pass is written out layer by layer, next to each
//! forward pass, and reaches an adapter's parameters only: base weights are frozen, but for those
//! that an adapter holds whole, be it all of them.
//!
//! What it is not: a training loop (`updraft-train`), a scheduler or sampler (`updraft-serve`), a
//! tokenizer (`updraft-chat`), or a general tensor library (candle is, and its tensors are the
//! buffers here).
//!
//! ```
//! use updraft_model::{Adapter, LoraConfig, ModelConfig, peft};
//!
//! let model = ModelConfig::from_json(br#"{
//!     "model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
//!     "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512
//! }"#)?;
//! let adapter = Adapter::init(&LoraConfig { r: 8, ..Default::default() }, &model, 3407, &candle_core::Device::Cpu)?;
//! assert_eq!(adapter.parameters()[0].name, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight");
//!
//! let files = peft::write_adapter(&adapter)?; // adapter_config.json and adapter_model.safetensors
//! let again = peft::read_adapter(&files.config_json, &files.safetensors, &model)?;
//! assert_eq!(again.values()?, adapter.values()?);
//! # Ok::<(), updraft_model::Error>(())
//! ```
//!
//! # Rooms
//! - [`ModelConfig`], [`Weights`]: a model's files.
//! - [`Decoder`], [`Batch`], [`KvPages`]: running it.
//! - [`Part`], [`Gradients`], [`Activations`]: training an [`Adapter`].
//! - [`peft`], [`merge`], [`combine`]: the files others read, and one adapter out of several.
//! - [`memory`]: what training will take, before anything is loaded.
//! - [`import_model`], [`load_model_config`], [`load_model_files`]: models in the store.
//!
//! # Features
//! | feature | adds |
//! | --- | --- |
//! | `hub` | [`import_model`] takes Hugging Face Hub ids too |
//! | `cuda` | `Decoder::load_on_gpu`: training and decoding on NVIDIA GPUs |
//! | `cuda-emulator` | the same on kernels compiled for the CPU, to test it |
//! | `conformance` | `tiny`: random tiny models for the tests of other crates |

mod error;

mod config;
mod huge_pages;
mod indices;
mod quantized;
mod weights;

mod import;
mod model_files;

mod batch;
mod blocks;
mod compute;
mod decoder;
mod hidden;
mod kv_pages;
mod layers;
pub mod memory;
mod training;

mod lora;

mod bridge;
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
mod gpu;
mod ops;
mod random;
mod tensor;

#[cfg(any(test, feature = "conformance"))]
pub mod tiny;

pub use batch::{Batch, BlockTables, Part};
pub use compute::Compute;
pub use config::{Architecture, ModelConfig, Projection, RopeConfig, RopeScaling};
pub use decoder::{Decoder, GpuMemory};
pub use error::{Error, Result};
pub use hidden::{Hidden, Logits};
pub use import::import_model;
pub use kv_pages::KvPages;
pub use lora::{
    Adapter, Combination, Gradients, LoraConfig, Parameter, Role, TargetModules, combine, merge,
    peft,
};
pub use model_files::{ModelFiles, load_model_config, load_model_files};
pub use quantized::Quantization;
pub use training::Activations;
pub use updraft_kernels::Threads;
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
pub use updraft_kernels::cuda::{
    Gpu,
    sampling::{Choice, Edit},
};
pub use weights::{INDEX_FILE, SINGLE_FILE, Shard, Weights, f32_bytes, f32_header, f32_pieces};
