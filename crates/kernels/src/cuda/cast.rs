//! Numbers from one type to another on a GPU, and sums of matrices.

use super::launch::{Arguments, Kernel};
use super::memory::Number;
use super::{Gpu, Mat, MatMut, Result, View, ViewMut};

/// Blocks of a cast; each goes on where the last one ends.
const MAX_BLOCKS: usize = 4096;

/// `to[i] = from[i]`, rounded to the nearest, ties to even.
///
/// One of the two is f32.
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If lengths differ, or neither type is f32 or both are.
pub fn cast<From: Number, To: Number>(
    gpu: &Gpu,
    from: View<'_, From>,
    to: &ViewMut<'_, To>,
) -> Result<()> {
    assert_eq!(from.len(), to.len(), "as many numbers");
    assert!(
        (From::NAME == "f32") != (To::NAME == "f32"),
        "one of the types is f32"
    );
    let arguments = Arguments::new().view(from).long(from.len()).out(to);
    let kernel = Kernel::named("cast", format!("cast_{}_to_{}", From::NAME, To::NAME));
    let blocks = from.len().div_ceil(256).min(MAX_BLOCKS);
    // SAFETY: the kernel's parameters, with the lengths just compared.
    unsafe { gpu.launch(&kernel.grid([blocks, 1, 1], 256), arguments) }
}

/// `to = alpha · from + beta · to`; where `beta` is 0, what is in `to` does not matter.
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
pub fn axpby<T: Number>(
    gpu: &Gpu,
    alpha: f32,
    from: Mat<'_, T>,
    beta: f32,
    to: &MatMut<'_, T>,
) -> Result<()> {
    let (rows, cols) = (from.num_rows(), from.num_cols());
    assert_eq!(
        (to.num_rows(), to.num_cols()),
        (rows, cols),
        "the same shape"
    );
    let arguments = Arguments::new()
        .float(alpha)
        .mat(from)
        .long(from.stride())
        .float(beta)
        .int(cols)
        .long(to.stride())
        .out_mat(to);
    let kernel = Kernel::of::<T>("cast", "axpby").piece_each(rows, cols);
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel, arguments) }
}
