//! A run as a checkpoint, and a checkpoint as a run.

use super::Trainer;
use crate::checkpoint::{Checkpoint, Machine, RunState};
use crate::{Error, Result};

impl Trainer<'_> {
    /// Continues from a checkpoint instead of the start.
    ///
    /// # Errors
    /// [`Error::ForeignCheckpoint`] when it was written with other data or
    /// other settings.
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
        let ours = [
            ("the data", state.cursor.plan == self.cursor.plan),
            (
                "TrainConfig",
                state.config.deciding() == self.config.deciding(),
            ),
            ("LoraConfig", adapter.config() == self.adapter.config()),
            (
                "the adapter's shape",
                adapter.parameters() == self.adapter.parameters(),
            ),
            ("the loss log", log.len() as u64 == step),
        ];
        if let Some((what, _)) = ours.into_iter().find(|(_, same)| !same) {
            return Err(Error::ForeignCheckpoint { step, what });
        }
        let here = Machine::here(self.decoder.threads());
        if state.machine != here {
            tracing::warn!(
                step, written_on = ?state.machine, ?here,
                "continuing within tolerance, not to the bit: the checkpoint was computed differently"
            );
        }
        self.optimizer.restore(optimizer)?;
        (self.cursor, self.adapter, self.log) = (state.cursor, adapter, log);
        (self.evals, self.best) = (evals, best);
        Ok(self)
    }

    /// The run as it stands, to be continued by [`resume`](Self::resume).
    ///
    /// # Errors
    /// [`Error::Model`] when the adapter cannot be copied.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        let optimizer = self.optimizer.state();
        Ok(Checkpoint {
            state: RunState {
                cursor: self.cursor.clone(),
                optimizer_step: optimizer.step,
                config: self.config.clone(),
                machine: Machine::here(self.decoder.threads()),
            },
            adapter: self.adapter.to_dtype(self.adapter.dtype())?,
            optimizer,
            log: self.log.clone(),
            evals: self.evals.clone(),
            best: match &self.best {
                Some(best) => Some(best.to_dtype(best.dtype())?),
                None => None,
            },
        })
    }
}
