//! Whether a run will fit into memory, asked before anything is loaded; and what it took.

use std::path::Path;

use updraft_kernels::Threads;
use updraft_model::memory::{MemoryEstimate, MicroBatch, Processor, Working, largest_micro_batch};
use updraft_model::{Decoder, LoraConfig, ModelConfig};

use crate::config::OptimizerKind;
use crate::plan::Batching;
use crate::source::ExamplePlan;
use crate::{Error, Result, TrainConfig};

/// What a run takes at its largest micro-batch on the CPU: see [`MemoryEstimate`] for the formula.
///
/// The largest micro-batch is taken to hold the longest examples all together, or full rows, which
/// no order of the data exceeds.
pub fn estimate_memory(
    model: &ModelConfig,
    lora: &LoraConfig,
    data: &ExamplePlan,
    config: &TrainConfig,
    threads: &Threads,
) -> MemoryEstimate {
    Run::on_cpu(model, lora, data, threads).estimate(config)
}

/// [`estimate_memory`] on a GPU: what the run takes of its memory.
pub fn estimate_gpu_memory(
    model: &ModelConfig,
    lora: &LoraConfig,
    data: &ExamplePlan,
    config: &TrainConfig,
) -> MemoryEstimate {
    Run::on_gpu(model, lora, data).estimate(config)
}

/// Refuses a run that takes more memory than is free, unless
/// [`ignore_memory_estimate`](TrainConfig::ignore_memory_estimate) is set. Where the system does
/// not say what is free, every run passes.
///
/// # Errors
/// [`Error::OutOfMemory`] with the estimate, what is free, and the largest micro-batch that fits.
pub fn check_memory(
    model: &ModelConfig,
    lora: &LoraConfig,
    data: &ExamplePlan,
    config: &TrainConfig,
    threads: &Threads,
) -> Result<MemoryEstimate> {
    Run::on_cpu(model, lora, data, threads).check(config, free_memory())
}

/// [`check_memory`] on a GPU, before the model is loaded there; the host's memory is not looked at.
///
/// # Errors
/// As [`check_memory`]; [`Error::Model`] when the driver fails.
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
pub fn check_gpu_memory(
    model: &ModelConfig,
    lora: &LoraConfig,
    data: &ExamplePlan,
    config: &TrainConfig,
    gpu: &updraft_model::Gpu,
) -> Result<MemoryEstimate> {
    let available = gpu.available_bytes().map_err(updraft_model::Error::from)?;
    Run::on_gpu(model, lora, data).check(config, Some(available))
}

/// What an allocation that failed on a GPU in the middle of a run says to whoever started it.
pub(crate) fn out_of_gpu_memory(
    decoder: &Decoder,
    lora: &LoraConfig,
    data: &ExamplePlan,
    config: &TrainConfig,
    asked_bytes: usize,
) -> Error {
    let run = Run::on_gpu(decoder.config(), lora, data);
    let estimate_bytes = run.estimate(config).total();
    let available_bytes = decoder
        .gpu_memory()
        .map_or(estimate_bytes, |memory| memory.available_bytes);
    // Where the estimate said that it fits, something else took what is missing: a tenth less may do.
    let fitting = available_bytes.min(estimate_bytes / 10 * 9);
    Error::GpuOutOfMemory {
        asked_bytes,
        estimate_bytes,
        available_bytes,
        fits: run.largest(config, fitting),
    }
}

/// What decides how much memory a run takes, but for its settings.
#[derive(Debug, Clone, Copy)]
struct Run<'a> {
    model: &'a ModelConfig,
    lora: &'a LoraConfig,
    data: &'a ExamplePlan,
    processor: Processor,
}

impl<'a> Run<'a> {
    fn on_cpu(
        model: &'a ModelConfig,
        lora: &'a LoraConfig,
        data: &'a ExamplePlan,
        threads: &Threads,
    ) -> Self {
        let num_threads = threads.num_threads();
        Self {
            model,
            lora,
            data,
            processor: Processor::Cpu { num_threads },
        }
    }

    fn on_gpu(model: &'a ModelConfig, lora: &'a LoraConfig, data: &'a ExamplePlan) -> Self {
        Self {
            model,
            lora,
            data,
            processor: Processor::Gpu,
        }
    }

    fn working(&self, config: &TrainConfig) -> Working {
        Working {
            weights: config.dtype(),
            activations: config.activations(),
            processor: self.processor,
            optimizer_moments: match config.optim {
                OptimizerKind::Sgd => 0,
                OptimizerKind::AdamwTorch | OptimizerKind::Adamw8bit => 2,
            },
            kept_adapters: u64::from(config.load_best_model_at_end),
        }
    }

    fn estimate(&self, config: &TrainConfig) -> MemoryEstimate {
        let batch = largest_of(self.data, config.batching());
        MemoryEstimate::new(self.model, self.lora, batch, self.working(config))
    }

    fn check(&self, config: &TrainConfig, free: Option<u64>) -> Result<MemoryEstimate> {
        let whole = self.estimate(config);
        match free {
            Some(free_bytes) if whole.total() > free_bytes && !config.ignore_memory_estimate => {
                Err(Error::OutOfMemory {
                    estimate_bytes: whole.total(),
                    free_bytes,
                    fits: self.largest(config, free_bytes),
                })
            }
            _ => Ok(whole),
        }
    }

