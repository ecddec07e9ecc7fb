//! What follows a step: an evaluation, a checkpoint, and whether there is another step.

use std::ops::ControlFlow;

use super::Trainer;
use crate::evaluation::{EvalRecord, best, evaluate, patience_is_out};
use crate::{Error, Result};

impl Trainer<'_> {
    /// Whether no step is left to be done.
    pub(super) fn is_over(&self) -> bool {
        self.cursor.step == self.plan.total_steps() || patience_is_out(&self.evals, &self.config)
    }

    /// What follows a step: an evaluation and a checkpoint where they are due, unless some worker
    /// is cancelled.
    pub(super) fn finish_step(&mut self) -> Result<ControlFlow<()>> {
        if self.evaluation_is_due() && self.evaluate()?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        if self.cursor.step.is_multiple_of(self.config.save_steps) || self.is_over() {
            self.save()?;
        }
        // There is no step after the last, but its held-out loss says as much.
        if self.is_over() && self.has_evaluated() {
            self.prune()?;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Whether the newest evaluation is of the newest step.
    fn has_evaluated(&self) -> bool {
        let newest = self.evals.last();
        newest.is_some_and(|eval| eval.step == self.cursor.step)
    }

    pub(super) fn evaluation_is_due(&self) -> bool {
        let step = self.cursor.step;
        let every = |every: u64| step.is_multiple_of(every);
        let now = self.config.eval_steps.is_some_and(every) || step == self.plan.total_steps();
        now && step > 0 && self.held_out.is_some() && !self.has_evaluated()
    }

    /// Evaluates on the first worker, until it is cancelled.
    fn evaluate(&mut self) -> Result<ControlFlow<()>> {
        const CANCELLED: [f64; 2] = [0.0, -1.0];
        let Some(held_out) = self.held_out else {
            return Ok(ControlFlow::Continue(()));
        };
        let step = self.cursor.step;
        let batch_size = self.config.per_device_eval_batch_size as usize;
        let adapter = Some(&self.adapter);
        let own = match self.workers.leads() {
            true => match evaluate(self.decoder, adapter, held_out, batch_size, &self.cancels) {
                Ok((loss, tokens)) => [loss, tokens as f64],
                Err(Error::Cancelled { .. }) => CANCELLED,
                Err(error) => return Err(error),
            },
            false => [0.0, 0.0],
        };
        // What follows from it must follow on all workers.
        let told = self.workers.of_the_first(own)?;
        if told == CANCELLED {
            return Ok(ControlFlow::Break(()));
        }
        let [eval_loss, trained_tokens] = told;
        if !eval_loss.is_finite() {
            return Err(Error::EvalLossNotFinite {
                step,
                loss: eval_loss,
            });
        }
        let eval = EvalRecord {
            step,
            epoch: self.log.last().map_or(0.0, |record| record.epoch),
            eval_loss,
            trained_tokens: trained_tokens as u64,
        };
        self.evals.push(eval);
        if self.config.load_best_model_at_end && best(&self.evals) == Some(&eval) {
            self.best = Some(self.adapter.to_dtype(self.adapter.dtype())?);
        }
        for observer in &mut self.observers {
            observer.on_evaluation(&eval);
        }
        Ok(ControlFlow::Continue(()))
    }

    pub(super) fn cancelled(&mut self) -> Result<()> {
        if self.cursor.step > 0 {
            self.save()?;
        }
        Err(Error::Cancelled {
            step: self.cursor.step,
        })
    }

    fn save(&mut self) -> Result<()> {
        let step = self.cursor.step;
        let all_finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
        if !self.adapter.with(all_finite)? {
            return Err(Error::ParametersNotFinite { step });
        }
        self.check_adapters()?;
        let place = self.checkpoints.as_ref().filter(|_| self.workers.leads());
        let Some((checkpoints, runtime)) = place else {
            return Ok(());
        };
        runtime.block_on(checkpoints.save(&self.snapshot()?))?;
        self.unproven = Some(step);
        for observer in &mut self.observers {
            observer.on_checkpoint(step);
        }
        Ok(())
    }

    /// Deletes what a checkpoint made superfluous, now that the run has gone on from it.
    pub(super) fn prune(&mut self) -> Result<()> {
        let place = self.checkpoints.as_ref().filter(|_| self.workers.leads());
        if let (Some((checkpoints, runtime)), Some(step)) = (place, self.unproven.take()) {
            runtime.block_on(checkpoints.prune(step))?;
        }
        Ok(())
    }
}
