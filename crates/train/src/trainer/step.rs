//! One optimizer step: gradients over its micro-batches, of all workers, and what follows from their norm.

use updraft_kernels::noise::derive;

use super::Trainer;
use crate::batch::{Noise, noisy_parts};
use crate::loader::StepExamples;
use crate::memory::out_of_gpu_memory;
use crate::observer::StepRecord;
use crate::{Error, Result};

impl Trainer<'_> {
    /// One optimizer step.
    pub(super) fn step(&mut self, examples: &StepExamples) -> Result<()> {
        self.take(examples).map_err(|error| self.explained(error))
    }

    fn take(&mut self, examples: &StepExamples) -> Result<()> {
        let step = self.cursor.step + 1;
        let all = || examples.micro_batches.iter().flatten();
        let trained_tokens: u64 = all()
            .map(|example| u64::from(example.trained_tokens()))
            .sum();
        if trained_tokens == 0 {
            return Err(Error::EmptyStep { step });
        }

        self.gradients.zero()?;
        let factor = self.loss_scale.map_or(1.0, |scale| scale.factor());
        let mut loss_sum = 0.0;
        let mut noise = Noise {
            step_seed: derive(self.config.seed, step),
            first_example: 0,
            neftune_noise_alpha: self.config.neftune_noise_alpha.unwrap_or(0.0),
        };
        for (place, micro_batch) in examples.micro_batches.iter().enumerate() {
            if !self.workers.takes(place) {
                noise.first_example += micro_batch.len() as u64;
                continue;
            }
            let num_parts = self.decoder.num_parts();
            let vocab_size = self.decoder.config().vocab_size;
            let parts = noisy_parts(micro_batch, num_parts, vocab_size, noise)?;
            noise.first_example += micro_batch.len() as u64;
            if parts.is_empty() {
                continue; // Another micro-batch of the step has trained tokens.
            }
            loss_sum += self.decoder.loss_and_backward(
                &parts,
                &self.adapter,
                trained_tokens as f64 / factor,
                &mut self.gradients,
                self.config.activations(),
            )?;
        }
        self.sum_gradients()?;
        let loss = self.workers.sum_f64(loss_sum)? / trained_tokens as f64;
        if !loss.is_finite() {
            return Err(Error::LossNotFinite { step, loss });
        }
        let mut grad_norm = self.grad_norm(factor)?;
        let overflowed = !grad_norm.is_finite();
        let skipped = match &mut self.loss_scale {
            Some(scale) => {
                let skipped = scale.overflows();
                scale.update(overflowed);
                skipped
            }
            None => 0,
        };
        let learning_rate = self.schedule.learning_rate(self.cursor.step - skipped);
        if !overflowed {
            self.update(grad_norm, factor, learning_rate)?;
        } else if self.loss_scale.is_some_and(|scale| !scale.is_exhausted()) {
            grad_norm = 0.0;
        } else {
            return Err(Error::GradientNotFinite {
                step,
                norm: grad_norm,
            });
        }

        for example in all() {
            self.work.add(example);
        }
        self.cursor = examples.next.clone();
        self.log.push(StepRecord {
            step,
            epoch: examples.epoch,
            loss,
            learning_rate,
            grad_norm,
            tokens: all().map(|example| example.len() as u64).sum(),
            trained_tokens,
            examples: all().count() as u64,
            overflowed,
        });
        Ok(())
    }

    /// A GPU that ran out of memory says what it was asked for; what fits is known here.
    fn explained(&self, error: Error) -> Error {
        let asked = match &error {
            Error::Model(error) => error.out_of_gpu_memory(),
            _ => None,
        };
        match asked {
            Some(bytes) => {
                let (lora, data) = (self.adapter.config(), self.source.plan());
                out_of_gpu_memory(self.decoder, lora, data, &self.config, bytes)
            }
            None => error,
        }
    }
}