    /// The largest micro-batch with which the run takes no more than `bytes`.
    fn largest(&self, config: &TrainConfig, bytes: u64) -> LargestMicroBatch {
        let fits = |rows: u32| {
            let config = TrainConfig {
                per_device_train_batch_size: rows,
                ..config.clone()
            };
            self.estimate(&config).total() <= bytes
        };
        // The estimate grows with the rows: halve the range in which the last fitting one lies.
        let (mut fitting, mut too_many) = (0, config.per_device_train_batch_size);
        while too_many - fitting > 1 {
            let middle = fitting + (too_many - fitting) / 2;
            if fits(middle) {
                fitting = middle;
            } else {
                too_many = middle;
            }
        }
        LargestMicroBatch {
            batch_size: (fitting > 0).then_some(fitting),
            tokens: largest_micro_batch(self.model, self.lora, self.working(config), bytes),
        }
    }
}

/// The largest micro-batch that fits into what there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LargestMicroBatch {
    /// The largest `per_device_train_batch_size`, if one row of this data fits.
    pub batch_size: Option<u32>,
    /// The most tokens, whatever they are divided into and all of them trained; `None` where one is too many.
    pub tokens: Option<u64>,
}

impl std::fmt::Display for LargestMicroBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const OTHERWISE: &str = "try gradient_checkpointing or bf16";
        match (self.batch_size, self.tokens) {
            (Some(size), None) => write!(f, "per_device_train_batch_size {size} fits"),
            (Some(size), Some(tokens)) => write!(
                f,
                "per_device_train_batch_size {size} fits, and any micro-batch of {tokens} tokens"
            ),
            (None, Some(tokens)) => write!(
                f,
                "not even one row fits, only micro-batches of {tokens} tokens: lower max_seq_len, {OTHERWISE}"
            ),
            (None, None) => write!(f, "not even one token fits, {OTHERWISE}"),
        }
    }
}

fn largest_of(data: &ExamplePlan, batching: Batching) -> MicroBatch {
    let all = |counts: &[u32]| counts.iter().map(|&count| u64::from(count)).sum::<u64>();
    let largest = |counts: &[u32], rows| {
        let mut counts = counts.to_vec();
        counts.sort_unstable();
        all(&counts[counts.len().saturating_sub(rows)..])
    };
    let trained = all(&data.trained_tokens);
    match batching {
        Batching::Examples { batch_size } => MicroBatch {
            tokens: largest(&data.lengths, batch_size),
            trained_tokens: largest(&data.trained_tokens, batch_size),
        },
        Batching::Packed {
            rows, max_seq_len, ..
        } => {
            let tokens = (rows as u64 * u64::from(max_seq_len)).min(all(&data.lengths));
            MicroBatch {
                tokens,
                trained_tokens: tokens.min(trained),
            }
        }
    }
}

/// Bytes this process may still take, where the system tells (Linux): what the machine has
/// available, or what is left of the container's limit, whichever is less.
pub fn free_memory() -> Option<u64> {
    let available = kib_of("/proc/meminfo", "MemAvailable:")?;
    Some(container_rest().map_or(available, |rest| rest.min(available)))
}

/// The most bytes this process has held at once so far, mapped files included, where the system
/// tells (Linux).
pub fn peak_memory() -> Option<u64> {
    kib_of("/proc/self/status", "VmHWM:")
}

/// What is left of a limit of control groups, version 2 or 1.
fn container_rest() -> Option<u64> {
    let folder = Path::new("/sys/fs/cgroup");
    rest_of(folder, ["memory.max", "memory.current"], "").or_else(|| {
        let files = ["memory.limit_in_bytes", "memory.usage_in_bytes"];
        rest_of(&folder.join("memory"), files, "total_")
    })
}

/// What is left of a control group's limit. Pages of files count as used, but the system takes them
/// back before anything is refused, unless they have yet to be written.
fn rest_of(folder: &Path, [limit, used]: [&str; 2], prefix: &str) -> Option<u64> {
    let read = |name: &str| {
        let text = std::fs::read_to_string(folder.join(name)).ok()?;
        text.trim().parse::<u64>().ok() // "max" is no limit.
    };
    let (limit, used) = (read(limit)?, read(used)?);
    let stat = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let of = |names: [&str; 2]| {
        let lines = stat.lines().filter_map(|line| line.split_once(' '));
        let own = lines.filter(|(name, _)| {
            let name = name.strip_prefix(prefix);
            name.is_some_and(|name| names.contains(&name))
        });
        own.filter_map(|(_, bytes)| bytes.trim().parse::<u64>().ok())
            .sum::<u64>()
    };
    let unwritten = match prefix {
        "" => of(["file_dirty", "file_writeback"]),
        _ => of(["dirty", "writeback"]),
    };
    let reclaimable = of(["inactive_file", "active_file"]).saturating_sub(unwritten);
    Some(limit.saturating_sub(used.saturating_sub(reclaimable)))
}

