//! Products with a weight: forward, the two backward products, and the bias.
//!
//! A weight is stored as checkpoints store it, `w: [N, K]` for `K` inputs and `N` outputs. `alpha` and `beta` make the
//! low-rank updates cheap: LoRA's `y += s · (x·Aᵀ)·Bᵀ` is [`forward`] with `alpha = s, beta = 1` on the saved `x·Aᵀ`.

mod invariant;
mod product;

pub use invariant::forward_invariant;
pub(crate) use product::{normal, product, transposed};

use crate::simd::{Op, dispatch};
use crate::{Float, Mat, MatMut, Threads};

/// `y = alpha · x·wᵀ + beta · y`. With `beta = 0`, what `y` held does not matter.
///
/// The fast product for training. Its rounding may depend on the number of rows; see [`forward_invariant`].
///
/// # Shapes
/// `x: [T, K]`, `w: [N, K]` → `y: [T, N]`
///
/// # Panics
/// If the shapes do not agree.
pub fn forward<F: Float>(
    threads: &Threads,
    alpha: F,
    x: Mat<'_, F>,
    w: Mat<'_, F>,
    beta: F,
    y: MatMut<'_, F>,
) {
    product(threads, alpha, normal(x), transposed(w), beta, y);
}

/// `dx = alpha · dy·w + beta · dx`, the gradient of [`forward`]'s input.
///
/// # Shapes
/// `dy: [T, N]`, `w: [N, K]` → `dx: [T, K]`
///
/// # Panics
/// If the shapes do not agree.
pub fn backward_input<F: Float>(
    threads: &Threads,
    alpha: F,
    dy: Mat<'_, F>,
    w: Mat<'_, F>,
    beta: F,
    dx: MatMut<'_, F>,
) {
    product(threads, alpha, normal(dy), normal(w), beta, dx);
}

/// `dw = alpha · dyᵀ·x + beta · dw`, the gradient of [`forward`]'s weight; `beta = 1` accumulates over micro-batches.
///
/// # Shapes
/// `dy: [T, N]`, `x: [T, K]` → `dw: [N, K]`
///
/// # Panics
/// If the shapes do not agree.
pub fn backward_weight<F: Float>(
    threads: &Threads,
    alpha: F,
    dy: Mat<'_, F>,
    x: Mat<'_, F>,
    beta: F,
    dw: MatMut<'_, F>,
) {
    product(threads, alpha, transposed(dy), normal(x), beta, dw);
}

/// `y += bias` on every row.
///
/// # Shapes
/// `bias: [N]`, `y: [T, N]`
///
/// # Panics
/// If the shapes do not agree.
pub fn add_bias<F: Float>(threads: &Threads, bias: &[F], y: MatMut<'_, F>) {
    assert_eq!(bias.len(), y.num_cols(), "one bias for each column");
    threads.split(y, 256, |y| dispatch(AddBias { bias, y }));
}

/// `dbias += Σ_t dy_t`, the gradient of [`add_bias`].
///
/// # Shapes
/// `dy: [T, N]` → `dbias: [N]`
///
/// # Panics
/// If the shapes do not agree.
pub fn backward_bias<F: Float>(dy: Mat<'_, F>, dbias: &mut [F]) {
    assert_eq!(dbias.len(), dy.num_cols(), "one bias for each column");
    for row in 0..dy.num_rows() {
        for (sum, &d) in dbias.iter_mut().zip(dy.row(row)) {
            *sum += d;
        }
    }
}

struct AddBias<'a, F> {
    bias: &'a [F],
    y: MatMut<'a, F>,
}

impl<F: Float> Op for AddBias<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        for row in 0..self.y.num_rows() {
            for (y, &bias) in self.y.row_mut(row).iter_mut().zip(self.bias) {
                *y += bias;
            }
        }
    }
}
