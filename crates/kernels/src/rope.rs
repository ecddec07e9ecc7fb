//! Rotary position embedding in Hugging Face's layout: the first half of a head pairs with its second half.
//!
//! # Source
//! Su et al. 2021, <https://arxiv.org/abs/2104.09864>; `rotate_half` in transformers' `modeling_llama.py`

use crate::simd::{Op, Simd, dispatch};
use crate::{Float, MatMut, Threads};

/// Tokens that a thread takes at least.
const MIN_ROWS: usize = 64;

/// Cosines and sines of every position and frequency.
#[derive(Clone, Debug)]
pub struct Table<F> {
    /// `[positions, D / 2]`
    cos: Vec<F>,
    /// `[positions, D / 2]`
    sin: Vec<F>,
    half_dim: usize,
}

impl<F: Float> Table<F> {
    /// The angle of frequency `i` at position `p` is `p · inv_freq[i]`, rounded to `F` as transformers rounds it to f32;
    /// both functions of it are multiplied with `attention_factor` (1, unless the model's scaling such as YaRN sets it).
    ///
    /// # Shapes
    /// `inv_freq: [D / 2]`, for positions `0..num_positions`
    #[must_use]
    pub fn new(inv_freq: &[f32], num_positions: usize, attention_factor: f32) -> Self {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        cos.reserve_exact(num_positions * inv_freq.len());
        sin.reserve_exact(num_positions * inv_freq.len());
        for position in 0..num_positions {
            for &inv_freq in inv_freq {
                let angle = F::from_f64(position as f64) * F::from_f64(f64::from(inv_freq));
                let (s, c) = angle.to_f64().sin_cos();
                let factor = F::from_f64(f64::from(attention_factor));
                cos.push(F::from_f64(c) * factor);
                sin.push(F::from_f64(s) * factor);
            }
        }
        Self {
            cos,
            sin,
            half_dim: inv_freq.len(),
        }
    }

    /// `D`, the head dim that it turns.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.half_dim * 2
    }

    /// Both tables, `[positions, D / 2]` each.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    pub(crate) fn cos_sin(&self) -> (&[F], &[F]) {
        (&self.cos, &self.sin)
    }

    /// Number of positions it reaches.
    #[must_use]
    pub fn num_positions(&self) -> usize {
        self.cos.len().checked_div(self.half_dim).unwrap_or(0)
    }
}

/// Turns every head of every token by its position's angles, in place:
/// `(a, b) → (a·cos − b·sin, b·cos + a·sin)` for `a` in the first half of the head and `b` beside it in the second.
///
/// # Shapes
/// `x: [T, H · D]`, `positions: [T]`
///
/// # Panics
/// If the shapes do not agree or a position is not in the table.
pub fn forward<F: Float>(threads: &Threads, table: &Table<F>, positions: &[u32], x: MatMut<'_, F>) {
    check(table, positions, &x);
    threads.split((x, positions), MIN_ROWS, |(x, positions)| {
        dispatch(Turn {
            table,
            positions,
            x,
            sign: F::ONE,
        });
    });
}

/// Turns back: the gradient of [`forward`], and its inverse where the attention factor is 1.
///
/// # Shapes
/// `dx: [T, H · D]`, `positions: [T]`
///
/// # Panics
/// If the shapes do not agree or a position is not in the table.
pub fn backward<F: Float>(
    threads: &Threads,
    table: &Table<F>,
    positions: &[u32],
    dx: MatMut<'_, F>,
) {
    check(table, positions, &dx);
    threads.split((dx, positions), MIN_ROWS, |(x, positions)| {
        dispatch(Turn {
            table,
            positions,
            x,
            sign: -F::ONE,
        });
    });
}

fn check<F: Float>(table: &Table<F>, positions: &[u32], x: &MatMut<'_, F>) {
    assert_eq!(positions.len(), x.num_rows(), "one position for each token");
    assert_eq!(
        x.num_cols() % table.head_dim(),
        0,
        "whole heads of {}",
        table.head_dim()
    );
}

struct Turn<'a, F> {
    table: &'a Table<F>,
    positions: &'a [u32],
    x: MatMut<'a, F>,
    sign: F,
}

impl<F: Float> Op for Turn<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        let half = self.table.half_dim;
        for (row, &position) in self.positions.iter().enumerate() {
            let start = position as usize * half;
            let cos = &self.table.cos[start..start + half];
            let sin = &self.table.sin[start..start + half];
            for head in self.x.row_mut(row).chunks_exact_mut(2 * half) {
                let (first, second) = head.split_at_mut(half);
                for (((a, b), &cos), &sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    let sin = sin * self.sign;
                    let (from_a, from_b) = (*a, *b);
                    *a = from_a * cos - from_b * sin;
                    *b = from_b * cos + from_a * sin;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_close, check_gradient, random, thread_counts, weighted};

    const INV_FREQ: [f32; 3] = [1.0, 0.1, 0.01];

    #[test]
    fn halves_pair_up_as_in_rotate_half() {
        let table = Table::<f64>::new(&INV_FREQ, 10, 1.0);
        assert_eq!((table.head_dim(), table.num_positions()), (6, 10));
        let x: Vec<f64> = random(12, 1);
        let mut turned = x.clone();
        forward(
            &Threads::single(),
            &table,
            &[9],
            MatMut::new(&mut turned, 1, 12),
        );
        for head in [0, 6] {
            for i in 0..3 {
                let (sin, cos) = (9.0 * f64::from(INV_FREQ[i])).sin_cos();
                let (a, b) = (x[head + i], x[head + 3 + i]);
                assert!((turned[head + i] - (a * cos - b * sin)).abs() < 1e-15);
                assert!((turned[head + 3 + i] - (b * cos + a * sin)).abs() < 1e-15);
            }
        }
    }

    #[test]
    fn backward_is_the_gradient_and_the_inverse() {
        let positions = [0, 1, 5, 0, 1];
        let (x, dy) = (random(60, 1), random::<f64>(60, 2));
        let table = Table::new(&INV_FREQ, 6, 1.3);
        let turn = |x: &[f64]| {
            let mut y = x.to_vec();
            forward(
                &Threads::single(),
                &table,
                &positions,
                MatMut::new(&mut y, 5, 12),
            );
            y
        };
        let mut dx = dy.clone();
        backward(
            &Threads::single(),
            &table,
            &positions,
            MatMut::new(&mut dx, 5, 12),
        );
        check_gradient("dx", &x, &dx, |x| weighted(&turn(x), &dy));

        let table = Table::new(&INV_FREQ, 6, 1.0);
        let mut y = x.clone();
        forward(
            &Threads::single(),
            &table,
            &positions,
            MatMut::new(&mut y, 5, 12),
        );
        backward(
            &Threads::single(),
            &table,
            &positions,
            MatMut::new(&mut y, 5, 12),
        );
        check_close("x", &y, &x, 1e-15);
    }

    #[test]
    fn angles_are_rounded_as_in_transformers() {
        let table = Table::<f32>::new(&[0.1], 4000, 1.0);
        assert_eq!(
            table.cos[3999],
            f64::from(3999.0_f32 * 0.1_f32).cos() as f32
        );
    }

    #[test]
    fn threads_turn_alike() {
        let table = Table::<f32>::new(&INV_FREQ, 500, 1.0);
        let positions: Vec<u32> = (0..500).collect();
        let results = thread_counts().map(|threads| {
            let mut x = random(500 * 6, 1);
            forward(&threads, &table, &positions, MatMut::new(&mut x, 500, 6));
            x
        });
        assert_eq!(results[0], results[1]);
    }
}
