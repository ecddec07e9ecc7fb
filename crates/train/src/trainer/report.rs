//! What a run was, in figures.

use std::time::Duration;

use super::Trainer;
use crate::evaluation::best;
use crate::memory::peak_memory;
use crate::{EvalRecord, StepRecord};

/// What a run was, as `Trainer.train()` of transformers prints it. The rates
/// count this process alone, not what a checkpoint brought along.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainReport {
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Passes over the data.
    pub epoch: f64,
    /// Mean of the steps' losses.
    pub train_loss: f64,
    /// The evaluation of the adapter that the run ends with, where examples
    /// were held out.
    pub eval: Option<EvalRecord>,
    /// Tokens read in the whole run.
    pub tokens: u64,
    /// Tokens that counted towards the loss in the whole run.
    pub trained_tokens: u64,
    /// Examples read in the whole run.
    pub examples: u64,
    /// Time this process trained.
    pub train_runtime: Duration,
    /// Examples per second.
    pub train_samples_per_second: f64,
    /// Optimizer steps per second.
    pub train_steps_per_second: f64,
    /// Tokens per second, padding-free.
    pub train_tokens_per_second: f64,
    /// The share of the packed rows that tokens fill, in the first epoch; `None` without packing.
    pub packing_fill_rate: Option<f64>,
    /// Useful floating-point operations per second; see [`Work::flops`](crate::Work::flops).
    pub flops_per_second: f64,
    /// Model FLOPs utilization: their share of what the processor's matrix
    /// products reach, where that was given.
    pub mfu: Option<f64>,
    /// The most memory this process has held so far, where the system tells.
    pub peak_memory_bytes: Option<u64>,
    /// The most memory this process has held on the GPU so far, where one computes; the driver's own is not counted.
    pub peak_gpu_memory_bytes: Option<u64>,
    /// The step this process continued from; zero for a fresh start.
    pub resumed_from: u64,
}

impl Trainer<'_> {
    pub(super) fn summary(&self, train_runtime: Duration, resumed_from: u64) -> TrainReport {
        let sum =
            |log: &[StepRecord], field: fn(&StepRecord) -> u64| log.iter().map(field).sum::<u64>();
        let new = &self.log[resumed_from as usize..];
        let rate = |count: u64| count as f64 / train_runtime.as_secs_f64();
        let flops = self.work.flops(self.decoder.config(), &self.parameters);
        let flops_per_second = flops / train_runtime.as_secs_f64();
        let losses: f64 = self.log.iter().map(|record| record.loss).sum();
        TrainReport {
            steps: self.cursor.step,
            epoch: self.log.last().map_or(0.0, |record| record.epoch),
            train_loss: losses / self.log.len().max(1) as f64,
            eval: match self.config.load_best_model_at_end {
                true => best(&self.evals).copied(),
                false => self.evals.last().copied(),
            },
            tokens: sum(&self.log, |record| record.tokens),
            trained_tokens: sum(&self.log, |record| record.trained_tokens),
            examples: sum(&self.log, |record| record.examples),
            train_runtime,
            train_samples_per_second: rate(sum(new, |record| record.examples)),
            train_steps_per_second: rate(new.len() as u64),
            train_tokens_per_second: rate(sum(new, |record| record.tokens)),
            packing_fill_rate: self.plan.fill_rate(),
            flops_per_second,
            mfu: self.gemm_ceiling.map(|ceiling| flops_per_second / ceiling),
            peak_memory_bytes: peak_memory(),
            peak_gpu_memory_bytes: self.decoder.gpu_memory().map(|memory| memory.peak_bytes),
            resumed_from,
        }
    }
}
