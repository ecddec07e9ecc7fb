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
        let step = step as f64;
        let factors = Factors {
            decay: F::from_f64(1.0 - self.learning_rate * self.weight_decay),
            toward_grad: F::from_f64(1.0 - self.beta1),
            beta2: F::from_f64(self.beta2),
            toward_square: F::from_f64(1.0 - self.beta2),
            step_size: F::from_f64(self.learning_rate / (1.0 - self.beta1.powf(step))),
            root_correction: F::from_f64((1.0 - self.beta2.powf(step)).sqrt()),
            eps: F::from_f64(self.eps),
        };
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
