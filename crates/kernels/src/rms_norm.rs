//! Root mean square normalization, with the residual addition that precedes it.
//!
//! # Source
//! Zhang and Sennrich 2019, <https://arxiv.org/abs/1910.07467>

use crate::simd::{LANES, Op, dispatch, dot, sum_lanes};
use crate::{Float, Mat, MatMut, Threads};

/// Rows that a thread takes at least.
const MIN_ROWS: usize = 64;

/// `y = x · inv_rms ⊙ weight` with `inv_rms = 1 / sqrt(mean(x²) + eps)`.
///
/// # Shapes
/// `x: [T, C]`, `weight: [C]` → `y: [T, C]`, `inv_rms: [T]`, which [`backward`] needs
///
/// # Panics
/// If the shapes do not agree.
pub fn forward<F: Float>(
    threads: &Threads,
    x: &[F],
    weight: &[F],
    eps: F,
    y: &mut [F],
    inv_rms: &mut [F],
) {
    let (rows, cols) = (inv_rms.len(), weight.len());
    let parts = (Mat::new(x, rows, cols), MatMut::new(y, rows, cols), inv_rms);
    threads.split(parts, MIN_ROWS, |(x, y, inv_rms)| {
        dispatch(Forward {
            x,
            weight,
            eps,
            y,
            inv_rms,
        })
    });
}

/// `residual += x`, then [`forward`] on the sum: one pass instead of two.
///
/// # Shapes
/// `x`, `residual: [T, C]`, `weight: [C]` → `y: [T, C]`, `inv_rms: [T]`
///
/// # Panics
/// If the shapes do not agree.
pub fn add_forward<F: Float>(
    threads: &Threads,
    x: &[F],
    residual: &mut [F],
    weight: &[F],
    eps: F,
    y: &mut [F],
    inv_rms: &mut [F],
) {
    let (rows, cols) = (inv_rms.len(), weight.len());
    let parts = (
        Mat::new(x, rows, cols),
        MatMut::new(residual, rows, cols),
        MatMut::new(y, rows, cols),
        inv_rms,
    );
    threads.split(parts, MIN_ROWS, |(x, residual, y, inv_rms)| {
        dispatch(AddForward {
            x,
            residual,
            weight,
            eps,
            y,
            inv_rms,
        });
    });
}

/// `dx += inv_rms · (g − x · inv_rms² · mean(g ⊙ x))` with `g = dy ⊙ weight`.
///
/// It adds to `dx`, because what is there is usually the gradient that went around the norm, through the residual.
///
/// # Shapes
/// `x`, `dy: [T, C]`, `weight: [C]`, `inv_rms: [T]` → `dx: [T, C]`
///
/// # Panics
/// If the shapes do not agree.
pub fn backward<F: Float>(
    threads: &Threads,
    x: &[F],
    weight: &[F],
    inv_rms: &[F],
    dy: &[F],
    dx: &mut [F],
) {
    let (rows, cols) = (inv_rms.len(), weight.len());
    let parts = (
        Mat::new(x, rows, cols),
        inv_rms,
        Mat::new(dy, rows, cols),
        MatMut::new(dx, rows, cols),
    );
    threads.split(parts, MIN_ROWS, |(x, inv_rms, dy, dx)| {
        dispatch(Backward {
            x,
            weight,
            inv_rms,
            dy,
            dx,
        })
    });
}

/// `dweight += Σ_t dy_t ⊙ x_t · inv_rms_t`, in the order of the rows; for full fine-tuning.
///
/// # Shapes
/// `x`, `dy: [T, C]`, `inv_rms: [T]` → `dweight: [C]`
///
/// # Panics
/// If the shapes do not agree.
pub fn backward_weight<F: Float>(x: &[F], inv_rms: &[F], dy: &[F], dweight: &mut [F]) {
    let (rows, cols) = (inv_rms.len(), dweight.len());
    dispatch(BackwardWeight {
        x: Mat::new(x, rows, cols),
        inv_rms,
        dy: Mat::new(dy, rows, cols),
        dweight,
    });
}

struct Forward<'a, F> {
    x: Mat<'a, F>,
    weight: &'a [F],
    eps: F,
    y: MatMut<'a, F>,
    inv_rms: &'a mut [F],
}

impl<F: Float> Op for Forward<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        for (row, inv_rms) in self.inv_rms.iter_mut().enumerate() {
            *inv_rms = norm_row(self.x.row(row), self.weight, self.eps, self.y.row_mut(row));
        }
    }
}

struct AddForward<'a, F> {
    x: Mat<'a, F>,
    residual: MatMut<'a, F>,
    weight: &'a [F],
    eps: F,
    y: MatMut<'a, F>,
    inv_rms: &'a mut [F],
}

impl<F: Float> Op for AddForward<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        for (row, inv_rms) in self.inv_rms.iter_mut().enumerate() {
            let residual = self.residual.row_mut(row);
            for (sum, &x) in residual.iter_mut().zip(self.x.row(row)) {
                *sum += x;
            }
            *inv_rms = norm_row(residual, self.weight, self.eps, self.y.row_mut(row));
        }
    }
}

#[inline(always)]
fn norm_row<F: Float>(x: &[F], weight: &[F], eps: F, y: &mut [F]) -> F {
    let mean = dot(x, x) / F::from_f64(x.len() as f64);
    let inv_rms = F::ONE / (mean + eps).sqrt();
    for ((y, &x), &weight) in y.iter_mut().zip(x).zip(weight) {
        *y = x * inv_rms * weight;
    }
    inv_rms
}

struct Backward<'a, F> {
    x: Mat<'a, F>,
    weight: &'a [F],
    inv_rms: &'a [F],
    dy: Mat<'a, F>,
    dx: MatMut<'a, F>,
}

impl<F: Float> Op for Backward<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        let cols = F::from_f64(self.weight.len() as f64);
        for (row, &inv_rms) in self.inv_rms.iter().enumerate() {
            let (x, dy) = (self.x.row(row), self.dy.row(row));
            let pull = weighted_dot(x, dy, self.weight) * inv_rms * inv_rms / cols;
            for (((dx, &x), &dy), &weight) in self
                .dx
                .row_mut(row)
                .iter_mut()
                .zip(x)
                .zip(dy)
                .zip(self.weight)
            {
                *dx += inv_rms * (dy * weight - x * pull);
            }
        }
    }
}

/// `Σ x_i · dy_i · weight_i`.
#[inline(always)]
fn weighted_dot<F: Float>(x: &[F], dy: &[F], weight: &[F]) -> F {
    let mut lanes = [F::ZERO; LANES];
    let chunks = x
        .chunks(LANES)
        .zip(dy.chunks(LANES))
        .zip(weight.chunks(LANES));
    for ((x, dy), weight) in chunks {
        for (((lane, &x), &dy), &weight) in lanes.iter_mut().zip(x).zip(dy).zip(weight) {
            *lane = (x * dy).mul_add(weight, *lane);
        }
    }
    sum_lanes(lanes)
}

struct BackwardWeight<'a, F> {
    x: Mat<'a, F>,
    inv_rms: &'a [F],
    dy: Mat<'a, F>,
    dweight: &'a mut [F],
}

impl<F: Float> Op for BackwardWeight<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (row, &inv_rms) in self.inv_rms.iter().enumerate() {
            for ((sum, &x), &dy) in self
                .dweight
                .iter_mut()
                .zip(self.x.row(row))
                .zip(self.dy.row(row))
            {
                *sum = (dy * inv_rms).mul_add(x, *sum);
            }
        }
    }
}
