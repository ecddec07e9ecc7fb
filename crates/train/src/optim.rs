//! The optimizer seam: apply one step to named tensors, remember the rest.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Debug;

use updraft_kernels::Threads;

use crate::config::{OptimizerKind, TrainConfig};
use crate::{Error, Result};

mod adamw;
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
mod gpu;
mod sgd;

pub use adamw::AdamW;
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
pub use gpu::GpuOptimizer;
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

    /// Everything a later process needs to continue, without a copy of what is in the host's memory.
    ///
    /// # Errors
    /// [`Error::Model`] when a GPU that has a part of it fails.
    fn state(&self) -> Result<OptimizerState<'_>>;

    /// Takes over such a state.
    ///
    /// # Errors
    /// [`Error::Shape`] when its tensors do not belong together.
    fn restore(&mut self, state: OptimizerState<'_>) -> Result<()>;

    /// The power to take steps on a GPU, where it has that. Where it has not, gradients come to the host and parameters go
    /// back in each step.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    fn on_gpu(&mut self) -> Option<&mut dyn GpuOptimizer> {
        None
    }
}

/// An optimizer's memory, as a checkpoint stores it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct OptimizerState<'a> {
    /// Steps begun.
    pub step: u64,
    /// Moments by `<moment>.<parameter name>`, such as
    /// `exp_avg.base_model…lora_A.weight`.
    pub tensors: BTreeMap<String, Cow<'a, [f32]>>,
}

impl OptimizerState<'_> {
    /// The same with its own memory.
    #[must_use]
    pub fn into_owned(self) -> OptimizerState<'static> {
        let own =
            |(name, values): (String, Cow<'_, [f32]>)| (name, Cow::Owned(values.into_owned()));
        OptimizerState {
            step: self.step,
            tensors: self.tensors.into_iter().map(own).collect(),
        }
    }
}

/// The optimizer a configuration names.
pub fn build(config: &TrainConfig, threads: &Threads) -> Box<dyn Optimizer> {
    match config.optim {
        OptimizerKind::Sgd => {
            let sgd = Sgd::new(config.weight_decay);
            Box::new(sgd.with_loraplus_lr_ratio(config.loraplus_lr_ratio))
        }
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

/// By how much a parameter's learning rate differs from the schedule's: LoRA+ lets `B` learn faster,
/// and PEFT's also vectors, which norms and biases are.
///
/// # Source
/// Hayou et al. 2024, <https://arxiv.org/abs/2402.12354>; peft 0.21, `create_loraplus_optimizer`.
fn learning_rate_ratio(name: &str, loraplus_lr_ratio: Option<f64>) -> f64 {
    match loraplus_lr_ratio {
        Some(ratio) if name.contains("lora_B") || !decays(name) => ratio,
        _ => 1.0,
    }
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
    use super::{build, decays};
    use crate::TrainConfig;
    use crate::config::OptimizerKind;
    use updraft_kernels::Threads;

    #[test]
    fn with_lora_plus_b_moves_as_if_the_learning_rate_were_higher_and_a_as_before() {
        for optim in [OptimizerKind::AdamwTorch, OptimizerKind::Sgd] {
            let moved = |name: &str, ratio, learning_rate| {
                let config = TrainConfig {
                    optim,
                    weight_decay: 0.01,
                    loraplus_lr_ratio: ratio,
                    ..Default::default()
                };
                let mut optimizer = build(&config, &Threads::single());
                let mut values = [0.5f32, -1.0];
                for gradient in [[0.25f32, -0.5], [0.125, 1.0]] {
                    optimizer.begin_step(learning_rate);
                    let name = format!("layers.0.self_attn.q_proj.{name}.weight");
                    optimizer
                        .update(&name, &mut values, &gradient)
                        .expect("an update");
                }
                values
            };
            assert_eq!(
                moved("lora_B", Some(4.0), 0.01),
                moved("lora_B", None, 0.04)
            );
            assert_eq!(
                moved("lora_A", Some(4.0), 0.01),
                moved("lora_A", None, 0.01)
            );
        }
    }

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
