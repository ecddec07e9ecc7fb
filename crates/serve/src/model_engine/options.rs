//! What an engine may spend, and what that buys.

use updraft_model::{Compute, Decoder, KvPages, Quantization};

use super::worker::LOGIT_ROWS_ON_GPU;
use crate::error::{Error, Result};
use crate::scheduler::SchedulerConfig;

/// Memory for keys and values on the CPU, if none is named.
const KV_CACHE_BYTES_ON_CPU: u64 = 512 << 20;
/// The share of a GPU's free memory that is planned for: the driver, cuBLAS and what lies between blocks of the memory
/// need some.
const SHARE_OF_GPU: f64 = 0.9;

/// What an engine may spend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineOptions {
    /// Where the model computes; only [`ModelEngine::load`](super::ModelEngine::load) looks at it.
    pub compute: Compute,
    /// The longest prompt and completion together. `None`: what the model was made for, or what
    /// the cache holds if that is less.
    pub max_model_len: Option<u32>,
    /// How the model's matrices are quantized as they are loaded. `None`: not at all.
    pub quantization: Option<Quantization>,
    /// Memory for keys and values: more holds more and longer requests at once. `None`: 512 MiB on
    /// the CPU; on a GPU most of what the model leaves free.
    pub kv_cache_bytes: Option<u64>,
    /// Tokens per block of it.
    pub block_size: u32,
    /// Whether prompts share what was computed for the same beginning before. On the CPU answers
    /// are the same either way; off, every prompt is computed whole.
    pub prefix_cache: bool,
    /// As [`SchedulerConfig::max_num_seqs`].
    pub max_num_seqs: usize,
    /// As [`SchedulerConfig::max_num_batched_tokens`].
    pub max_num_batched_tokens: u32,
    /// As [`SchedulerConfig::max_queued_requests`].
    pub max_queued_requests: usize,
    /// As [`SchedulerConfig::max_queued_tokens`].
    pub max_queued_tokens: u64,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            compute: Compute::Cpu,
            max_model_len: None,
            quantization: None,
            kv_cache_bytes: None,
            block_size: 16,
            prefix_cache: true,
            max_num_seqs: 64,
            max_num_batched_tokens: 512,
            max_queued_requests: 256,
            max_queued_tokens: 1 << 18,
        }
    }
}

/// A context and the blocks that hold it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CachePlan {
    pub(super) max_model_len: u32,
    pub(super) num_blocks: u32,
}

impl EngineOptions {
    /// What suits a processor: a GPU takes longer prompts and more sequences at once.
    #[must_use]
    pub fn for_compute(compute: Compute) -> Self {
        let options = Self {
            compute,
            ..Self::default()
        };
        match compute {
            Compute::Cpu => options,
            Compute::Cuda(_) => Self {
                max_num_seqs: 128,
                max_num_batched_tokens: 4096,
                ..options
            },
        }
    }

    /// Whether this build serves on such a processor, with what else is asked for.
    pub(super) fn check_compute(&self) -> Result<()> {
        let known = self.compute.check();
        known.map_err(|error| Error::Options(error.to_string()))?;
        match (self.compute, self.quantization) {
            (Compute::Cuda(_), Some(_)) => Err(Error::Options(
                "a model is not quantized on a GPU; leave quantization out, or serve on the CPU"
                    .into(),
            )),
            _ => Ok(()),
        }
    }

    /// What is spent on keys and values for this decoder.
    fn kv_cache_bytes(&self, decoder: &Decoder, adapter_numbers: u64) -> Result<u64> {
        if let Some(bytes) = self.kv_cache_bytes {
            return Ok(bytes);
        }
        let Some(gpu) = decoder.gpu_memory() else {
            return Ok(KV_CACHE_BYTES_ON_CPU);
        };
        let left = gpu.available_bytes.saturating_sub(gpu.held_bytes);
        let planned = (left as f64 * SHARE_OF_GPU) as u64;
        let adapters = adapter_numbers * decoder.dtype().size_in_bytes() as u64;
        let work = self.working_bytes(decoder) + adapters;
        planned.checked_sub(work).ok_or_else(|| {
            Error::Options(format!(
                "beside the model the GPU has {} MiB left, and a step takes {} MiB; lower max_num_batched_tokens, or \
                 take a larger GPU",
                left >> 20,
                work >> 20
            ))
        })
    }

    /// What a step takes beside weights, keys and values: the widest layer of the largest batch, the parts of its
    /// attention, and logits.
    fn working_bytes(&self, decoder: &Decoder) -> u64 {
        let (config, number) = (decoder.config(), decoder.dtype().size_in_bytes());
        let stream = 4 * config.hidden_size;
        let attention = 2 * config.q_dim() + 2 * config.kv_dim();
        let mlp = 3 * config.intermediate_size;
        let row = (stream + attention.max(mlp)) * number + 4 * config.q_dim();
        let logits = 2 * LOGIT_ROWS_ON_GPU * config.vocab_size * 4; // and a copy of those that the host asks for
        (self.max_num_batched_tokens as usize * row + logits) as u64
    }

    /// The longest context that model and memory allow, or the one asked for.
    /// `adapter_numbers` are those of all adapters together, which a GPU holds too.
    pub(super) fn plan_cache(&self, decoder: &Decoder, adapter_numbers: u64) -> Result<CachePlan> {
        let (config, dtype) = (decoder.config(), decoder.dtype());
        let bytes = self.kv_cache_bytes(decoder, adapter_numbers)?;
        if self.block_size == 0 {
            return Err(Error::Options("block_size must be at least 1".into()));
        }
        let made_for = u32::try_from(config.max_len()).unwrap_or(u32::MAX);
        let block_bytes = KvPages::bytes_per_block(config, self.block_size as usize, dtype);
        let affordable = u32::try_from(bytes / block_bytes).unwrap_or(u32::MAX);
        let held = affordable.saturating_mul(self.block_size);
        let max_model_len = match self.max_model_len {
            Some(0) => return Err(Error::Options("max_model_len must be at least 1".into())),
            Some(asked) if asked > made_for => {
                let message = format!("max_model_len {asked} is more than the model's {made_for}");
                return Err(Error::Options(message));
            }
            Some(asked) if asked > held => {
                let needed = u64::from(asked.div_ceil(self.block_size)) * block_bytes;
                return Err(Error::Options(format!(
                    "max_model_len {asked} needs {needed} bytes of KV cache; raise \
                     kv_cache_bytes or lower max_model_len"
                )));
            }
            Some(asked) => asked,
            None if held == 0 => {
                let message = format!("kv_cache_bytes must be at least {block_bytes}, one block");
                return Err(Error::Options(message));
            }
            None => made_for.min(held),
        };
        // More than every sequence at full length would never be used.
        let whole = u64::from(max_model_len.div_ceil(self.block_size));
        let useful = whole.saturating_mul(self.max_num_seqs as u64);
        let num_blocks = affordable.min(u32::try_from(useful).unwrap_or(u32::MAX));
        Ok(CachePlan {
            max_model_len,
            num_blocks,
        })
    }

    pub(super) fn scheduler(&self, num_blocks: u32) -> SchedulerConfig {
        SchedulerConfig {
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            num_blocks,
            block_size: self.block_size,
            max_queued_requests: self.max_queued_requests,
            max_queued_tokens: self.max_queued_tokens,
        }
    }
}
