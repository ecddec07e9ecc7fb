//! Clipping by the norm of all gradients together.
//!
//! # Source
//! `torch.nn.utils.clip_grad_norm_`

use crate::simd::{Op, Simd, dispatch};
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
    fn run<S: Simd>(self, _: S) -> f64 {
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
    fn run<S: Simd>(self, _: S) {
        for g in self.grad {
            *g *= self.coefficient;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    #[test]
    fn coefficient_is_torchs() {
        assert_eq!(coefficient(5.0, 1.0), 1.0 / 5.000_001);
        assert_eq!(coefficient(0.5, 1.0), 1.0);
        assert_eq!(coefficient(0.0, 1.0), 1.0);
        assert_eq!(coefficient(5.0, 0.0), 1.0);
        assert_eq!(coefficient(f64::INFINITY, 1.0), 0.0);
    }

    #[test]
    fn squares_are_summed_in_f64() {
        assert_eq!(sum_of_squares(&[3.0_f32, -4.0]), 25.0);
        assert_eq!(sum_of_squares::<f32>(&[]), 0.0);
        // 2^24 + 1 is not an f32.
        assert_eq!(sum_of_squares(&[4096.0_f32, 1.0]), 16_777_217.0);
        let grad = random::<f32>(1003, 1);
        let exact: f64 = grad.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
        assert!((sum_of_squares(&grad) - exact).abs() < 1e-12 * exact);
    }

    #[test]
    fn scaling_multiplies() {
        let mut grad = [2.0_f32, -4.0];
        scale(&Threads::single(), 0.25, &mut grad);
        assert_eq!(grad, [0.5, -1.0]);
    }
}
