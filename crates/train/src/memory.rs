//! Whether a run will fit into memory, asked before anything is loaded; and what it took.

use std::path::Path;

use updraft_kernels::Threads;
use updraft_model::memory::{MemoryEstimate, MicroBatch, Working};
use updraft_model::{LoraConfig, ModelConfig};

use crate::config::OptimizerKind;
use crate::plan::Batching;
use crate::source::ExamplePlan;
use crate::{Error, Result, TrainConfig};

/// What a run takes at its largest micro-batch: see [`MemoryEstimate`] for the formula.
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
    let work = Working {
        weights: config.dtype(),
        activations: config.activations(),
        num_threads: threads.num_threads(),
        optimizer_moments: match config.optim {
            OptimizerKind::Sgd => 0,
            OptimizerKind::AdamwTorch | OptimizerKind::Adamw8bit => 2,
        },
        kept_adapters: u64::from(config.load_best_model_at_end),
    };
    MemoryEstimate::new(
        model,
        lora,
        largest_micro_batch(data, config.batching()),
        work,
    )
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
    let estimate = |config: &TrainConfig| estimate_memory(model, lora, data, config, threads);
    match free_memory() {
        Some(free) if !config.ignore_memory_estimate => compare(estimate, config, free),
        _ => Ok(estimate(config)),
    }
}

fn compare(
    estimate: impl Fn(&TrainConfig) -> MemoryEstimate,
    config: &TrainConfig,
    free_bytes: u64,
) -> Result<MemoryEstimate> {
    let whole = estimate(config);
    if whole.total() <= free_bytes {
        return Ok(whole);
    }
    let fits = |rows: u32| {
        let config = TrainConfig {
            per_device_train_batch_size: rows,
            ..config.clone()
        };
        estimate(&config).total() <= free_bytes
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
    Err(Error::OutOfMemory {
        estimate_bytes: whole.total(),
        free_bytes,
        largest_batch_size: (fitting > 0).then_some(fitting),
    })
}

fn largest_micro_batch(data: &ExamplePlan, batching: Batching) -> MicroBatch {
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
        let largest = |config: TrainConfig| largest_micro_batch(&plan, config.batching());
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

    #[test]
    fn what_does_not_fit_says_what_would() {
        let whole = estimate(&config(16)).total();
        for rows in [1, 7, 15] {
            let free = estimate(&config(rows)).total();
            let error = compare(estimate, &config(16), free).expect_err("too much");
            let Error::OutOfMemory {
                estimate_bytes,
                free_bytes,
                largest_batch_size,
            } = error
            else {
                panic!("{error}");
            };
            assert_eq!((estimate_bytes, free_bytes), (whole, free));
            assert_eq!(largest_batch_size, Some(rows));
        }
        let error = compare(estimate, &config(16), 1 << 10).expect_err("too much");
        let message = error.to_string();
        assert!(message.contains("not even one row fits"), "{message}");
        assert!(compare(estimate, &config(16), whole).is_ok());
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
