//! Root mean square normalization, with the residual addition that precedes it.
//!
//! # Source
//! Zhang and Sennrich 2019, <https://arxiv.org/abs/1910.07467>

use crate::simd::{LANES, Op, Simd, dispatch, dot, sum_lanes};
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
        });
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
        });
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
    fn run<S: Simd>(mut self, simd: S) {
        for (row, inv_rms) in self.inv_rms.iter_mut().enumerate() {
            *inv_rms = norm_row(
                simd,
                self.x.row(row),
                self.weight,
                self.eps,
                self.y.row_mut(row),
            );
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
    fn run<S: Simd>(mut self, simd: S) {
        for (row, inv_rms) in self.inv_rms.iter_mut().enumerate() {
            let residual = self.residual.row_mut(row);
            for (sum, &x) in residual.iter_mut().zip(self.x.row(row)) {
                *sum += x;
            }
            *inv_rms = norm_row(simd, residual, self.weight, self.eps, self.y.row_mut(row));
        }
    }
}

#[inline(always)]
fn norm_row<F: Float, S: Simd>(simd: S, x: &[F], weight: &[F], eps: F, y: &mut [F]) -> F {
    let mean = dot(simd, x, x) / F::from_f64(x.len() as f64);
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
    fn run<S: Simd>(mut self, _: S) {
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
    fn run<S: Simd>(self, _: S) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_close, check_gradient, narrow, random, thread_counts, weighted};

    const EPS: f64 = 1e-3;

    fn norm(x: &[f64], weight: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (mut y, mut inv_rms) = (vec![0.0; x.len()], vec![0.0; x.len() / weight.len()]);
        forward(&Threads::single(), x, weight, EPS, &mut y, &mut inv_rms);
        (y, inv_rms)
    }

    #[test]
    fn gradients_match_finite_differences() {
        for (rows, cols) in [(1, 1), (3, 7), (5, 16), (2, 33)] {
            let (x, weight) = (random(rows * cols, 1), random(cols, 2));
            let (dy, residual) = (random(rows * cols, 3), random::<f64>(rows * cols, 4));
            let (_, inv_rms) = norm(&x, &weight);
            let mut dx = residual.clone();
            backward(&Threads::single(), &x, &weight, &inv_rms, &dy, &mut dx);
            check_gradient("dx", &x, &dx, |x| {
                weighted(&norm(x, &weight).0, &dy) + weighted(x, &residual)
            });
            let mut dweight = vec![0.0; cols];
            backward_weight(&x, &inv_rms, &dy, &mut dweight);
            check_gradient("dweight", &weight, &dweight, |weight| {
                weighted(&norm(&x, weight).0, &dy)
            });
        }
    }

    #[test]
    fn f32_on_threads_follows_f64() {
        let (rows, cols) = (300, 37);
        let (x, weight, dy) = (
            random(rows * cols, 1),
            random(cols, 2),
            random::<f64>(rows * cols, 3),
        );
        let (y, inv_rms) = norm(&x, &weight);
        let mut dx = vec![0.0; x.len()];
        backward(&Threads::single(), &x, &weight, &inv_rms, &dy, &mut dx);
        let (x, weight, dy) = (narrow(&x), narrow(&weight), narrow(&dy));
        for threads in &thread_counts() {
            let (mut y32, mut inv_rms32, mut dx32) =
                (vec![0.0; x.len()], vec![0.0; rows], vec![0.0; x.len()]);
            forward(threads, &x, &weight, EPS as f32, &mut y32, &mut inv_rms32);
            backward(threads, &x, &weight, &inv_rms32, &dy, &mut dx32);
            check_close("y", &y32, &y, 1e-6);
            check_close("inv_rms", &inv_rms32, &inv_rms, 1e-6);
            check_close("dx", &dx32, &dx, 1e-6);
        }
    }

    #[test]
    fn the_residual_is_added_first() {
        let (x, residual, weight) = (random::<f64>(10, 1), random::<f64>(10, 2), random(5, 3));
        let sum: Vec<f64> = x.iter().zip(&residual).map(|(x, r)| r + x).collect();
        let (expected, expected_inv_rms) = norm(&sum, &weight);
        let (mut stream, mut y, mut inv_rms) = (residual, vec![0.0; 10], vec![0.0; 2]);
        add_forward(
            &Threads::single(),
            &x,
            &mut stream,
            &weight,
            EPS,
            &mut y,
            &mut inv_rms,
        );
        assert_eq!((stream, y, inv_rms), (sum, expected, expected_inv_rms));
    }
}
