//! Clipping by the norm of all gradients together.
//!
//! # Source
//! `torch.nn.utils.clip_grad_norm_`

use crate::simd::{Op, dispatch};
use crate::{Float, Threads};

/// `Σ g²` in f64, in an order that depends on the length only. The global norm is the root of the sum over all
/// parameters.
#[must_use]
pub fn sum_of_squares<F: Float>(grad: &[F]) -> f64 {
    dispatch(SumOfSquares { grad })
}

/// `min(1, max_norm / (norm + 1e-6))`; 1 where `max_norm ≤ 0`, which turns clipping off.
///
/// A norm that is not finite gives a coefficient that is not a usable number; look before you multiply.
#[must_use]
pub fn coefficient(norm: f64, max_norm: f64) -> f64 {
    if max_norm <= 0.0 {
        return 1.0;
    }
    (max_norm / (norm + 1e-6)).min(1.0)
}

/// `grad *= coefficient`, with the coefficient rounded to the gradient's type first.
pub fn scale<F: Float>(threads: &Threads, coefficient: f64, grad: &mut [F]) {
    let coefficient = F::from_f64(coefficient);
    threads.split(grad, 1 << 16, |grad| dispatch(Scale { coefficient, grad }));
}

struct SumOfSquares<'a, F> {
    grad: &'a [F],
}

impl<F: Float> Op for SumOfSquares<'_, F> {
    type Output = f64;

    #[inline(always)]
    fn run(self) -> f64 {
        let mut lanes = [0.0; 16];
        for chunk in self.grad.chunks(lanes.len()) {
            for (lane, g) in lanes.iter_mut().zip(chunk) {
                let g = g.to_f64();
                *lane += g * g;
            }
        }
        crate::simd::sum_lanes(lanes)
    }
}

struct Scale<'a, F> {
    coefficient: F,
    grad: &'a mut [F],
}

impl<F: Float> Op for Scale<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for g in self.grad {
            *g *= self.coefficient;
        }
    }
}
