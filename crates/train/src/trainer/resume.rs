//! A run as a checkpoint, and a checkpoint as a run.

use super::Trainer;
use crate::checkpoint::{Checkpoint, Machine, RunState, Snapshot};
use crate::identity::shape_of;
use crate::loss_scale::LossScale;
use crate::{Error, Result, RunIdentity};

impl Trainer<'_> {
    /// Continues from a checkpoint instead of the start. Base model, held-out data and workers are
    /// given before.
    ///
    /// # Errors
    /// [`Error::ForeignCheckpoint`] when it was written with another base model, other data or
    /// other settings, or stands where this run never does.
    pub fn resume(mut self, checkpoint: Checkpoint) -> Result<Self> {
        let Checkpoint {
            state,
            adapter,
            optimizer,
            log,
            evals,
            best,
        } = checkpoint;
        let step = state.cursor.step;
        let foreign = |what| Error::ForeignCheckpoint { step, what };
        if let Some(what) = state.run.difference(&self.identity()) {
            return Err(foreign(what));
        }
        let ours = [
            (
                "the adapter's shape",
                adapter.parameters() == self.adapter.parameters(),
            ),
            ("the place in the data", self.plan.holds(&state.cursor)),
            ("the loss log", log.len() as u64 == step),
        ];
        if let Some((what, _)) = ours.into_iter().find(|(_, same)| !same) {
            return Err(foreign(what));
        }
        let here = self.machine();
        if state.machine != here {
            tracing::warn!(
                step, written_on = ?state.machine, ?here,
                "continuing within tolerance, not to the bit: the checkpoint was computed differently"
            );
        }
        self.optimizer.restore(optimizer)?;
        self.loss_scale = self.loss_scale.map(|_| LossScale::after(&log));
        (self.cursor, self.adapter, self.log) = (state.cursor, adapter, log);
        (self.evals, self.best) = (evals, best);
        self.unproven = Some(step);
        Ok(self)
    }

    /// Which run this is.
    pub fn identity(&self) -> RunIdentity {
        RunIdentity {
            config: self.config.deciding(),
            lora: self.adapter.config().clone(),
            shape: shape_of(self.decoder.config()),
            base: self.base.clone(),
            data: self.source.plan().id.clone(),
            held_out: self.held_out.map(|source| source.plan().id.clone()),
            start: self.start.clone(),
        }
    }

    /// The run as it stands, to be continued by [`resume`](Self::resume).
    ///
    /// # Errors
    /// [`Error::Model`] when the adapter cannot be copied.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        let Snapshot {
            state,
            adapter,
            optimizer,
            log,
            evals,
            best,
        } = self.snapshot()?;
        Ok(Checkpoint {
            state,
            adapter: adapter.to_dtype(adapter.dtype())?,
            optimizer: optimizer.into_owned(),
            log: log.to_vec(),
            evals: evals.to_vec(),
            best: best.map(|best| best.to_dtype(best.dtype())).transpose()?,
        })
    }

    /// The run as it stands, without a copy of what is in the host's memory.
    pub(super) fn snapshot(&self) -> Result<Snapshot<'_>> {
        let optimizer = self.optimizer.state()?;
        Ok(Snapshot {
            state: RunState {
                cursor: self.cursor.clone(),
                optimizer_step: optimizer.step,
                run: self.identity(),
                machine: self.machine(),
            },
            adapter: &self.adapter,
            optimizer,
            log: &self.log,
            evals: &self.evals,
            best: self.best.as_ref(),
        })
    }

    fn machine(&self) -> Machine {
        Machine::here(self.decoder, self.workers.num_workers())
    }
}
