//! The gated activation of the MLP.
//!
//! # Source
//! Shazeer 2020, <https://arxiv.org/abs/2002.05202>

use crate::simd::{LANES, Op, Simd, dispatch};
use crate::{Float, Mat, MatMut, Threads};

/// Rows that a thread takes at least.
const MIN_ROWS: usize = 32;

/// `h = silu(gate) ⊙ up` with `silu(g) = g · σ(g) = g / (1 + e^−g)`.
///
/// # Shapes
/// `gate`, `up: [T, I]` → `h: [T, I]`
///
/// # Panics
/// If the shapes do not agree.
pub fn forward<F: Float>(threads: &Threads, gate: Mat<'_, F>, up: Mat<'_, F>, h: MatMut<'_, F>) {
    let shape = (h.num_rows(), h.num_cols());
    assert_eq!((gate.num_rows(), gate.num_cols()), shape, "gate's shape");
    assert_eq!((up.num_rows(), up.num_cols()), shape, "up's shape");
    threads.split((gate, up, h), MIN_ROWS, |(gate, up, h)| {
        dispatch(Forward { gate, up, h });
    });
}

/// `dgate = dh ⊙ up ⊙ σ·(1 + g·(1 − σ))` and `dup = dh ⊙ silu(gate)`, with `σ = σ(gate)`.
///
/// # Shapes
/// `gate`, `up`, `dh: [T, I]` → `dgate`, `dup: [T, I]`
///
/// # Panics
/// If the shapes do not agree.
pub fn backward<F: Float>(
    threads: &Threads,
    gate: Mat<'_, F>,
    up: Mat<'_, F>,
    dh: Mat<'_, F>,
    dgate: MatMut<'_, F>,
    dup: MatMut<'_, F>,
) {
    let shape = (dh.num_rows(), dh.num_cols());
    assert_eq!((gate.num_rows(), gate.num_cols()), shape, "gate's shape");
    assert_eq!((up.num_rows(), up.num_cols()), shape, "up's shape");
    assert_eq!((dgate.num_rows(), dgate.num_cols()), shape, "dgate's shape");
    assert_eq!((dup.num_rows(), dup.num_cols()), shape, "dup's shape");
    threads.split(
        (gate, up, dh, dgate, dup),
        MIN_ROWS,
        |(gate, up, dh, dgate, dup)| {
            dispatch(Backward {
                gate,
                up,
                dh,
                dgate,
                dup,
            });
        },
    );
}

/// [`backward`] that also computes [`forward`]'s `h` again, so that it need not be saved, and writes both gradients in
/// place: afterwards `gate` holds `dgate`, `up` holds `dup`, and `dh` holds `h`.
///
/// # Shapes
/// `gate`, `up`, `dh: [T, I]`
///
/// # Panics
/// If the shapes do not agree.
pub fn backward_recompute<F: Float>(
    threads: &Threads,
    gate: MatMut<'_, F>,
    up: MatMut<'_, F>,
    dh: MatMut<'_, F>,
) {
    let shape = (dh.num_rows(), dh.num_cols());
    assert_eq!((gate.num_rows(), gate.num_cols()), shape, "gate's shape");
    assert_eq!((up.num_rows(), up.num_cols()), shape, "up's shape");
    threads.split((gate, up, dh), MIN_ROWS, |(gate, up, dh)| {
        dispatch(BackwardRecompute { gate, up, dh });
    });
}

/// The gradients of one element, and its output: `(dgate, dup, h)`.
#[inline(always)]
fn element<F: Float>(gate: F, up: F, dh: F) -> (F, F, F) {
    let sigmoid = F::ONE / (F::ONE + (-gate).exp());
    let silu = gate * sigmoid;
    // σ·(1 + g·(1 − σ)) = σ + silu·(1 − σ)
    (
        dh * up * (sigmoid + silu * (F::ONE - sigmoid)),
        dh * silu,
        silu * up,
    )
}

struct Forward<'a, F> {
    gate: Mat<'a, F>,
    up: Mat<'a, F>,
    h: MatMut<'a, F>,
}

impl<F: Float> Op for Forward<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for row in 0..self.h.num_rows() {
            for ((h, &gate), &up) in self
                .h
                .row_mut(row)
                .iter_mut()
                .zip(self.gate.row(row))
                .zip(self.up.row(row))
            {
                *h = gate / (F::ONE + (-gate).exp()) * up;
            }
        }
    }
}

struct Backward<'a, F> {
    gate: Mat<'a, F>,
    up: Mat<'a, F>,
    dh: Mat<'a, F>,
    dgate: MatMut<'a, F>,
    dup: MatMut<'a, F>,
}

