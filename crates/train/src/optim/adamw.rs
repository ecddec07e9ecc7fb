//! Adam with decoupled weight decay.

#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
mod gpu;

use std::borrow::Cow;
use std::collections::BTreeMap;

use updraft_kernels::{Threads, adamw};

use super::{Optimizer, OptimizerState, decays, learning_rate_ratio, same_len};
use crate::{Error, Result, TrainConfig};

const EXP_AVG: &str = "exp_avg.";
const EXP_AVG_SQ: &str = "exp_avg_sq.";

/// `torch.optim.AdamW`, with the moments of each parameter in the open so that
/// a run can stop and continue.
///
/// # Source
/// Loshchilov and Hutter 2017, <https://arxiv.org/abs/1711.05101>
#[derive(Debug)]
pub struct AdamW {
    rule: adamw::AdamW,
    loraplus_lr_ratio: Option<f64>,
    threads: Threads,
    step: u64,
    moments: BTreeMap<String, Moments>,
    /// Moments on a GPU while they are there, in place of those in the host's memory: whoever looks at `moments` settles
    /// first.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    there: Option<gpu::There>,
}

#[derive(Debug)]
struct Moments {
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
}

impl AdamW {
    /// With the `adam_*` settings, `weight_decay` and `loraplus_lr_ratio` of a configuration.
    pub fn new(config: &TrainConfig, threads: &Threads) -> Self {
        let rule = adamw::AdamW {
            learning_rate: 0.0,
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            eps: config.adam_epsilon,
            weight_decay: config.weight_decay,
        };
        Self {
            rule,
            loraplus_lr_ratio: config.loraplus_lr_ratio,
            threads: threads.clone(),
            step: 0,
            moments: BTreeMap::new(),
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            there: None,
        }
    }

    /// By how much a parameter's learning rate differs from the schedule's, and its weight decay.
    fn group_of(&self, name: &str) -> (f64, f64) {
        let weight_decay = match decays(name) {
            true => self.rule.weight_decay,
            false => 0.0,
        };
        (
            learning_rate_ratio(name, self.loraplus_lr_ratio),
            weight_decay,
        )
    }

    /// Brings the moments here, if they are on a GPU.
    fn settle(&mut self) -> Result<()> {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        if let Some(there) = &self.there {
            self.moments.extend(there.download()?);
            self.there = None;
        }
        Ok(())
    }
}

