//! The LM head and its loss on a GPU, chunk by chunk; see [`crate::linear_cross_entropy`].

use super::launch::{Arguments, Kernel, width};
use super::memory::Number;
use super::{Gpu, Mat, MatMut, Result, View, ViewMut, linear};

/// Logits that exist at once: 512 MiB in 16 bits, enough rows to keep a large GPU busy.
const MAX_LOGITS: usize = 1 << 28;
/// Threads of a row at most.
const MAX_THREADS: u32 = 1024;

/// Rows of a chunk; the scratch holds as many rows of logits.
#[must_use]
pub fn chunk_rows(rows: usize, vocab_size: usize) -> usize {
    (MAX_LOGITS / vocab_size.max(1)).max(1).min(rows)
}

/// As [`crate::linear_cross_entropy::forward`], without the sum: the loss of each row.
///
/// # Shapes
/// `hidden: [N, C]`, `head: [V, C]`, `labels: [N]`, `scratch: [chunk_rows(N, V), V]` → `losses: [N]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
pub fn forward<T: Number>(
    gpu: &Gpu,
    hidden: Mat<'_, T>,
    head: Mat<'_, T>,
    labels: View<'_, u32>,
    losses: &ViewMut<'_, f32>,
    scratch: &mut ViewMut<'_, T>,
) -> Result<()> {
    chunks(
        gpu,
        "cross_entropy_forward",
        hidden,
        head,
        labels,
        losses,
        scratch,
        |_, _| Ok(()),
    )
}

/// As [`crate::linear_cross_entropy::forward_backward`], without the sum, for a head that is not trained:
/// `dhidden = scale · (softmax(logits) − onehot(label))·head`, where `scale` is `1 / denom`, times the loss scale.
///
/// # Shapes
/// as [`forward`]; `dhidden: [N, C]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
#[expect(clippy::too_many_arguments, reason = "four inputs, three outputs")]
pub fn forward_backward<T: Number>(
    gpu: &Gpu,
    hidden: Mat<'_, T>,
    head: Mat<'_, T>,
    labels: View<'_, u32>,
    scale: f32,
    dhidden: &mut MatMut<'_, T>,
    losses: &ViewMut<'_, f32>,
    scratch: &mut ViewMut<'_, T>,
) -> Result<()> {
    assert_eq!(
        (dhidden.num_rows(), dhidden.num_cols()),
        (hidden.num_rows(), hidden.num_cols()),
        "dhidden's shape"
    );
    let name = "cross_entropy_backward";
    chunks(
        gpu,
        name,
        hidden,
        head,
        labels,
        losses,
        scratch,
        |start, dlogits| {
            let dhidden = dhidden.reborrow().rows(start..start + dlogits.num_rows());
            linear::backward_input(gpu, scale, dlogits, head, 0.0, &dhidden)
        },
    )
}

#[expect(clippy::too_many_arguments, reason = "both passes, one walk")]
fn chunks<T: Number>(
    gpu: &Gpu,
    base: &str,
    hidden: Mat<'_, T>,
    head: Mat<'_, T>,
    labels: View<'_, u32>,
    losses: &ViewMut<'_, f32>,
    scratch: &mut ViewMut<'_, T>,
    mut use_gradient: impl FnMut(usize, Mat<'_, T>) -> Result<()>,
) -> Result<()> {
    let (rows, vocab) = (hidden.num_rows(), head.num_rows());
    assert_eq!(labels.len(), rows, "one label for each row");
    assert_eq!(losses.len(), rows, "one loss for each row");
    let chunk = chunk_rows(rows, vocab);
    assert_eq!(scratch.len(), chunk * vocab, "the scratch's length");
    for start in (0..rows).step_by(chunk.max(1)) {
        let all = MatMut::new(scratch.reborrow(), chunk, vocab);
        let chunk = start..rows.min(start + chunk);
        let logits = all.rows(0..chunk.len());
        linear::forward(gpu, 1.0, hidden.rows(chunk.clone()), head, 0.0, &logits)?;
        let wide = width::<T>([logits.is_aligned()]);
        let arguments = Arguments::new()
            .out_mat(&logits)
            .view(labels.part(chunk.clone()))
            .int(vocab)
            .view(losses.as_view().part(chunk.clone()));
        let kernel = Kernel::wide::<T>("cross_entropy", base, wide).row_each(
            chunk.len(),
            vocab / wide,
            MAX_THREADS,
        );
        // SAFETY: the kernel's parameters, with the shapes just compared; labels are the caller's promise to be in the
        // vocabulary, which the kernel checks before it reads.
        unsafe { gpu.launch(&kernel, arguments)? };
        use_gradient(start, logits.as_mat())?;
    }
    Ok(())
}
