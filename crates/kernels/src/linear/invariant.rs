//! The product whose rows do not depend on each other's company.

use crate::simd::dot;
use crate::{Float, Mat, MatMut, Threads};

/// `y = alpha · x·wᵀ + beta · y`, each element reduced in the same order whatever the number of rows, the row's place
/// among them, the number of threads, and the instruction set.
///
/// So a prompt processed in chunks gives the bits of a prompt processed whole, and a sequence decoded in a batch those
/// of one decoded alone. For few rows, where reading the weight is what takes time, it is also the faster product.
///
/// # Shapes
/// `x: [T, K]`, `w: [N, K]` → `y: [T, N]`
///
/// # Panics
/// If the shapes do not agree.
pub fn forward_invariant<F: Float>(
    threads: &Threads,
    alpha: F,
    x: Mat<'_, F>,
    w: Mat<'_, F>,
    beta: F,
    mut y: MatMut<'_, F>,
) {
    assert_eq!(
        (x.num_rows(), w.num_rows()),
        (y.num_rows(), y.num_cols()),
        "the product's shape"
    );
    assert_eq!(
        x.num_cols(),
        w.num_cols(),
        "the inner dimension of the product"
    );
    let _ = threads;
    for row in 0..y.num_rows() {
        for (col, y) in y.row_mut(row).iter_mut().enumerate() {
            let sum = alpha * dot(x.row(row), w.row(col));
            *y = if beta == F::ZERO {
                sum
            } else {
                beta.mul_add(*y, sum)
            };
        }
    }
}
