//! Plain gradient descent.

use super::{Optimizer, OptimizerState, decays, learning_rate_ratio, same_len};
use crate::Result;

/// `θ ← θ − lr·(g + λ·θ)`, as `torch.optim.SGD` without momentum.
#[derive(Debug)]
pub struct Sgd {
    weight_decay: f64,
    loraplus_lr_ratio: Option<f64>,
    learning_rate: f64,
    step: u64,
}

impl Sgd {
    /// With this weight decay `λ`.
    pub fn new(weight_decay: f64) -> Self {
        Self {
            weight_decay,
            loraplus_lr_ratio: None,
            learning_rate: 0.0,
            step: 0,
        }
    }

    /// With LoRA+'s ratio between the learning rates of `B` and `A`.
    pub fn with_loraplus_lr_ratio(self, loraplus_lr_ratio: Option<f64>) -> Self {
        Self {
            loraplus_lr_ratio,
            ..self
        }
    }
}

impl Optimizer for Sgd {
    fn begin_step(&mut self, learning_rate: f64) {
        self.learning_rate = learning_rate;
        self.step += 1;
    }

    fn update(&mut self, name: &str, values: &mut [f32], gradient: &[f32]) -> Result<()> {
        same_len(name, values.len(), gradient.len())?;
        let decay = if decays(name) {
            self.weight_decay as f32
        } else {
            0.0
        };
        let ratio = learning_rate_ratio(name, self.loraplus_lr_ratio);
        let rate = (self.learning_rate * ratio) as f32;
        for (value, gradient) in values.iter_mut().zip(gradient) {
            *value -= rate * (gradient + decay * *value);
        }
        Ok(())
    }

    fn state(&self) -> Result<OptimizerState<'_>> {
        Ok(OptimizerState {
            step: self.step,
            ..Default::default()
        })
    }

    fn restore(&mut self, state: OptimizerState<'_>) -> Result<()> {
        self.step = state.step;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    mod conformance {
        crate::optimizer_tests!(crate::optim::Sgd::new(0.0));
    }
}
