//! Root mean square normalization on a GPU; see [`crate::rms_norm`].

use super::launch::{Arguments, Kernel, width};
use super::memory::Number;
use super::{Gpu, Mat, MatMut, Result, View, ViewMut};

/// Threads of a row at most.
const MAX_THREADS: u32 = 256;
/// Rows that one thread adds up in [`backward_weight`].
const SHARE: usize = 256;

/// As [`crate::rms_norm::forward`]; rows of `x` and `y` may lie apart.
///
/// # Shapes
/// `x: [T, C]`, `weight: [C]` → `y: [T, C]`, `inv_rms: [T]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
pub fn forward<T: Number>(
    gpu: &Gpu,
    x: Mat<'_, T>,
    weight: View<'_, T>,
    eps: f32,
    y: &MatMut<'_, T>,
    inv_rms: &ViewMut<'_, f32>,
) -> Result<()> {
    let (rows, cols) = (x.num_rows(), x.num_cols());
    assert_eq!(weight.len(), cols, "the weight's length");
    assert_eq!(inv_rms.len(), rows, "one root for each row");
    assert_eq!((y.num_rows(), y.num_cols()), (rows, cols), "y's shape");
    let wide = width::<T>([x.is_aligned(), is_aligned(weight), y.is_aligned()]);
    let kernel = Kernel::wide::<T>("rms_norm", "rms_norm_forward", wide);
    let arguments = Arguments::new()
        .mat(x)
        .view(weight)
        .float(eps)
        .int(cols)
        .long(x.stride())
        .long(y.stride())
        .out_mat(y)
        .out(inv_rms);
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel.row_each(rows, cols / wide, MAX_THREADS), arguments) }
}

/// As [`crate::rms_norm::add_forward`]; rows of `y` may lie apart.
///
/// # Shapes
/// `x`, `residual: [T, C]`, `weight: [C]` → `y: [T, C]`, `inv_rms: [T]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
pub fn add_forward<T: Number>(
    gpu: &Gpu,
    x: View<'_, T>,
    residual: ViewMut<'_, T>,
    weight: View<'_, T>,
    eps: f32,
    y: &MatMut<'_, T>,
    inv_rms: &ViewMut<'_, f32>,
) -> Result<()> {
    let (rows, cols) = (inv_rms.len(), weight.len());
    let x = Mat::new(x, rows, cols);
    let residual = MatMut::new(residual, rows, cols);
    assert_eq!((y.num_rows(), y.num_cols()), (rows, cols), "y's shape");
    let aligned = [x.is_aligned(), residual.is_aligned(), y.is_aligned()];
    let wide = width::<T>(aligned.into_iter().chain([is_aligned(weight)]));
    let kernel = Kernel::wide::<T>("rms_norm", "rms_norm_add_forward", wide);
    let arguments = Arguments::new()
        .mat(x)
        .out_mat(&residual)
        .view(weight)
        .float(eps)
        .int(cols)
        .long(y.stride())
        .out_mat(y)
        .out(inv_rms);
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel.row_each(rows, cols / wide, MAX_THREADS), arguments) }
}

/// As [`crate::rms_norm::backward`]: adds to `dx`. Rows of `x` and `dx` may lie apart.
///
/// # Shapes
/// `x`, `dy: [T, C]`, `weight: [C]`, `inv_rms: [T]` → `dx: [T, C]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
pub fn backward<T: Number>(
    gpu: &Gpu,
    x: Mat<'_, T>,
    weight: View<'_, T>,
    inv_rms: View<'_, f32>,
    dy: View<'_, T>,
    dx: &MatMut<'_, T>,
) -> Result<()> {
    let (rows, cols) = (x.num_rows(), x.num_cols());
    assert_eq!(weight.len(), cols, "the weight's length");
    assert_eq!(inv_rms.len(), rows, "one root for each row");
    assert_eq!((dx.num_rows(), dx.num_cols()), (rows, cols), "dx's shape");
    let dy = Mat::new(dy, rows, cols);
    let aligned = [x.is_aligned(), dy.is_aligned(), dx.is_aligned()];
    let wide = width::<T>(aligned.into_iter().chain([is_aligned(weight)]));
    let kernel = Kernel::wide::<T>("rms_norm", "rms_norm_backward", wide);
    let arguments = Arguments::new()
        .mat(x)
        .view(weight)
        .view(inv_rms)
        .mat(dy)
        .int(cols)
        .long(x.stride())
        .long(dx.stride())
        .out_mat(dx);
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel.row_each(rows, cols / wide, MAX_THREADS), arguments) }
}

/// As [`crate::rms_norm::backward_weight`]: adds to `dweight`.
///
/// # Shapes
/// `x`, `dy: [T, C]`, `inv_rms: [T]` → `dweight: [C]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver), [`Error::OutOfMemory`](super::Error::OutOfMemory).
///
/// # Panics
/// If the shapes do not agree.
pub fn backward_weight<T: Number, O: Number>(
    gpu: &Gpu,
    x: View<'_, T>,
    inv_rms: View<'_, f32>,
    dy: View<'_, T>,
    dweight: &ViewMut<'_, O>,
) -> Result<()> {
    let (rows, cols) = (inv_rms.len(), dweight.len());
    let (x, dy) = (Mat::new(x, rows, cols), Mat::new(dy, rows, cols));
    let shares = rows.div_ceil(SHARE);
    let partial = gpu.alloc::<f32>(shares * cols)?;
    let kernel = Kernel::of::<T>("rms_norm", "rms_norm_backward_weight");
    let arguments = Arguments::new()
        .mat(x)
        .view(inv_rms)
        .mat(dy)
        .int(rows)
        .int(cols)
        .int(SHARE)
        .view(partial.view());
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe {
        gpu.launch(
            &kernel.grid([cols.div_ceil(128), shares, 1], 128),
            arguments,
        )?;
    }
    super::linear::add_shares(gpu, partial.view(), shares, dweight)
}

pub(super) fn is_aligned<T>(view: View<'_, T>) -> bool {
    view.address().is_multiple_of(16)
}
