//! What training an adapter takes in memory, told from configurations before anything is loaded.

use candle_core::DType;

use crate::config::{ModelConfig, Projection};
use crate::layers::{Group, border_width};
use crate::lora::{LoraConfig, SavedModules};
use crate::training::Activations;

const F32_BYTES: u64 = 4;
/// Rows of logits that exist at once, at most, and their numbers, at most but for one row.
const MOST_LOGIT_ROWS: u64 = 512;
const MOST_LOGITS: u64 = 16 << 20;
const LEAST_LOGIT_ROWS: u64 = 64;
/// Logits that exist at once on a GPU, at most but for one row; as in `kernels::cuda::linear_cross_entropy`.
const MOST_GPU_LOGITS: u64 = 1 << 28;

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
    /// Where it computes.
    pub processor: Processor,
    /// Numbers the optimizer keeps for each parameter: two for AdamW. On a GPU one that keeps any is taken to work there,
    /// over parameters in f32 of its own; one that keeps none works on the host's.
    pub optimizer_moments: u64,
    /// Adapters that are kept beside the one in training: the best so far.
    pub kept_adapters: u64,
}

/// Where a step computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processor {
    /// On the CPU, in f32.
    Cpu {
        /// Threads that share a micro-batch; each has its own gradients and logits.
        num_threads: usize,
    },
    /// On a GPU, in [`Working::weights`].
    Gpu,
}

