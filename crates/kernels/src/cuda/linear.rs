//! Products with weights on a GPU, by cuBLAS; see [`crate::linear`]. Sums are kept in f32, TF32 is off.

use super::launch::{Arguments, Kernel};
use super::memory::Number;
use super::{Gpu, Mat, MatMut, Result, View, ViewMut};

/// Rows that one thread adds up in [`backward_bias`].
const SHARE: usize = 256;

/// A product of row-major matrices: `c = alpha · op(a)·op(b) + beta · c`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) inner: usize,
    /// Whether `a` lies as `[inner, rows]`.
    pub(super) a_transposed: bool,
    /// Whether `b` lies as `[cols, inner]`.
    pub(super) b_transposed: bool,
    pub(super) alpha: f32,
    pub(super) beta: f32,
}

/// `y = alpha · x·wᵀ + beta · y`, where `y` may be f32 whatever the others are.
///
/// # Shapes
/// `x: [T, K]`, `w: [N, K]` → `y: [T, N]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree, or `y` is neither f32 nor of the others' type.
pub fn forward<T: Number, O: Number>(
    gpu: &Gpu,
    alpha: f32,
    x: Mat<'_, T>,
    w: Mat<'_, T>,
    beta: f32,
    y: &MatMut<'_, O>,
) -> Result<()> {
    let product = Product {
        rows: x.num_rows(),
        cols: w.num_rows(),
        inner: x.num_cols(),
        a_transposed: false,
        b_transposed: true,
        alpha,
        beta,
    };
    assert_eq!(w.num_cols(), product.inner, "the weight's columns");
    gpu.product(product, x, w, y)
}

/// `dx = alpha · dy·w + beta · dx`
///
/// # Shapes
/// `dy: [T, N]`, `w: [N, K]` → `dx: [T, K]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
pub fn backward_input<T: Number>(
    gpu: &Gpu,
    alpha: f32,
    dy: Mat<'_, T>,
    w: Mat<'_, T>,
    beta: f32,
    dx: &MatMut<'_, T>,
) -> Result<()> {
    let product = Product {
        rows: dy.num_rows(),
        cols: w.num_cols(),
        inner: dy.num_cols(),
        a_transposed: false,
        b_transposed: false,
        alpha,
        beta,
    };
    assert_eq!(w.num_rows(), product.inner, "the weight's rows");
    gpu.product(product, dy, w, dx)
}

/// `dw = alpha · dyᵀ·x + beta · dw`, where `dw` may be f32 whatever the others are.
///
/// # Shapes
/// `dy: [T, N]`, `x: [T, K]` → `dw: [N, K]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree, or `dw` is neither f32 nor of the others' type.
pub fn backward_weight<T: Number, O: Number>(
    gpu: &Gpu,
    alpha: f32,
    dy: Mat<'_, T>,
    x: Mat<'_, T>,
    beta: f32,
    dw: &MatMut<'_, O>,
) -> Result<()> {
    let product = Product {
        rows: dy.num_cols(),
        cols: x.num_cols(),
        inner: dy.num_rows(),
        a_transposed: true,
        b_transposed: false,
        alpha,
        beta,
    };
    assert_eq!(x.num_rows(), product.inner, "as many rows");
    gpu.product(product, dy, x, dw)
}

/// `y[t] += bias`
///
/// # Shapes
/// `bias: [N]`, `y: [T, N]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
pub fn add_bias<T: Number>(gpu: &Gpu, bias: View<'_, T>, y: &MatMut<'_, T>) -> Result<()> {
    let (rows, cols) = (y.num_rows(), y.num_cols());
    assert_eq!(bias.len(), cols, "the bias's length");
    let arguments = Arguments::new()
        .view(bias)
        .int(cols)
        .long(y.stride())
        .out_mat(y);
    let kernel = Kernel::of::<T>("cast", "add_bias").piece_each(rows, cols);
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel, arguments) }
}

/// `dbias += Σ_t dy[t]`, in f32 if it is f32.
///
/// # Shapes
/// `dy: [T, N]`, `dbias: [N]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver), [`Error::OutOfMemory`](super::Error::OutOfMemory).
///
/// # Panics
/// If the shapes do not agree.
pub fn backward_bias<T: Number, O: Number>(
    gpu: &Gpu,
    dy: Mat<'_, T>,
    dbias: &ViewMut<'_, O>,
) -> Result<()> {
    let (rows, cols) = (dy.num_rows(), dy.num_cols());
    assert_eq!(dbias.len(), cols, "the bias's length");
    let shares = rows.div_ceil(SHARE);
    let partial = gpu.alloc::<f32>(shares * cols)?;
    let arguments = Arguments::new()
        .mat(dy)
        .int(rows)
        .int(cols)
        .long(dy.stride())
        .int(SHARE)
        .view(partial.view());
    let kernel =
        Kernel::of::<T>("columns", "columns_sum").grid([cols.div_ceil(128), shares, 1], 128);
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel, arguments)? };
    add_shares(gpu, partial.view(), shares, dbias)
}

/// `out[c] += Σ partial[share, c]`, in the order of the shares.
pub(super) fn add_shares<T: Number>(
    gpu: &Gpu,
    partial: View<'_, f32>,
    shares: usize,
    out: &ViewMut<'_, T>,
) -> Result<()> {
    let cols = out.len();
    let arguments = Arguments::new()
        .view(partial)
        .int(shares)
        .int(cols)
        .out(out);
    let kernel = Kernel::of::<T>("columns", "columns_finish").grid([cols.div_ceil(128), 1, 1], 128);
    // SAFETY: the kernel's parameters; `partial` is `[shares, cols]`.
    unsafe { gpu.launch(&kernel, arguments) }
}
