//! Where a run stands, complete enough to continue it to the bit.

use std::borrow::Cow;
use std::collections::BTreeMap;

use bytes::Bytes;
use safetensors::tensor::SafeTensors;
use serde::{Deserialize, Serialize};
use updraft_model::{Adapter, Decoder, ModelConfig, f32_bytes, f32_header, f32_pieces, peft};

use crate::metrics::{parse_log, write_log};
use crate::optim::OptimizerState;
use crate::plan::Cursor;
use crate::{EvalRecord, Result, RunIdentity, StepRecord};

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
    pub optimizer: OptimizerState<'static>,
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
    /// Which run it is.
    pub run: RunIdentity,
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
    /// Workers whose gradients are added up.
    pub num_workers: usize,
    /// The GPU's model, if one computes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<String>,
}

impl Machine {
    /// This one of `num_workers`, computing with `decoder`.
    pub fn here(decoder: &Decoder, num_workers: usize) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            instruction_set: instruction_set(),
            num_threads: decoder.threads().num_threads(),
            num_workers,
            gpu: decoder.gpu_name(),
        }
    }
}

/// Those that kernels ask for before they choose how to compute.
fn instruction_set() -> String {
    #[cfg(target_arch = "x86_64")]
    let vectors = [
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        ("avx512bw", std::arch::is_x86_feature_detected!("avx512bw")),
        ("avx512dq", std::arch::is_x86_feature_detected!("avx512dq")),
        ("avx512vl", std::arch::is_x86_feature_detected!("avx512vl")),
        (
            "avx512bf16",
            std::arch::is_x86_feature_detected!("avx512bf16"),
        ),
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

/// A checkpoint on its way to the store: all that is large is looked at where it lies.
pub(crate) struct Snapshot<'a> {
    pub(crate) state: RunState,
    pub(crate) adapter: &'a Adapter,
    pub(crate) optimizer: OptimizerState<'a>,
    pub(crate) log: &'a [StepRecord],
    pub(crate) evals: &'a [EvalRecord],
    pub(crate) best: Option<&'a Adapter>,
}

/// A file's bytes, at most about a mebibyte at a time.
pub(crate) type Pieces<'a> = Box<dyn Iterator<Item = Result<Bytes>> + 'a>;

impl Snapshot<'_> {
    /// The files of the checkpoint beside its manifest. The adapter's are
    /// PEFT's, so a checkpoint can be tried out as it lies there.
    pub(crate) fn files(&self) -> Result<Vec<(&'static str, Pieces<'_>)>> {
        let whole = |bytes: Vec<u8>| -> Pieces<'_> { Box::new(std::iter::once(Ok(bytes.into()))) };
        let mut files = vec![
            (peft::CONFIG_FILE, whole(peft::config_json(self.adapter))),
            (peft::WEIGHTS_FILE, weights(self.adapter)?),
            (OPTIMIZER, moments(&self.optimizer.tensors)),
            (LOSS_LOG, whole(write_log(self.log))),
        ];
        if !self.evals.is_empty() {
            files.push((EVAL_LOG, whole(write_log(self.evals))));
        }
        if let Some(best) = self.best {
            files.push((BEST, weights(best)?));
        }
        Ok(files)
    }
}

fn weights(adapter: &Adapter) -> Result<Pieces<'_>> {
    let pieces = peft::weights_pieces(adapter)?;
    Ok(Box::new(pieces.map(|piece| Ok(piece?))))
}

fn moments<'a>(tensors: &'a BTreeMap<String, Cow<'_, [f32]>>) -> Pieces<'a> {
    let shapes = tensors.iter();
    let shapes = shapes.map(|(name, values)| (name.clone(), vec![values.len()]));
    let header = f32_header(shapes, None).expect("names are distinct and tensors exist");
    let pieces = tensors
        .values()
        .flat_map(|values| f32_pieces(0..values.len()).map(|piece| Ok(f32_bytes(&values[piece]))));
    Box::new(std::iter::once(Ok(header)).chain(pieces))
}

