//! Who watches a run: one record per step, for logs, progress and pictures.

use std::fmt::Debug;

use serde::{Deserialize, Serialize};
use updraft_store::{Progress, ProgressSink};

use crate::{EvalRecord, TrainReport};

/// What one optimizer step was, without any time: a rerun gives the same.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Optimizer step, from one.
    pub step: u64,
    /// Passes over the data done with this step.
    pub epoch: f64,
    /// Mean cross-entropy over the step's trained tokens, in nats.
    pub loss: f64,
    /// The learning rate this step used.
    pub learning_rate: f64,
    /// Norm of all gradients before clipping; 0 where they [overflowed](Self::overflowed).
    pub grad_norm: f64,
    /// Tokens read.
    pub tokens: u64,
    /// Tokens that count towards the loss.
    pub trained_tokens: u64,
    /// Examples read.
    pub examples: u64,
    /// Whether f16 gradients overflowed, so that the step changed nothing; see [`TrainConfig::fp16`].
    ///
    /// [`TrainConfig::fp16`]: crate::TrainConfig::fp16
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub overflowed: bool,
}

/// A finished step, with how fast it went.
#[derive(Debug, Clone, Copy)]
pub struct StepStats<'a> {
    /// The step.
    pub record: &'a StepRecord,
    /// Optimizer steps in the whole run.
    pub total_steps: u64,
    /// Tokens read per second since this process began to train.
    pub tokens_per_second: f64,
}

/// Watches a run. Observers are told and never asked: they cannot fail it.
pub trait Observer: Debug + Send {
    /// A step is done.
    fn on_step(&mut self, stats: &StepStats<'_>);

    /// Held-out examples were evaluated.
    fn on_evaluation(&mut self, _eval: &EvalRecord) {}

    /// A checkpoint of this step is committed.
    fn on_checkpoint(&mut self, _step: u64) {}

    /// The run has come to its end; a run that goes on later has not.
    fn on_end(&mut self, _report: &TrainReport) {}
}

impl<O: Observer + ?Sized> Observer for Box<O> {
    fn on_step(&mut self, stats: &StepStats<'_>) {
        (**self).on_step(stats);
    }

    fn on_evaluation(&mut self, eval: &EvalRecord) {
        (**self).on_evaluation(eval);
    }

    fn on_checkpoint(&mut self, step: u64) {
        (**self).on_checkpoint(step);
    }

    fn on_end(&mut self, report: &TrainReport) {
        (**self).on_end(report);
    }
}

/// Hands each step to a [`ProgressSink`], with loss, learning rate, gradient
/// norm, epoch and tokens per second as metrics, and the newest held-out loss.
#[derive(Debug, Clone)]
pub struct ProgressObserver<S> {
    sink: S,
    eval_loss: Option<f64>,
}

impl<S: ProgressSink> ProgressObserver<S> {
    /// Reports to `sink`.
    pub fn new(sink: S) -> Self {
        Self {
            sink,
            eval_loss: None,
        }
    }
}

impl<S: ProgressSink> Observer for ProgressObserver<S> {
    fn on_step(&mut self, stats: &StepStats<'_>) {
        let StepRecord {
            step,
            epoch,
            loss,
            learning_rate,
            grad_norm,
            ..
        } = *stats.record;
        let mut progress = Progress::new("train", step, Some(stats.total_steps), "steps")
            .with_metric("loss", loss)
            .with_metric("learning_rate", learning_rate)
            .with_metric("grad_norm", grad_norm)
            .with_metric("epoch", epoch)
            .with_metric("tokens_per_second", stats.tokens_per_second);
        if let Some(eval_loss) = self.eval_loss {
            progress = progress.with_metric("eval_loss", eval_loss);
        }
        self.sink.report(&progress);
    }

    fn on_evaluation(&mut self, eval: &EvalRecord) {
        self.eval_loss = Some(eval.eval_loss);
    }
}
