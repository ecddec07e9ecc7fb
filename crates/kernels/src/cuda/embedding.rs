//! Rows of a table by their ids on a GPU; see [`crate::embedding`]. Ids are the caller's promise to lie in the table.

use super::launch::{Arguments, Kernel, width};
use super::memory::Number;
use super::{Gpu, Mat, MatMut, Result, View};

/// As [`crate::embedding::forward`].
///
/// # Shapes
/// `table: [V, C]`, `ids: [T]` → `out: [T, C]`, whose rows may lie apart
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
pub fn forward<T: Number>(
    gpu: &Gpu,
    table: Mat<'_, T>,
    ids: View<'_, u32>,
    out: &MatMut<'_, T>,
) -> Result<()> {
    run(gpu, "embedding_gather", table, ids, out, out.num_rows())
}

/// `out[ids[t]] = dout[t]`, where each id is there once: rows back to where they were gathered from.
///
/// # Shapes
/// `dout: [T, C]`, `ids: [T]` → `out: [V, C]`, whose rows may lie apart
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
pub fn scatter<T: Number>(
    gpu: &Gpu,
    dout: Mat<'_, T>,
    ids: View<'_, u32>,
    out: &MatMut<'_, T>,
) -> Result<()> {
    run(gpu, "embedding_scatter", dout, ids, out, dout.num_rows())
}

fn run<T: Number>(
    gpu: &Gpu,
    base: &str,
    from: Mat<'_, T>,
    ids: View<'_, u32>,
    to: &MatMut<'_, T>,
    tokens: usize,
) -> Result<()> {
    let cols = from.num_cols();
    assert_eq!(ids.len(), tokens, "one id for each token");
    assert_eq!(to.num_cols(), cols, "as many columns");
    let wide = width::<T>([from.is_aligned(), to.is_aligned()]);
    let arguments = Arguments::new()
        .mat(from)
        .long(from.stride())
        .view(ids)
        .int(cols)
        .long(to.stride())
        .out_mat(to);
    let kernel = Kernel::wide::<T>("embedding", base, wide).piece_each(tokens, cols / wide);
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel, arguments) }
}

/// As [`crate::embedding::backward`]: `table[ids[t]] += dout[t]` in the order of the tokens.
///
/// # Shapes
/// `dout: [T, C]`, `ids: [T]` → `table: [V, C]`, without gaps
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
pub fn backward<T: Number>(
    gpu: &Gpu,
    ids: View<'_, u32>,
    dout: Mat<'_, T>,
    table: &MatMut<'_, T>,
) -> Result<()> {
    let (tokens, cols) = (dout.num_rows(), dout.num_cols());
    assert_eq!(ids.len(), tokens, "one id for each token");
    assert_eq!(table.num_cols(), cols, "as many columns");
    assert_eq!(
        (dout.stride(), table.stride()),
        (cols, cols),
        "rows without gaps"
    );
    let arguments = Arguments::new()
        .mat(dout)
        .view(ids)
        .int(tokens)
        .int(cols)
        .out_mat(table);
    let kernel = Kernel::of::<T>("embedding", "embedding_add");
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel.grid([cols.div_ceil(128), 1, 1], 128), arguments) }
}