impl<F: Float> Op for Backward<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for row in 0..self.dh.num_rows() {
            let inputs = self
                .gate
                .row(row)
                .iter()
                .zip(self.up.row(row))
                .zip(self.dh.row(row));
            let outputs = self
                .dgate
                .row_mut(row)
                .iter_mut()
                .zip(self.dup.row_mut(row));
            for ((dgate, dup), ((&gate, &up), &dh)) in outputs.zip(inputs) {
                (*dgate, *dup, _) = element(gate, up, dh);
            }
        }
    }
}

struct BackwardRecompute<'a, F> {
    gate: MatMut<'a, F>,
    up: MatMut<'a, F>,
    dh: MatMut<'a, F>,
}

impl<F: Float> Op for BackwardRecompute<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for row in 0..self.dh.num_rows() {
            let (gates, gate) = self.gate.row_mut(row).as_chunks_mut();
            let (ups, up) = self.up.row_mut(row).as_chunks_mut();
            let (dhs, dh) = self.dh.row_mut(row).as_chunks_mut();
            for ((gate, up), dh) in gates.iter_mut().zip(ups).zip(dhs) {
                in_place(gate, up, dh);
            }
            for ((gate, up), dh) in gate.iter_mut().zip(up).zip(dh) {
                (*gate, *up, *dh) = element(*gate, *up, *dh);
            }
        }
    }
}

/// [`element`] of a vector's worth, read as a whole before any is written: three buffers that are read and written in
/// one loop are not vectorized, as far as the compiler knows they overlap.
#[inline(always)]
fn in_place<F: Float>(gate: &mut [F; LANES], up: &mut [F; LANES], dh: &mut [F; LANES]) {
    let (g, u, d) = (*gate, *up, *dh);
    let mut out = [[F::ZERO; LANES]; 3];
    for i in 0..LANES {
        (out[0][i], out[1][i], out[2][i]) = element(g[i], u[i], d[i]);
    }
    [*gate, *up, *dh] = out;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_close, check_gradient, narrow, random, thread_counts, weighted};

    fn activate(gate: &[f64], up: &[f64], rows: usize) -> Vec<f64> {
        let (mut h, cols) = (vec![0.0; gate.len()], gate.len() / rows);
        let (gate, up) = (Mat::new(gate, rows, cols), Mat::new(up, rows, cols));
        forward(
            &Threads::single(),
            gate,
            up,
            MatMut::new(&mut h, rows, cols),
        );
        h
    }

    #[test]
    fn gradients_match_finite_differences() {
        let (rows, cols) = (3, 19);
        let gate: Vec<f64> = random::<f64>(rows * cols, 1)
            .iter()
            .map(|x| 6.0 * x)
            .collect();
        let (up, dh) = (random(rows * cols, 2), random::<f64>(rows * cols, 3));
        let (mut dgate, mut dup) = (vec![0.0; rows * cols], vec![0.0; rows * cols]);
        backward(
            &Threads::single(),
            Mat::new(&gate, rows, cols),
            Mat::new(&up, rows, cols),
            Mat::new(&dh, rows, cols),
            MatMut::new(&mut dgate, rows, cols),
            MatMut::new(&mut dup, rows, cols),
        );
        check_gradient("dgate", &gate, &dgate, |gate| {
            weighted(&activate(gate, &up, rows), &dh)
        });
        check_gradient("dup", &up, &dup, |up| {
            weighted(&activate(&gate, up, rows), &dh)
        });

        let h = activate(&gate, &up, rows);
        let (mut a, mut b, mut c) = (gate, up, dh);
        backward_recompute(
            &Threads::single(),
            MatMut::new(&mut a, rows, cols),
            MatMut::new(&mut b, rows, cols),
            MatMut::new(&mut c, rows, cols),
        );
        assert_eq!((a, b), (dgate, dup));
        check_close("h", &c, &h, 1e-15);
    }

    #[test]
    fn f32_on_threads_follows_f64() {
        let (rows, cols) = (200, 21);
        let gate: Vec<f64> = random::<f64>(rows * cols, 1)
            .iter()
            .map(|x| 100.0 * x)
            .collect();
        let up = random::<f64>(rows * cols, 2);
        let expected = activate(&gate, &up, rows);
        let (gate, up) = (narrow(&gate), narrow(&up));
        for threads in &thread_counts() {
            let mut h = vec![0.0; rows * cols];
            let (gate, up) = (Mat::new(&gate, rows, cols), Mat::new(&up, rows, cols));
            forward(threads, gate, up, MatMut::new(&mut h, rows, cols));
            check_close("h", &h, &expected, 1e-6);
        }
    }
}
