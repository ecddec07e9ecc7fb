//! The optimizer seam: apply one step to named tensors, remember the rest.

use std::collections::BTreeMap;
use std::fmt::Debug;

use updraft_kernels::Threads;

use crate::config::{OptimizerKind, TrainConfig};
use crate::{Error, Result};

mod adamw;
mod sgd;

pub use adamw::AdamW;
pub use sgd::Sgd;

/// Changes parameters by their gradients, one optimizer step at a time.
///
/// # Contract
/// - A step is one [`begin_step`](Optimizer::begin_step), then one
///   [`update`](Optimizer::update) per parameter, in any order: the result is
///   the same for every order.
/// - A learning rate of zero leaves every parameter as it was.
/// - An optimizer that [`restore`](Optimizer::restore)s another's
///   [`state`](Optimizer::state) continues bit for bit as that one would.
///
/// The suite `conformance::optimizer` (feature `conformance`) checks it.
pub trait Optimizer: Debug + Send + Sync {
    /// Opens the next step, at this learning rate.
    fn begin_step(&mut self, learning_rate: f64);

    /// Moves one parameter by its gradient.
    ///
    /// # Errors
    /// [`Error::Shape`] when the slices differ in length, or from what this
    /// name had before.
    fn update(&mut self, name: &str, values: &mut [f32], gradient: &[f32]) -> Result<()>;

    /// Everything a later process needs to continue.
    fn state(&self) -> OptimizerState;

    /// Takes over such a state.
    ///
    /// # Errors
    /// [`Error::Shape`] when its tensors do not belong together.
    fn restore(&mut self, state: OptimizerState) -> Result<()>;
}

/// An optimizer's memory, as a checkpoint stores it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct OptimizerState {
    /// Steps begun.
    pub step: u64,
    /// Moments by `<moment>.<parameter name>`, such as
    /// `exp_avg.base_model…lora_A.weight`.
    pub tensors: BTreeMap<String, Vec<f32>>,
}

/// The optimizer a configuration names.
pub fn build(config: &TrainConfig, threads: &Threads) -> Box<dyn Optimizer> {
    match config.optim {
        OptimizerKind::Sgd => Box::new(Sgd::new(config.weight_decay)),
        OptimizerKind::AdamwTorch => Box::new(AdamW::new(config, threads)),
        OptimizerKind::Adamw8bit => {
            tracing::warn!("adamw_8bit runs with f32 moments: an adapter's are small");
            Box::new(AdamW::new(config, threads))
        }
    }
}

/// Whether weight decay applies to a parameter: not to biases and norms.
///
/// # Source
/// transformers 5, `Trainer.get_decay_parameter_names`.
fn decays(name: &str) -> bool {
    let name = name.to_lowercase();
    let is_norm = |part: &str| part == "norm" || part.ends_with("_norm");
    !["bias", "layernorm", "rmsnorm"]
        .iter()
        .any(|word| name.contains(word))
        && !name.split('.').any(is_norm)
}

fn same_len(name: &str, expected: usize, actual: usize) -> Result<()> {
    if expected == actual {
        Ok(())
    } else {
        Err(Error::Shape {
            name: name.to_owned(),
            expected,
            actual,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::decays;

    #[test]
    fn adapters_decay_and_norms_do_not() {
        assert!(decays(
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        ));
        assert!(!decays("model.layers.0.self_attn.q_proj.bias"));
        assert!(!decays("model.layers.0.self_attn.q_norm.weight"));
        assert!(!decays("model.layers.0.input_layernorm.weight"));
    }
}
