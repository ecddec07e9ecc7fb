//! The LM head and its loss in one pass over chunks of rows, so that the logits of a batch never exist at once.
//!
//! # Source
//! Wijmans et al. 2024 (the idea), <https://arxiv.org/abs/2411.09009>

use crate::linear::{normal, product, transposed};
use crate::{Float, Mat, MatMut, Threads};

/// `Σ_n −log softmax(hidden_n·headᵀ)[labels_n]`, without gradients; for evaluation.
///
/// `scratch` holds the logits of a chunk and keeps its memory from call to call.
///
/// # Shapes
/// `hidden: [N, C]`, `head: [V, C]`, `labels: [N]`
///
/// # Panics
/// If the shapes do not agree or a label is not in the vocabulary.
pub fn forward<F: Float>(
    threads: &Threads,
    hidden: Mat<'_, F>,
    head: Mat<'_, F>,
    labels: &[u32],
    scratch: &mut Vec<F>,
) -> f64 {
    chunks(threads, hidden, head, labels, scratch, |_, _| {})
}

/// As [`forward`], and the gradient of `sum / denom`: `dhidden = (softmax(logits) − onehot(label))·head / denom`.
///
/// `denom` is the number of labels of the whole optimizer step, over all micro-batches. The head is frozen: it gets no
/// gradient.
///
/// # Shapes
/// `hidden: [N, C]`, `head: [V, C]`, `labels: [N]` → `dhidden: [N, C]`
///
/// # Panics
/// If the shapes do not agree or a label is not in the vocabulary.
pub fn forward_backward<F: Float>(
    threads: &Threads,
    hidden: Mat<'_, F>,
    head: Mat<'_, F>,
    labels: &[u32],
    denom: f64,
    mut dhidden: MatMut<'_, F>,
    scratch: &mut Vec<F>,
) -> f64 {
    let alpha = F::from_f64(1.0 / denom);
    chunks(threads, hidden, head, labels, scratch, |rows, dlogits| {
        let (_, rest) = dhidden.reborrow().split_rows(rows.start);
        let (dhidden, _) = rest.split_rows(rows.len());
        product(
            threads,
            alpha,
            normal(dlogits),
            normal(head),
            F::ZERO,
            dhidden,
        );
    })
}

fn chunks<F: Float>(
    threads: &Threads,
    hidden: Mat<'_, F>,
    head: Mat<'_, F>,
    labels: &[u32],
    scratch: &mut Vec<F>,
    mut use_gradient: impl FnMut(std::ops::Range<usize>, Mat<'_, F>),
) -> f64 {
    assert_eq!(labels.len(), hidden.num_rows(), "one label for each row");
    let vocab = head.num_rows();
    let chunk = 256;
    scratch.resize(chunk * vocab, F::ZERO);
    let mut loss = 0.0;
    let mut start = 0;
    while start < labels.len() {
        let rows = start..labels.len().min(start + chunk);
        let logits = &mut scratch[..rows.len() * vocab];
        let view = MatMut::new(logits, rows.len(), vocab);
        product(
            threads,
            F::ONE,
            normal(hidden.rows(rows.clone())),
            transposed(head),
            F::ZERO,
            view,
        );
        for (row, &label) in logits.chunks_mut(vocab).zip(&labels[rows.clone()]) {
            let max = row.iter().copied().fold(F::NEG_INFINITY, F::larger);
            let sum: f64 = row.iter().map(|&x| (x - max).to_f64().exp()).sum();
            loss += sum.ln() - (row[label as usize] - max).to_f64();
            for x in row.iter_mut() {
                *x = F::from_f64((*x - max).to_f64().exp() / sum);
            }
            row[label as usize] -= F::ONE;
        }
        use_gradient(rows.clone(), Mat::new(logits, rows.len(), vocab));
        start = rows.end;
    }
    loss
}
