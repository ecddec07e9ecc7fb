//! SwiGLU on a GPU; see [`crate::swiglu`]. Gate and up lie side by side in each row.

use super::launch::{Arguments, Kernel, width};
use super::memory::Number;
use super::{Gpu, Mat, MatMut, Result};

/// `h = silu(gate) ⊙ up`
///
/// # Shapes
/// `gate_up: [T, 2·I]` → `h: [T, I]`, whose rows may lie apart
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
pub fn forward<T: Number>(gpu: &Gpu, gate_up: Mat<'_, T>, h: &MatMut<'_, T>) -> Result<()> {
    let (rows, inner) = (h.num_rows(), h.num_cols());
    check(rows, inner, gate_up);
    let wide = width::<T>([gate_up.is_aligned(), h.is_aligned()]);
    let kernel = Kernel::wide::<T>("swiglu", "swiglu_forward", wide);
    let arguments = Arguments::new()
        .mat(gate_up)
        .long(gate_up.stride())
        .int(inner)
        .long(h.stride())
        .out_mat(h);
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel.piece_each(rows, inner / wide), arguments) }
}

/// As [`crate::swiglu::backward_recompute`], in place: `gate_up` becomes its own gradient, `dh` the forward output.
///
/// # Shapes
/// `gate_up: [T, 2·I]`, `dh: [T, I]`, whose rows may lie apart
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
pub fn backward_recompute<T: Number>(
    gpu: &Gpu,
    gate_up: &MatMut<'_, T>,
    dh: &MatMut<'_, T>,
) -> Result<()> {
    let (rows, inner) = (dh.num_rows(), dh.num_cols());
    check(rows, inner, gate_up.as_mat());
    let wide = width::<T>([gate_up.is_aligned(), dh.is_aligned()]);
    let kernel = Kernel::wide::<T>("swiglu", "swiglu_backward", wide);
    let arguments = Arguments::new()
        .out_mat(gate_up)
        .long(gate_up.stride())
        .int(inner)
        .long(dh.stride())
        .out_mat(dh);
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel.piece_each(rows, inner / wide), arguments) }
}

fn check<T>(rows: usize, inner: usize, gate_up: Mat<'_, T>) {
    assert_eq!(
        (gate_up.num_rows(), gate_up.num_cols()),
        (rows, 2 * inner),
        "the shape of gate and up"
    );
}
