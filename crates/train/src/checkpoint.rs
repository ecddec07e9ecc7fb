//! Where a run stands, complete enough to continue it to the bit.

use std::collections::BTreeMap;

use bytes::Bytes;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use updraft_kernels::Threads;
use updraft_model::{Adapter, ModelConfig, peft};

use crate::metrics::{parse_log, write_log};
use crate::optim::OptimizerState;
use crate::plan::Cursor;
use crate::{EvalRecord, Result, StepRecord, TrainConfig};

const OPTIMIZER: &str = "optimizer.safetensors";
const LOSS_LOG: &str = "loss.jsonl";
const EVAL_LOG: &str = "eval.jsonl";
const BEST: &str = "best.safetensors";

/// A run between two optimizer steps.
///
/// There is no random-number state to keep: the order of the data is a function
/// of (seed, epoch, index), so the cursor is the generator's counter.
#[derive(Debug)]
pub struct Checkpoint {
    /// What the run was and where it stands.
    pub state: RunState,
    /// The trained parameters.
    pub adapter: Adapter,
    /// The optimizer's moments.
    pub optimizer: OptimizerState,
    /// Every step so far.
    pub log: Vec<StepRecord>,
    /// Every evaluation so far.
    pub evals: Vec<EvalRecord>,
    /// The adapter of the best evaluation, where the run ends with that one.
    pub best: Option<Adapter>,
}

/// The part of a checkpoint that is not tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Where the next step begins.
    pub cursor: Cursor,
    /// Steps the optimizer has taken.
    pub optimizer_step: u64,
    /// The settings, which a resume must share.
    pub config: TrainConfig,
    /// What computed it; a resume on something else continues within tolerance
    /// instead of to the bit.
    pub machine: Machine,
}

/// What decides the last bits of a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Version of this crate.
    pub version: String,
    /// Processor architecture with the vector instructions in use.
    pub instruction_set: String,
    /// Threads the work is divided among.
    pub num_threads: usize,
}

impl Machine {
    /// This one, dividing work among `threads`.
    pub fn here(threads: &Threads) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            instruction_set: instruction_set(),
            num_threads: threads.num_threads(),
        }
    }
}

fn instruction_set() -> String {
    #[cfg(target_arch = "x86_64")]
    let vectors = [
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let vectors: [(&str, bool); 0] = [];
    let found = vectors
        .iter()
        .filter(|(_, found)| *found)
        .map(|(name, _)| *name);
    std::iter::once(std::env::consts::ARCH)
        .chain(found)
        .collect::<Vec<_>>()
        .join("+")
}

impl Checkpoint {
    /// The files of the checkpoint beside its manifest. The adapter's are
    /// PEFT's, so a checkpoint can be tried out as it lies there.
    pub(crate) fn files(&self) -> Result<Vec<(&'static str, Bytes)>> {
        let adapter = peft::write_adapter(&self.adapter)?;
        let mut files = vec![
            (peft::CONFIG_FILE, adapter.config_json.into()),
            (peft::WEIGHTS_FILE, adapter.safetensors.into()),
            (OPTIMIZER, write_moments(&self.optimizer.tensors).into()),
            (LOSS_LOG, write_log(&self.log).into()),
        ];
        if !self.evals.is_empty() {
            files.push((EVAL_LOG, write_log(&self.evals).into()));
        }
        if let Some(best) = &self.best {
            files.push((BEST, peft::write_adapter(best)?.safetensors.into()));
        }
        Ok(files)
    }

    /// Puts a checkpoint together from its files, whose hashes are checked.
    pub(crate) fn from_files(
        state: RunState,
        files: &BTreeMap<String, Bytes>,
        model: &ModelConfig,
    ) -> Result<Self, String> {
        let file = |name: &str| files.get(name).ok_or_else(|| format!("it has no {name}"));
        let broken = |name: &str, error: &dyn std::fmt::Display| format!("{name}: {error}");
        let adapter = |name| {
            peft::read_adapter(file(peft::CONFIG_FILE)?, file(name)?, model)
                .map_err(|error| broken(name, &error))
        };
        let tensors = read_moments(file(OPTIMIZER)?).map_err(|error| broken(OPTIMIZER, &error))?;
        let log = parse_log(file(LOSS_LOG)?).map_err(|error| broken(LOSS_LOG, &error))?;
        let evals = match files.get(EVAL_LOG) {
            Some(log) => parse_log(log).map_err(|error| broken(EVAL_LOG, &error))?,
            None => Vec::new(),
        };
        let best = match files.contains_key(BEST) {
            true => Some(adapter(BEST)?),
            false => None,
        };
        let optimizer = OptimizerState {
            step: state.optimizer_step,
            tensors,
        };
        Ok(Self {
            state,
            adapter: adapter(peft::WEIGHTS_FILE)?,
            optimizer,
            log,
            evals,
            best,
        })
    }
}

fn write_moments(tensors: &BTreeMap<String, Vec<f32>>) -> Vec<u8> {
    let bytes: Vec<(&String, Vec<u8>)> = tensors
        .iter()
        .map(|(name, values)| {
            (
                name,
                values
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect(),
            )
        })
        .collect();
    let views = bytes.iter().map(|(name, bytes)| {
        let view = TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes);
        (name.as_str(), view.expect("four bytes for each element"))
    });
    safetensors::serialize(views, None).expect("names are distinct and tensors sound")
}

fn read_moments(bytes: &[u8]) -> Result<BTreeMap<String, Vec<f32>>, safetensors::SafeTensorError> {
    let file = SafeTensors::deserialize(bytes)?;
    let tensors = file.iter().map(|(name, view)| {
        let (values, _) = view.data().as_chunks::<4>();
        (
            name.to_owned(),
            values
                .iter()
                .map(|&value| f32::from_le_bytes(value))
                .collect(),
        )
    });
    Ok(tensors.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_read_back_to_the_bit() {
        let tensors = BTreeMap::from([
            (
                "exp_avg.a".to_owned(),
                vec![1.0, -0.0, f32::MIN_POSITIVE / 2.0],
            ),
            ("exp_avg_sq.a".to_owned(), vec![]),
        ]);
        let read = read_moments(&write_moments(&tensors)).expect("our own file");
        assert_eq!(read, tensors);
        assert!(read["exp_avg.a"][1].is_sign_negative());
    }

    #[test]
    fn a_truncated_file_is_an_error() {
        let bytes = write_moments(&BTreeMap::from([("exp_avg.a".to_owned(), vec![1.0; 8])]));
        read_moments(&bytes[..bytes.len() - 1]).expect_err("truncated");
    }
}
