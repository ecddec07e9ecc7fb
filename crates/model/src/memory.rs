//! What training an adapter takes in memory, told from configurations before anything is loaded.

use candle_core::DType;

use crate::config::{ModelConfig, Projection};
use crate::lora::{LoraConfig, SavedModules};
use crate::training::Activations;

const F32_BYTES: u64 = 4;
/// Rows of logits that exist at once, at most, and their numbers, at most but for one row.
const MOST_LOGIT_ROWS: u64 = 512;
const MOST_LOGITS: u64 = 16 << 20;
const LEAST_LOGIT_ROWS: u64 = 64;

/// A micro-batch, by its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MicroBatch {
    /// Tokens, padding-free.
    pub tokens: u64,
    /// Tokens that count towards the loss.
    pub trained_tokens: u64,
}

/// How a step computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Working {
    /// What the decoder is loaded as: with [`DType::BF16`] the weights take half.
    pub weights: DType,
    /// What is kept of the forward pass.
    pub activations: Activations,
    /// Threads that share a micro-batch; each has its own gradients and logits.
    pub num_threads: usize,
    /// Numbers the optimizer keeps for each parameter: two for AdamW.
    pub optimizer_moments: u64,
    /// Adapters that are kept beside the one in training: the best so far.
    pub kept_adapters: u64,
}

/// The bytes a training step takes on the CPU, by what takes them.
///
/// With `T` tokens in the micro-batch, `N` of them trained, `L` layers, `P` numbers in the adapter,
/// `j` threads, and `q = H·D`, `kv = H_kv·D`:
///
/// ```text
/// weights      4 · numbers of the model, a tied head once; 2 in bf16
/// adapter      4 · P · (1 + kept adapters)
/// gradients    4 · P · j
/// optimizer    4 · P · moments
/// activations  4 · T · (kept + working) + 4 · 3·N·C + 4 · logits · j
///   layer      4C + 2q + 2kv + 2I + H + 2 + ΣR    (Qwen3: + q + kv + H + H_kv)
///   kept       L · layer, or L · C when activations are recomputed
///   working    3C + 2I + q, and one layer more when activations are recomputed
///   logits     V · min(512, 16 Mi / V rows but at least 64, N)
/// checkpoint   4 · P · (1 + the most of moments and 2); instead of activations
/// export       4 · numbers of the model, and 8 · P; instead of all but the adapter
/// ```
///
/// A checkpoint that is read holds a second adapter and one file of it; one that is written goes out
/// in pieces that are less than that, or than 80 MiB, whichever is less.
///
/// The export comes when training has let go: a decoder in f32, however it was trained, reads back
/// what was written, adapter and merged model one after the other. Merging holds one file.
///
/// The file the weights come from is mapped: its pages are the system's to take back and are not
/// counted. Nor is what the process takes besides: code, data, allocator slack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// The frozen weights.
    pub weights: u64,
    /// The adapter's parameters.
    pub adapter: u64,
    /// Their gradients, one set for each thread.
    pub gradients: u64,
    /// The optimizer's moments.
    pub optimizer: u64,
    /// What a micro-batch leaves for the backward pass, and works with.
    pub activations: u64,
    /// Reading a checkpoint, or writing one, when no micro-batch is under way.
    pub checkpoint: u64,
    /// Reading back what the run wrote, when everything but the adapter is gone.
    pub export: u64,
}

impl MemoryEstimate {
    /// Estimates one training step.
    pub fn new(model: &ModelConfig, lora: &LoraConfig, batch: MicroBatch, work: Working) -> Self {
        let parameters = adapter_parameters(model, lora);
        let threads = work.num_threads as u64;
        Self {
            weights: work.weights.size_in_bytes() as u64 * model.num_parameters(),
            adapter: F32_BYTES * parameters * (1 + work.kept_adapters),
            gradients: F32_BYTES * parameters * threads,
            optimizer: F32_BYTES * parameters * work.optimizer_moments,
            activations: F32_BYTES * activations(model, lora, batch, work),
            checkpoint: F32_BYTES * parameters * (1 + work.optimizer_moments.max(2)),
            export: F32_BYTES * (model.num_parameters() + parameters),
        }
    }

    /// The most that exists at once: all that training takes, or the export.
    pub fn total(&self) -> u64 {
        let passing = self.activations.max(self.checkpoint);
        let training = self.weights + self.gradients + self.optimizer + passing;
        self.adapter + training.max(self.export)
    }
}

/// How many numbers an adapter of these settings holds.
pub fn adapter_parameters(model: &ModelConfig, lora: &LoraConfig) -> u64 {
    let pair = |(projection, layer)| {
        let (d_in, d_out) = model.projection_dims(projection);
        (lora.rank(projection, layer) * (d_in + d_out)) as u64
    };
    let pairs: u64 = adapted(model, lora).map(pair).sum();
    // What cannot be saved is refused when the adapter is made.
    let saved = SavedModules::new(lora, model).unwrap_or_default();
    pairs + saved.num_parameters()
}

