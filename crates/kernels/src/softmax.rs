//! The passes over a row of scores that attention and the loss share. Each reduces by position in the row alone.

use crate::Float;
use crate::simd::{LANES, sum_lanes};

/// Exponentials are summed in their own type over this many, then in f64.
const BLOCK: usize = 1024;

/// The largest score.
#[inline(always)]
pub(crate) fn max<F: Float>(row: &[F]) -> F {
    let mut lanes = [F::NEG_INFINITY; LANES];
    for chunk in row.chunks(LANES) {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = lane.larger(x);
        }
    }
    lanes.into_iter().fold(F::NEG_INFINITY, F::larger)
}

/// Replaces each score `x` by `e^(scale · (x − max))` and returns their sum.
#[inline(always)]
pub(crate) fn exp_and_sum<F: Float>(row: &mut [F], scale: F, max: F) -> f64 {
    let mut sum = 0.0;
    for block in row.chunks_mut(BLOCK) {
        let mut lanes = [F::ZERO; LANES];
        let (chunks, rest) = block.as_chunks_mut::<LANES>();
        for chunk in chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *x = (scale * (*x - max)).exp();
                *lane += *x;
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *x = (scale * (*x - max)).exp();
            *lane += *x;
        }
        sum += sum_lanes(lanes).to_f64();
    }
    sum
}