/// A checkpoint that is being read, one file after the other.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    config: Bytes,
    adapter: Option<Adapter>,
    best: Option<Adapter>,
    moments: Option<BTreeMap<String, Cow<'static, [f32]>>>,
    log: Option<Vec<StepRecord>>,
    evals: Vec<EvalRecord>,
}

impl Parts {
    /// Takes a file whose hash was checked; the settings come before the weights.
    pub(crate) fn take(
        &mut self,
        name: &str,
        bytes: Bytes,
        model: &ModelConfig,
    ) -> Result<(), String> {
        let broken = |error: &dyn std::fmt::Display| format!("{name}: {error}");
        let adapter = |config: &[u8]| {
            peft::read_adapter(config, &bytes, model)
                .map(Some)
                .map_err(|error| broken(&error))
        };
        match name {
            peft::CONFIG_FILE => self.config = bytes,
            peft::WEIGHTS_FILE => self.adapter = adapter(&self.config)?,
            BEST => self.best = adapter(&self.config)?,
            OPTIMIZER => {
                self.moments = Some(read_moments(&bytes).map_err(|error| broken(&error))?);
            }
            LOSS_LOG => self.log = Some(parse_log(&bytes).map_err(|error| broken(&error))?),
            EVAL_LOG => self.evals = parse_log(&bytes).map_err(|error| broken(&error))?,
            _ => {} // Of a later version, beside what this one knows.
        }
        Ok(())
    }

    pub(crate) fn finish(self, state: RunState) -> Result<Checkpoint, String> {
        let missing = |name: &str| format!("it has no {name}");
        Ok(Checkpoint {
            adapter: self.adapter.ok_or_else(|| missing(peft::WEIGHTS_FILE))?,
            optimizer: OptimizerState {
                step: state.optimizer_step,
                tensors: self.moments.ok_or_else(|| missing(OPTIMIZER))?,
            },
            log: self.log.ok_or_else(|| missing(LOSS_LOG))?,
            evals: self.evals,
            best: self.best,
            state,
        })
    }
}

fn read_moments(
    bytes: &[u8],
) -> Result<BTreeMap<String, Cow<'static, [f32]>>, safetensors::SafeTensorError> {
    let file = SafeTensors::deserialize(bytes)?;
    let tensors = file.iter().map(|(name, view)| {
        let (values, _) = view.data().as_chunks::<4>();
        let values: Vec<f32> = values
            .iter()
            .map(|&value| f32::from_le_bytes(value))
            .collect();
        (name.to_owned(), Cow::Owned(values))
    });
    Ok(tensors.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(tensors: &BTreeMap<String, Cow<'_, [f32]>>) -> Vec<u8> {
        let pieces = moments(tensors).map(|piece| piece.expect("in memory"));
        pieces.flatten().collect()
    }

    #[test]
    fn moments_read_back_to_the_bit() {
        let tensors = BTreeMap::from([
            (
                "exp_avg.a".to_owned(),
                Cow::from(vec![1.0, -0.0, f32::MIN_POSITIVE / 2.0]),
            ),
            ("exp_avg_sq.a".to_owned(), Cow::from(vec![])),
        ]);
        let read = read_moments(&file(&tensors)).expect("our own file");
        assert_eq!(read, tensors);
        assert!(read["exp_avg.a"][1].is_sign_negative());
    }

    #[test]
    fn a_truncated_file_is_an_error() {
        let tensors = BTreeMap::from([("exp_avg.a".to_owned(), Cow::from(vec![1.0; 8]))]);
        let bytes = file(&tensors);
        read_moments(&bytes[..bytes.len() - 1]).expect_err("truncated");
    }

    #[test]
    fn no_piece_of_a_checkpoint_is_large() {
        let tensors = BTreeMap::from([("exp_avg.a".to_owned(), Cow::from(vec![1.0; 3 << 18]))]);
        let largest = moments(&tensors).map(|piece| piece.expect("in memory").len());
        assert_eq!(largest.max(), Some(1 << 20));
    }
}