fn kib_of(file: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ExampleSource;
    use crate::MemorySource;
    use crate::testing::example;
    use updraft_model::{Architecture, tiny};

    fn config(rows: u32) -> TrainConfig {
        TrainConfig {
            per_device_train_batch_size: rows,
            ..Default::default()
        }
    }

    fn estimate(config: &TrainConfig) -> MemoryEstimate {
        let source = MemorySource::new("memory", (20..60).map(example).collect());
        let model = tiny::config(Architecture::Qwen2);
        let (lora, threads) = (LoraConfig::default(), Threads::single());
        estimate_memory(&model, &lora, source.plan(), config, &threads)
    }

    #[test]
    fn the_largest_micro_batch_holds_the_longest_examples_or_full_rows() {
        let plan = ExamplePlan {
            id: "plan".to_owned(),
            lengths: vec![10, 50, 30, 40],
            trained_tokens: vec![1, 20, 5, 30],
        };
        let largest = |config: TrainConfig| largest_of(&plan, config.batching());
        let batch = |tokens, trained_tokens| MicroBatch {
            tokens,
            trained_tokens,
        };
        assert_eq!(largest(config(2)), batch(90, 50));
        assert_eq!(largest(config(9)), batch(130, 56));
        let packed = |rows| TrainConfig {
            packing: true,
            max_seq_len: 64,
            ..config(rows)
        };
        assert_eq!(largest(packed(1)), batch(64, 56));
        assert_eq!(largest(packed(3)), batch(130, 56));
    }

    /// What a run over this data says with so much free.
    fn checked(rows: u32, free_bytes: u64) -> Result<MemoryEstimate> {
        let source = MemorySource::new("memory", (20..60).map(example).collect());
        let model = tiny::config(Architecture::Qwen2);
        let (lora, threads) = (LoraConfig::default(), Threads::single());
        let run = Run::on_cpu(&model, &lora, source.plan(), &threads);
        run.check(&config(rows), Some(free_bytes))
    }

    #[test]
    fn what_does_not_fit_says_what_would() {
        let whole = estimate(&config(16)).total();
        for rows in [1, 7, 15] {
            let free = estimate(&config(rows)).total();
            let error = checked(16, free).expect_err("too much");
            let Error::OutOfMemory {
                estimate_bytes,
                free_bytes,
                fits,
            } = error
            else {
                panic!("{error}");
            };
            assert_eq!((estimate_bytes, free_bytes), (whole, free));
            assert_eq!(fits.batch_size, Some(rows));
            // Half of its tokens are trained, so fewer fit where all are.
            let tokens = u64::from((60 - rows..60).sum::<u32>());
            assert!(
                fits.tokens
                    .is_some_and(|fit| fit < tokens && fit > tokens / 2),
                "{fits}"
            );
        }
        let less = estimate(&config(1)).total() - 1;
        let error = checked(16, less).expect_err("too much").to_string();
        assert!(
            error.contains("not even one row fits, only micro-batches of "),
            "{error}"
        );
        let error = checked(16, 1 << 10).expect_err("too much").to_string();
        assert!(error.contains("not even one token fits"), "{error}");
        assert!(checked(16, whole).is_ok());
    }

    #[test]
    fn recomputing_and_sgd_take_less() {
        let whole = estimate(&config(16)).total();
        let recomputed = TrainConfig {
            gradient_checkpointing: true,
            ..config(16)
        };
        let sgd = TrainConfig {
            optim: OptimizerKind::Sgd,
            ..config(16)
        };
        assert!(estimate(&recomputed).total() < whole, "recomputed");
        assert_eq!(estimate(&sgd).optimizer, 0);
    }

    #[test]
    fn pages_of_files_that_can_be_taken_back_are_free() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| {
            std::fs::write(folder.path().join(name), text).expect(name);
        };
        let two = || rest_of(folder.path(), ["memory.max", "memory.current"], "");
        write("memory.current", "900\n");
        write("memory.max", "max\n");
        assert_eq!(two(), None);
        write("memory.max", "1000\n");
        assert_eq!(two(), Some(100), "without statistics");
        let stat = "anon 300\nfile 600\nfile_mapped 500\nfile_dirty 40\nfile_writeback 10\n\
                    inactive_anon 7\nactive_file 200\ninactive_file 350\n";
        write("memory.stat", stat);
        assert_eq!(two(), Some(100 + 350 + 200 - 50));
        write("memory.limit_in_bytes", "1000");
        write("memory.usage_in_bytes", "900");
        // Version 1 tells of the group alone, and under `total_` of those below it too.
        let stat =
            "active_file 1\ntotal_active_file 200\ntotal_inactive_file 350\ntotal_dirty 50\n";
        write("memory.stat", stat);
        let files = ["memory.limit_in_bytes", "memory.usage_in_bytes"];
        assert_eq!(rest_of(folder.path(), files, "total_"), Some(600));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_system_tells_what_is_free_and_what_was_taken() {
        assert!(free_memory().is_some_and(|bytes| bytes > 1 << 20));
        assert!(peak_memory().is_some_and(|bytes| bytes > 1 << 20));
    }
}
