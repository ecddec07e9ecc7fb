//! Adam with decoupled weight decay, step for step as PyTorch computes it.
//!
//! # Source
//! Loshchilov and Hutter 2017, <https://arxiv.org/abs/1711.05101>; `_single_tensor_adamw` in `torch/optim`

use crate::simd::{Op, Simd, dispatch};
use crate::{Float, Threads};

/// What one step does; the same for all parameters of a group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Step size, from the schedule.
    pub learning_rate: f64,
    /// Memory of the mean gradient; PyTorch's default is 0.9.
    pub beta1: f64,
    /// Memory of the mean squared gradient; PyTorch's default is 0.999.
    pub beta2: f64,
    /// Added to the root, after its bias correction; PyTorch's default is 1e-8.
    pub eps: f64,
    /// Share of each parameter that a learning rate of 1 would take away.
    pub weight_decay: f64,
}

impl AdamW {
    /// Updates one parameter and its two moments.
    ///
    /// ```text
    /// θ ← θ · (1 − lr·λ)
    /// m ← m + (1 − β₁)·(g − m)
    /// v ← β₂·v + (1 − β₂)·g²
    /// θ ← θ − lr / (1 − β₁ⁿ) · m / (√v / √(1 − β₂ⁿ) + eps)
    /// ```
    ///
    /// `step` is `n`, which counts from 1. The moments start at 0.
    ///
    /// # Shapes
    /// all slices have the parameter's length
    ///
    /// # Panics
    /// If lengths differ.
    pub fn step<F: Float>(
        &self,
        threads: &Threads,
        step: u64,
        param: &mut [F],
        grad: &[F],
        exp_avg: &mut [F],
        exp_avg_sq: &mut [F],
    ) {
        let len = param.len();
        assert_eq!(
            (grad.len(), exp_avg.len(), exp_avg_sq.len()),
            (len, len, len),
            "the parameter's length"
        );
        let factors = self.factors_of::<F>(step);
        threads.split(
            (param, grad, exp_avg, exp_avg_sq),
            1 << 14,
            |(param, grad, exp_avg, exp_avg_sq)| {
                dispatch(Step {
                    factors,
                    param,
                    grad,
                    exp_avg,
                    exp_avg_sq,
                });
            },
        );
    }

    fn factors_of<F: Float>(&self, step: u64) -> Factors<F> {
        let step = step as f64;
        Factors {
            decay: F::from_f64(1.0 - self.learning_rate * self.weight_decay),
            toward_grad: F::from_f64(1.0 - self.beta1),
            beta2: F::from_f64(self.beta2),
            toward_square: F::from_f64(1.0 - self.beta2),
            step_size: F::from_f64(self.learning_rate / (1.0 - self.beta1.powf(step))),
            root_correction: F::from_f64((1.0 - self.beta2.powf(step)).sqrt()),
            eps: F::from_f64(self.eps),
        }
    }

    /// The factors of a step that tensors of all groups share, in the order of `Factors` in `cuda/adamw.cu`; then what
    /// multiplies a parameter and what its step is multiplied with.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    pub(crate) fn factors(&self, step: u64) -> ([f32; 5], [f32; 2]) {
        let f = self.factors_of::<f32>(step);
        let shared = [
            f.toward_grad,
            f.beta2,
            f.toward_square,
            f.root_correction,
            f.eps,
        ];
        (shared, [f.decay, f.step_size])
    }
}

#[derive(Clone, Copy)]
struct Factors<F> {
    decay: F,
    toward_grad: F,
    beta2: F,
    toward_square: F,
    step_size: F,
    root_correction: F,
    eps: F,
}

struct Step<'a, F> {
    factors: Factors<F>,
    param: &'a mut [F],
    grad: &'a [F],
    exp_avg: &'a mut [F],
    exp_avg_sq: &'a mut [F],
}

impl<F: Float> Op for Step<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let f = self.factors;
        let moments = self.exp_avg.iter_mut().zip(self.exp_avg_sq);
        for ((param, &g), (m, v)) in self.param.iter_mut().zip(self.grad).zip(moments) {
            *m = (g - *m).mul_add(f.toward_grad, *m);
            *v = (f.toward_square * g).mul_add(g, f.beta2 * *v);
            let root = v.sqrt() / f.root_correction + f.eps;
            *param = *param * f.decay - f.step_size * (*m / root);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_close, random, thread_counts};

    const SETTINGS: AdamW = AdamW {
        learning_rate: 0.1,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
    };

    /// The paper's algorithm 2 in textbook form, worked out apart from this code.
    #[test]
    fn three_steps_by_hand() {
        let mut param = [0.5, -1.25, 2.0];
        let (mut exp_avg, mut exp_avg_sq) = ([0.0; 3], [0.0; 3]);
        let grads = [[0.1, -0.2, 0.0], [-0.3, -0.1, 1e-9], [0.05, 4.0, 0.0]];
        let expected = [
            [0.399_500_009_999_998_96, -1.148_750_004_999_999_7, 1.998],
            [
                0.448_519_491_110_065_4,
                -1.054_383_297_010_365_7,
                1.991_086_506_883_855_2,
            ],
            [
                0.475_820_789_491_196_4,
                -1.113_092_607_535_719_7,
                1.985_955_661_216_07,
            ],
        ];
        for (step, (grad, expected)) in (1..).zip(grads.iter().zip(&expected)) {
            SETTINGS.step(
                &Threads::single(),
                step,
                &mut param,
                grad,
                &mut exp_avg,
                &mut exp_avg_sq,
            );
            check_close("param", &param, expected, 1e-14);
        }
        check_close("exp_avg", &exp_avg, &[-0.0139, 0.3748, 9e-11], 1e-14);
        check_close(
            "exp_avg_sq",
            &exp_avg_sq,
            &[0.000_102_390_01, 0.016_049_910_04, 9.99e-22],
            1e-14,
        );
    }

    #[test]
    fn the_first_step_is_the_learning_rate_whatever_the_gradient() {
        let (mut param, mut exp_avg, mut exp_avg_sq) = ([1.0_f32, 1.0], [0.0; 2], [0.0; 2]);
        let settings = AdamW {
            weight_decay: 0.0,
            ..SETTINGS
        };
        settings.step(
            &Threads::single(),
            1,
            &mut param,
            &[1e-3, -1e3],
            &mut exp_avg,
            &mut exp_avg_sq,
        );
        check_close("param", &param, &[0.9, 1.1], 1e-5);
    }

    #[test]
    fn a_learning_rate_of_zero_moves_the_moments_alone() {
        let (mut param, mut exp_avg, mut exp_avg_sq) = ([1.5_f32], [0.0], [0.0]);
        let settings = AdamW {
            learning_rate: 0.0,
            ..SETTINGS
        };
        settings.step(
            &Threads::single(),
            1,
            &mut param,
            &[2.0],
            &mut exp_avg,
            &mut exp_avg_sq,
        );
        assert_eq!((param, exp_avg, exp_avg_sq), ([1.5], [0.2], [0.004]));
    }

    #[test]
    fn f32_on_threads_is_the_same() {
        let (len, grad) = (50_001, random::<f32>(50_001, 1));
        let results = thread_counts().map(|threads| {
            let (mut param, mut exp_avg, mut exp_avg_sq) =
                (random::<f32>(len, 2), vec![0.0; len], vec![0.0; len]);
            SETTINGS.step(
                &threads,
                1,
                &mut param,
                &grad,
                &mut exp_avg,
                &mut exp_avg_sq,
            );
            (param, exp_avg, exp_avg_sq)
        });
        assert_eq!(results[0], results[1]);
    }
}
