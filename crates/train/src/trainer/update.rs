//! The norm of all gradients, and the parameters moved: on a GPU if both decoder and optimizer work there, else here.

use updraft_kernels::clip;
use updraft_model::Parameter;

use super::Trainer;
use crate::Result;

impl Trainer<'_> {
    /// Adds up the gradients of all workers.
    pub(super) fn sum_gradients(&mut self) -> Result<()> {
        if self.workers.num_workers() == 1 {
            return Ok(()); // they stay where they are
        }
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        if let Some(gpu) = self.decoder.gpu()
            && let Some(workers) = self.workers.on_gpu()
        {
            return self
                .gradients
                .update_on_gpu(gpu, |mut sums| workers.sum_on_gpu(gpu, &mut sums))?;
        }
        self.gradients.update(|values| self.workers.sum(values))?
    }

    /// The norm of all gradients, without the loss scale.
    pub(super) fn grad_norm(&mut self, factor: f64) -> Result<f64> {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        if let Some(gpu) = self.decoder.gpu()
            && let Some(optimizer) = self.optimizer.on_gpu()
        {
            let (parameters, max_grad_norm) = (&self.parameters, self.config.max_grad_norm);
            return self.gradients.update_on_gpu(gpu, |gradients| {
                let gradients = gradients.as_view();
                optimizer.clip(gpu, parameters, gradients, factor.recip(), max_grad_norm)
            })?;
        }
        let squares = self.gradients.with(clip::sum_of_squares)?;
        Ok(squares.sqrt() / factor)
    }

    /// Takes the loss scale out of the gradients, clips them and moves the parameters.
    pub(super) fn update(&mut self, grad_norm: f64, factor: f64, learning_rate: f64) -> Result<()> {
        self.optimizer.begin_step(learning_rate);
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        if let Some(gpu) = self.decoder.gpu()
            && let Some(optimizer) = self.optimizer.on_gpu()
        {
            let gradients = &mut self.gradients;
            return self.adapter.update_on_gpu(gpu, |values| {
                gradients.update_on_gpu(gpu, |gradients| {
                    optimizer.update_all(values, gradients.as_view())
                })
            })??;
        }
        let coefficient = clip::coefficient(grad_norm, self.config.max_grad_norm) / factor;
        if coefficient < 1.0 {
            let threads = self.decoder.threads();
            self.gradients
                .update(|values| clip::scale(threads, coefficient, values))?;
        }
        let Self {
            adapter,
            gradients,
            optimizer,
            parameters,
            ..
        } = self;
        gradients.with(|gradients| {
            adapter.update(|values| {
                parameters
                    .iter()
                    .try_for_each(|Parameter { name, range, .. }| {
                        optimizer.update(
                            name,
                            &mut values[range.clone()],
                            &gradients[range.clone()],
                        )
                    })
            })
        })??
    }
}