fn activations(model: &ModelConfig, lora: &LoraConfig, batch: MicroBatch, work: Working) -> u64 {
    let (hidden, inner) = (model.hidden_size as u64, model.intermediate_size as u64);
    let (q, kv) = (model.q_dim() as u64, model.kv_dim() as u64);
    let heads = model.num_attention_heads as u64;
    let layers = model.num_hidden_layers as u64;
    let head_norms = if model.qk_norm {
        q + kv + heads + model.num_key_value_heads as u64
    } else {
        0
    };
    let ranks: u64 = adapted(model, lora)
        .map(|(projection, layer)| lora.rank(projection, layer) as u64)
        .sum();
    let layer = 4 * hidden + 2 * q + 2 * kv + 2 * inner + heads + 2 + head_norms;
    let working = 3 * hidden + 2 * inner + q;
    let per_token = match work.activations {
        Activations::Stored => layers * layer + ranks + working,
        Activations::Recomputed => layers * hidden + layer + ranks / layers.max(1) + working,
    };
    let vocab = model.vocab_size as u64;
    let rows = (MOST_LOGITS / vocab.max(1)).clamp(LEAST_LOGIT_ROWS, MOST_LOGIT_ROWS);
    let logits = vocab * rows.min(batch.trained_tokens) * work.num_threads as u64;
    batch.tokens * per_token + batch.trained_tokens * 3 * hidden + logits
}

fn adapted<'a>(
    model: &ModelConfig,
    lora: &'a LoraConfig,
) -> impl Iterator<Item = (Projection, usize)> + use<'a> {
    (0..model.num_hidden_layers)
        .flat_map(|layer| Projection::ALL.map(|projection| (projection, layer)))
        .filter(|&(projection, layer)| lora.targets(projection, layer))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::Adapter;
    use crate::{Architecture, tiny};
    use candle_core::Device;

    fn working(activations: Activations) -> Working {
        Working {
            weights: DType::F32,
            activations,
            num_threads: 2,
            optimizer_moments: 2,
            kept_adapters: 0,
        }
    }

    #[test]
    fn parameters_are_counted_as_an_adapter_lays_them_out() {
        for architecture in [
            Architecture::Qwen2,
            Architecture::Qwen3,
            Architecture::Llama,
        ] {
            let model = tiny::config(architecture);
            let lora = LoraConfig {
                rank_pattern: [("layers.1.mlp.up_proj".to_owned(), 3)].into(),
                ..LoraConfig::default()
            };
            let adapter = Adapter::init(&lora, &model, 1, &Device::Cpu).expect("valid");
            let counted = adapter_parameters(&model, &lora);
            assert_eq!(counted, adapter.num_parameters() as u64);
            let batch = MicroBatch {
                tokens: 64,
                trained_tokens: 32,
            };
            let estimate = MemoryEstimate::new(&model, &lora, batch, working(Activations::Stored));
            assert_eq!(estimate.gradients, 2 * estimate.adapter);
            assert_eq!(estimate.optimizer, 2 * estimate.adapter);
        }
    }

    /// Where every weight is trained, a short batch takes less than a checkpoint being read.
    #[test]
    fn a_checkpoint_counts_where_it_takes_more_than_a_micro_batch() {
        let model = tiny::config(Architecture::Qwen2);
        let batch = MicroBatch {
            tokens: 2,
            trained_tokens: 1,
        };
        let kept = |kept_adapters| Working {
            num_threads: 1,
            kept_adapters,
            ..working(Activations::Recomputed)
        };
        let full = LoraConfig::full_fine_tuning();
        let estimate =
            |kept_adapters| MemoryEstimate::new(&model, &full, batch, kept(kept_adapters));
        let parameters = adapter_parameters(&model, &full);
        let one = estimate(0);
        assert_eq!(one.checkpoint, 12 * parameters);
        assert!(one.activations < one.checkpoint);
        // Weights and adapter, gradients, two moments, and the checkpoint.
        assert_eq!(one.total(), 4 * (model.num_parameters() + 7 * parameters));
        assert_eq!(estimate(1).total(), one.total() + 4 * parameters);
    }

    /// Qwen2.5-0.5B: 494,032,768 numbers, 8,798,208 in a rank-16 adapter of all projections.
    #[test]
    fn a_real_model_takes_what_its_arithmetic_says() {
        let model = ModelConfig::from_json(
            br#"{"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "vocab_size": 151936, "tie_word_embeddings": true}"#,
        )
        .expect("a configuration");
        let lora = LoraConfig::default();
        let batch = MicroBatch {
            tokens: 4096,
            trained_tokens: 3072,
        };
        let stored = MemoryEstimate::new(&model, &lora, batch, working(Activations::Stored));
        assert_eq!(stored.weights, 4 * 494_032_768);
        assert_eq!(stored.adapter, 4 * 8_798_208);
        let layer = 4 * 896 + 2 * 896 + 2 * 128 + 2 * 4864 + 14 + 2 + 7 * 16;
        let working_numbers = 3 * 896 + 2 * 4864 + 896;
        let logits = 151_936 * 110 * 2; // 16 Mi / V = 110 rows
        let expected = 4096 * (24 * layer + working_numbers) + 3072 * 3 * 896 + logits;
        assert_eq!(stored.activations, 4 * expected);
        let recomputed =
            MemoryEstimate::new(&model, &lora, batch, working(Activations::Recomputed));
        assert!(recomputed.activations * 4 < stored.activations);
        // In bf16 a short batch takes less than the decoder that checks the result.
        let short = MicroBatch {
            tokens: 64,
            trained_tokens: 32,
        };
        let bf16 = Working {
            weights: DType::BF16,
            num_threads: 1,
            ..working(Activations::Recomputed)
        };
        let short = MemoryEstimate::new(&model, &lora, short, bf16);
        assert_eq!(short.total(), 4 * (494_032_768 + 2 * 8_798_208));
        assert!(stored.total() > short.total());
    }
}