/// The bytes a training step takes, by what takes them.
///
/// On the CPU, with `T` tokens in the micro-batch, `N` of them trained, `L` layers, `P` numbers in the adapter,
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
/// On a GPU, with `e` bytes for a number of the type that it computes in, its memory is counted and the host's is not:
///
/// ```text
/// weights      e · (numbers of the model + borders), and 4 · D · positions for the rotary table
///   borders    for each group of linear maps that share their input, R·(D_in + ΣD_out + R), where R is their ΣR or up to
///              seven more; none with dropout, which leaves the adapter beside the weights
/// adapter      e · P; where an optimizer works there, 4 · P and, if e is not 4, e · P
/// gradients    4 · P
/// optimizer    4 · P · moments
/// activations  e · T · (kept + working) + e · 4·N·C + e · logits, with 4 bytes for a log-sum-exp or root, label or loss,
///              and ΣR for each layer once more in kept and in working;
///              at least 4 · P, while the adapter is on its way or the gradients of workers are added up, and e · the
///              numbers of a group while its border is made
///   logits     V · min(2²⁸ / V rows, N)
/// ```
///
/// The file the weights come from is mapped: its pages are the system's to take back and are not
/// counted. Nor is what the process takes besides: code, data, allocator slack, a GPU's driver and cuBLAS.
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
        let number = work.weights.size_in_bytes() as u64;
        let num_threads = match work.processor {
            Processor::Gpu => return Self::on_gpu(model, lora, batch, work),
            Processor::Cpu { num_threads } => num_threads as u64,
        };
        Self {
            weights: number * model.num_parameters(),
            adapter: F32_BYTES * parameters * (1 + work.kept_adapters),
            gradients: F32_BYTES * parameters * num_threads,
            optimizer: F32_BYTES * parameters * work.optimizer_moments,
            activations: activations(model, lora, batch, work),
            checkpoint: F32_BYTES * parameters * (1 + work.optimizer_moments.max(2)),
            export: F32_BYTES * (model.num_parameters() + parameters),
        }
    }

    fn on_gpu(model: &ModelConfig, lora: &LoraConfig, batch: MicroBatch, work: Working) -> Self {
        let parameters = adapter_parameters(model, lora);
        let number = work.weights.size_in_bytes() as u64;
        let table = F32_BYTES * (model.head_dim * model.max_len()) as u64;
        let (mut borders, mut largest) = (0, 0);
        for layer in 0..model.num_hidden_layers {
            for (group, ranks) in Group::ALL.into_iter().zip(group_ranks(lora, layer)) {
                if ranks > 0 && lora.lora_dropout == 0.0 {
                    let (d_in, d_out) = group_dims(model, group);
                    let width = border_width(ranks) as u64;
                    borders += width * (d_in + d_out + width);
                    largest = largest.max(d_in * d_out);
                }
            }
        }
        let adapter = match work.optimizer_moments {
            0 => number,
            _ if number == F32_BYTES => F32_BYTES,
            _ => F32_BYTES + number,
        };
        Self {
            weights: number * (model.num_parameters() + borders) + table,
            adapter: adapter * parameters,
            gradients: F32_BYTES * parameters,
            optimizer: F32_BYTES * parameters * work.optimizer_moments,
            activations: activations(model, lora, batch, work)
                .max(F32_BYTES * parameters)
                .max(number * largest),
            checkpoint: 0,
            export: 0,
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

/// The most tokens that a micro-batch can have, all of them trained, for training to take no more than `bytes`; `None`
/// where one is too many.
pub fn largest_micro_batch(
    model: &ModelConfig,
    lora: &LoraConfig,
    work: Working,
    bytes: u64,
) -> Option<u64> {
    let fits = |tokens: u64| {
        let batch = MicroBatch {
            tokens,
            trained_tokens: tokens,
        };
        MemoryEstimate::new(model, lora, batch, work).total() <= bytes
    };
    // The estimate grows with the tokens: find a range in which the last fitting number lies, then halve it.
    let mut too_many = 1;
    while fits(too_many) && too_many < 1 << 40 {
        too_many *= 2;
    }
    let mut fitting = too_many / 2;
    while too_many - fitting > 1 {
        let middle = fitting + (too_many - fitting) / 2;
        if fits(middle) {
            fitting = middle;
        } else {
            too_many = middle;
        }
    }
    (fitting > 0).then_some(fitting)
}

/// Bytes that a micro-batch leaves and works with.
fn activations(model: &ModelConfig, lora: &LoraConfig, batch: MicroBatch, work: Working) -> u64 {
    let (hidden, inner) = (model.hidden_size as u64, model.intermediate_size as u64);
    let (q, kv) = (model.q_dim() as u64, model.kv_dim() as u64);
    let heads = model.num_attention_heads as u64;
    let layers = model.num_hidden_layers as u64;
    let (head_norms, head_roots) = if model.qk_norm {
        (q + kv, heads + model.num_key_value_heads as u64)
    } else {
        (0, 0)
    };
    // What adapters add to a token's numbers in each layer: kept, and worked with.
    let low = (0..model.num_hidden_layers).map(|layer| {
        let [qkv, o, gate_up, down] = group_ranks(lora, layer);
        let bordered = work.processor == Processor::Gpu && lora.lora_dropout == 0.0;
        if !bordered {
            return ((qkv + o + gate_up + down) as u64, 0);
        }
        let [qkv, o, gate_up, low] = [qkv, o, gate_up, down].map(border_width);
        // Behind gate and up lie their own low-rank products and later their gradients'; those of down alone are copied.
        let kept = qkv + o + 2 * gate_up + down;
        (kept as u64, (qkv + low + low.max(o)) as u64)
    });
    let low: Vec<(u64, u64)> = low.collect();
    let ranks: u64 = low.iter().map(|&(kept, _)| kept).sum();
    let (one_ranks, working_ranks) = low.iter().fold((0, 0), |most, &(kept, working)| {
        (kept.max(most.0), working.max(most.1))
    });
    // In the type of the activations, and in f32 wherever it runs: log-sum-exps and roots of norms.
    let layer = 4 * hidden + 2 * q + 2 * kv + 2 * inner + head_norms;
    let layer_wide = heads + 2 + head_roots;
    let working = 3 * hidden + 2 * inner + q + working_ranks;
    let (per_token, wide_per_token) = match work.activations {
        Activations::Stored => (layers * layer + ranks + working, layers * layer_wide),
        Activations::Recomputed => (layers * hidden + layer + one_ranks + working, layer_wide),
    };
    let vocab = (model.vocab_size as u64).max(1);
    let trained = batch.trained_tokens;
    match work.processor {
        Processor::Cpu { num_threads } => {
            let rows = (MOST_LOGITS / vocab).clamp(LEAST_LOGIT_ROWS, MOST_LOGIT_ROWS);
            let logits = vocab * rows.min(trained) * num_threads as u64;
            let per_token = per_token + wide_per_token;
            F32_BYTES * (batch.tokens * per_token + trained * 3 * hidden + logits)
        }
        Processor::Gpu => {
            let logits = vocab * (MOST_GPU_LOGITS / vocab).max(1).min(trained);
            let numbers = batch.tokens * per_token + trained * 4 * hidden + logits;
            // Positions, ids and rows; the delta of attention's backward pass; labels and losses.
            let wide = batch.tokens * (wide_per_token + heads + 2) + trained * 4;
            work.weights.size_in_bytes() as u64 * numbers + F32_BYTES * wide
        }
    }
}

/// The ranks of the maps of each group together.
fn group_ranks(lora: &LoraConfig, layer: usize) -> [usize; 4] {
    Group::ALL.map(|group| {
        let projections = group.projections().iter().copied();
        let adapted = projections.filter(|&projection| lora.targets(projection, layer));
        adapted.map(|projection| lora.rank(projection, layer)).sum()
    })
}

/// Numbers in a row of what a group of maps takes and makes.
fn group_dims(model: &ModelConfig, group: Group) -> (u64, u64) {
    let dims = group
        .projections()
        .iter()
        .map(|&p| model.projection_dims(p));
    dims.fold((0, 0), |(_, sum), (d_in, d_out)| {
        (d_in as u64, sum + d_out as u64)
    })
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
            processor: Processor::Cpu { num_threads: 2 },
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
            processor: Processor::Cpu { num_threads: 1 },
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
    fn half_a_billion() -> ModelConfig {
        let config = br#"{"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "vocab_size": 151936, "tie_word_embeddings": true, "max_position_embeddings": 32768}"#;
        ModelConfig::from_json(config).expect("a configuration")
    }

    #[test]
    fn the_largest_micro_batch_fits_and_one_token_more_does_not() {
        let (model, lora) = (half_a_billion(), LoraConfig::default());
        let gpu = Working {
            weights: DType::BF16,
            processor: Processor::Gpu,
            ..working(Activations::Stored)
        };
        let recomputed = Working {
            activations: Activations::Recomputed,
            ..gpu
        };
        let total = |tokens, work| {
            let batch = MicroBatch {
                tokens,
                trained_tokens: tokens,
            };
            MemoryEstimate::new(&model, &lora, batch, work).total()
        };
        let mut found = Vec::new();
        for work in [working(Activations::Stored), gpu, recomputed] {
            let bytes = 16_000_000_000;
            let tokens = largest_micro_batch(&model, &lora, work, bytes).expect("many");
            assert!(total(tokens, work) <= bytes && total(tokens + 1, work) > bytes);
            let all_but = total(1, work) - 1;
            assert_eq!(largest_micro_batch(&model, &lora, work, all_but), None);
            found.push(tokens);
        }
        // Half the bytes for a number are twice the tokens; what is not kept is many more.
        assert!(
            2 * found[0] < found[1] && 5 * found[1] < found[2],
            "{found:?}"
        );
    }

    /// The articles' settings: `training-with-big-data-on-skypilot.txt` names model and sequence length, the demo that it
    /// shows the rest: rank 16 on all projections, two rows of up to 4,096 tokens, f16 on a T4.
    #[test]
    fn the_articles_settings_take_less_than_15_gb_of_a_gpu() {
        let (model, lora) = (half_a_billion(), LoraConfig::default());
        assert_eq!(adapter_parameters(&model, &lora), 8_798_208);
        let batch = MicroBatch {
            tokens: 2 * 4096,
            trained_tokens: 2 * 4096,
        };
        let estimate = |activations| {
            let work = Working {
                weights: DType::F16,
                processor: Processor::Gpu,
                ..working(activations)
            };
            MemoryEstimate::new(&model, &lora, batch, work).total()
        };
        let stored = estimate(Activations::Stored);
        let recomputed = estimate(Activations::Recomputed);
        assert!(stored < 15_000_000_000, "{stored}");
        assert!(recomputed < 4_000_000_000, "{recomputed}");
        // By hand: weights with their borders; parameters in f32 and f16, gradients and two moments; activations of 24
        // blocks; and the logits of 1,766 rows.
        let borders = 24 * 562_944;
        let by_hand = 2 * (494_032_768 + borders)
            + 18 * 8_798_208
            + 2 * 8192 * 24 * 15_504
            + 2 * 151_936 * 1_766;
        assert!(
            stored > by_hand && stored < by_hand + by_hand / 20,
            "{stored}"
        );
    }

    #[test]
    fn a_real_model_takes_what_its_arithmetic_says() {
        let model = half_a_billion();
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
            processor: Processor::Cpu { num_threads: 1 },
            ..working(Activations::Recomputed)
        };
        let short = MemoryEstimate::new(&model, &lora, short, bf16);
        assert_eq!(short.total(), 4 * (494_032_768 + 2 * 8_798_208));
        assert!(stored.total() > short.total());
    }
}