/// A parameter's moments as a checkpoint names them.
fn tensors_of<'a>(name: &str, moments: [Cow<'a, [f32]>; 2]) -> [(String, Cow<'a, [f32]>); 2] {
    let [exp_avg, exp_avg_sq] = moments;
    [
        (format!("{EXP_AVG}{name}"), exp_avg),
        (format!("{EXP_AVG_SQ}{name}"), exp_avg_sq),
    ]
}

impl Optimizer for AdamW {
    fn begin_step(&mut self, learning_rate: f64) {
        self.rule.learning_rate = learning_rate;
        self.step += 1;
    }

    fn update(&mut self, name: &str, values: &mut [f32], gradient: &[f32]) -> Result<()> {
        same_len(name, values.len(), gradient.len())?;
        self.settle()?;
        let (ratio, weight_decay) = self.group_of(name);
        if !self.moments.contains_key(name) {
            let zeros = vec![0.0; values.len()];
            let moments = Moments {
                exp_avg: zeros.clone(),
                exp_avg_sq: zeros,
            };
            self.moments.insert(name.to_owned(), moments);
        }
        let Moments {
            exp_avg,
            exp_avg_sq,
        } = self.moments.get_mut(name).expect("just inserted");
        same_len(name, exp_avg.len(), values.len())?;
        let rule = adamw::AdamW {
            learning_rate: self.rule.learning_rate * ratio,
            weight_decay,
            ..self.rule
        };
        rule.step(
            &self.threads,
            self.step,
            values,
            gradient,
            exp_avg,
            exp_avg_sq,
        );
        Ok(())
    }

    fn state(&self) -> Result<OptimizerState<'_>> {
        let mut tensors = BTreeMap::new();
        for (name, moments) in &self.moments {
            let both = [&moments.exp_avg, &moments.exp_avg_sq];
            tensors.extend(tensors_of(name, both.map(Cow::from)));
        }
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        if let Some(there) = &self.there {
            for (name, moments) in there.download()? {
                let both = [moments.exp_avg, moments.exp_avg_sq];
                tensors.extend(tensors_of(&name, both.map(Cow::from)));
            }
        }
        Ok(OptimizerState {
            step: self.step,
            tensors,
        })
    }

    fn restore(&mut self, mut state: OptimizerState<'_>) -> Result<()> {
        let mut moments = BTreeMap::new();
        while let Some((key, exp_avg)) = state.tensors.pop_first() {
            let missing = |name: &str| Error::Shape {
                name: name.to_owned(),
                expected: 1,
                actual: 0,
            };
            // `exp_avg.` sorts before `exp_avg_sq.`, so each pair is met here.
            let name = key.strip_prefix(EXP_AVG).ok_or_else(|| missing(&key))?;
            let exp_avg_sq = state
                .tensors
                .remove(&format!("{EXP_AVG_SQ}{name}"))
                .ok_or_else(|| missing(name))?;
            same_len(name, exp_avg.len(), exp_avg_sq.len())?;
            moments.insert(
                name.to_owned(),
                Moments {
                    exp_avg: exp_avg.into_owned(),
                    exp_avg_sq: exp_avg_sq.into_owned(),
                },
            );
        }
        (self.step, self.moments) = (state.step, moments);
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        {
            self.there = None;
        }
        Ok(())
    }

    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    fn on_gpu(&mut self) -> Option<&mut dyn super::GpuOptimizer> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    mod conformance {
        use super::*;

        crate::optimizer_tests!(AdamW::new(&TrainConfig::default(), &Threads::single()));
    }

    /// Decay, which moves the bottom of any bowl.
    #[cfg(feature = "cuda-emulator")]
    mod conformance_with_decay_and_lora_plus {
        use super::*;

        fn optimizer() -> AdamW {
            let config = TrainConfig {
                weight_decay: 0.1,
                loraplus_lr_ratio: Some(4.0),
                ..Default::default()
            };
            AdamW::new(&config, &Threads::single())
        }

        crate::optimizer_gpu_tests!(optimizer());
    }

    /// `torch.optim.AdamW([0.5, -1.0], lr=0.1, weight_decay=0.01)` after
    /// gradients (0.2, -0.4) and (0.1, 0.3), worked out in f64 by hand.
    #[test]
    fn two_steps_are_torchs() {
        let config = TrainConfig {
            weight_decay: 0.01,
            ..Default::default()
        };
        let mut optimizer = AdamW::new(&config, &Threads::single());
        let mut values = [0.5f32, -1.0];
        let (mut m, mut v, mut theta) = ([0.0f64; 2], [0.0f64; 2], [0.5f64, -1.0]);
        for (n, gradient) in [(1, [0.2f32, -0.4]), (2, [0.1, 0.3])] {
            optimizer.begin_step(0.1);
            optimizer
                .update("lora_A.weight", &mut values, &gradient)
                .expect("an update");
            for i in 0..2 {
                let g = f64::from(gradient[i]);
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.999 * v[i] + 0.001 * g * g;
                let m_hat = m[i] / (1.0 - 0.9f64.powi(n));
                let v_hat = v[i] / (1.0 - 0.999f64.powi(n));
                theta[i] = theta[i] * (1.0 - 0.1 * 0.01) - 0.1 * m_hat / (v_hat.sqrt() + 1e-8);
            }
        }
        for (value, expected) in values.iter().zip(theta) {
            assert!(
                (f64::from(*value) - expected).abs() < 1e-6,
                "{value} against {expected}"
            );
        }
    }
}
