//! Dropout on a GPU, of the same numbers as on the CPU; see [`crate::noise`].

use super::launch::{Arguments, Kernel};
use super::memory::Number;
use super::{Gpu, Mat, MatMut, Result, View};

/// As [`crate::noise::dropout`], with keys [derived](crate::noise::derive) from the rows' for one use of them.
///
/// # Shapes
/// `keys: [T]`, `x`, `out: [T, C]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
pub fn dropout<T: Number>(
    gpu: &Gpu,
    p: f64,
    keys: (View<'_, u64>, u64),
    x: Mat<'_, T>,
    out: &MatMut<'_, T>,
) -> Result<()> {
    run(gpu, "dropout", p, keys, x, out)
}

/// As [`crate::noise::dropout_backward`], with keys as [`dropout`]'s: adds to `dx`.
///
/// # Shapes
/// `keys: [T]`, `dout`, `dx: [T, C]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
pub fn dropout_backward<T: Number>(
    gpu: &Gpu,
    p: f64,
    keys: (View<'_, u64>, u64),
    dout: Mat<'_, T>,
    dx: &MatMut<'_, T>,
) -> Result<()> {
    run(gpu, "dropout_add", p, keys, dout, dx)
}

fn run<T: Number>(
    gpu: &Gpu,
    base: &str,
    p: f64,
    (keys, use_): (View<'_, u64>, u64),
    x: Mat<'_, T>,
    out: &MatMut<'_, T>,
) -> Result<()> {
    let (rows, cols) = (x.num_rows(), x.num_cols());
    assert_eq!(keys.len(), rows, "one key for each row");
    assert_eq!(
        (out.num_rows(), out.num_cols()),
        (rows, cols),
        "the output's shape"
    );
    let (threshold, scale) = crate::noise::threshold_and_scale(p);
    let arguments = Arguments::new()
        .unsigned(threshold)
        .float(scale as f32)
        .view(keys)
        .long(use_ as usize)
        .mat(x)
        .int(cols)
        .long(x.stride())
        .long(out.stride())
        .out_mat(out);
    let kernel = Kernel::of::<T>("noise", base).piece_each(rows, cols);
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel, arguments) }
}
