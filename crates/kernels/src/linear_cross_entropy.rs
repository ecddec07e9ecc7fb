//! The LM head and its loss in one pass over chunks of rows, so that the logits of a batch never exist at once.
//!
//! # Source
//! Wijmans et al. 2024 (the idea), <https://arxiv.org/abs/2411.09009>

use std::ops::Range;

use crate::linear;
use crate::simd::{Op, Simd, dispatch};
use crate::{Float, Mat, MatMut, Threads, Weight, softmax};

/// Logits that exist at once: 64 MiB in f32, unless that is fewer than [`MIN_CHUNK`] rows.
const MAX_LOGITS: usize = 1 << 24;
/// Rows of a chunk at least, or packing the head anew for each chunk would cost more than the products.
const MIN_CHUNK: usize = 64;
/// Rows of a chunk at most; more would only leave the caches.
const MAX_CHUNK: usize = 512;

/// `Σ_n −log softmax(hidden_n·headᵀ)[labels_n]`, without gradients; for evaluation.
///
/// `scratch` holds the logits of a chunk and keeps its memory from call to call.
///
/// # Shapes
/// `hidden: [N, C]`, `head: [V, C]`, `labels: [N]`
///
/// # Panics
/// If the shapes do not agree or a label is not in the vocabulary.
pub fn forward<F: Float, W: Weight<F>>(
    threads: &Threads,
    hidden: Mat<'_, F>,
    head: Mat<'_, W>,
    labels: &[u32],
    scratch: &mut Vec<F>,
) -> f64 {
    chunks(threads, hidden, head, labels, scratch, |_, _| {})
}

/// Where gradients go.
#[derive(Debug)]
pub struct Grads<'a, F> {
    /// Becomes the gradient of the hidden states, `[N, C]`.
    pub dhidden: MatMut<'a, F>,
    /// Is added the gradient of the head, `[V, C]`, where the head is trained.
    pub dhead: Option<MatMut<'a, F>>,
}

/// As [`forward`], and the gradient of `sum / denom`: with `g = (softmax(logits) − onehot(label)) / denom`,
/// `dhidden = g·head` and `dhead += gᵀ·hidden`.
///
/// `denom` is the number of labels of the whole optimizer step, over all micro-batches.
///
/// # Shapes
/// `hidden: [N, C]`, `head: [V, C]`, `labels: [N]` → as in [`Grads`]
///
/// # Panics
/// If the shapes do not agree or a label is not in the vocabulary.
pub fn forward_backward<F: Float, W: Weight<F>>(
    threads: &Threads,
    hidden: Mat<'_, F>,
    head: Mat<'_, W>,
    labels: &[u32],
    denom: f64,
    grads: Grads<'_, F>,
    scratch: &mut Vec<F>,
) -> f64 {
    let alpha = F::from_f64(1.0 / denom);
    let Grads {
        mut dhidden,
        mut dhead,
    } = grads;
    chunks(threads, hidden, head, labels, scratch, |rows, dlogits| {
        let cols = dhidden.num_cols();
        if let Some(dhead) = &mut dhead {
            let hidden = hidden.rows(rows.clone());
            linear::backward_weight(threads, alpha, dlogits, hidden, F::ONE, dhead.reborrow());
        }
        let dhidden = dhidden.reborrow().block(rows, 0..cols);
        linear::backward_input(threads, alpha, dlogits, head, F::ZERO, dhidden);
    })
}

/// Walks the rows chunk by chunk, handing on where a chunk starts and its `softmax(logits) − onehot(label)`.
fn chunks<F: Float, W: Weight<F>>(
    threads: &Threads,
    hidden: Mat<'_, F>,
    head: Mat<'_, W>,
    labels: &[u32],
    scratch: &mut Vec<F>,
    mut use_gradient: impl FnMut(Range<usize>, Mat<'_, F>),
) -> f64 {
    assert_eq!(labels.len(), hidden.num_rows(), "one label for each row");
    let vocab = head.num_rows();
    let chunk = (MAX_LOGITS / vocab.max(1))
        .clamp(MIN_CHUNK, MAX_CHUNK)
        .min(labels.len());
    let mut losses = vec![0.0; chunk];
    if scratch.len() < chunk * vocab {
        scratch.resize(chunk * vocab, F::ZERO);
    }
    let mut loss = 0.0;
    for start in (0..labels.len()).step_by(chunk.max(1)) {
        let rows = start..labels.len().min(start + chunk);
        let mut logits = MatMut::new(&mut scratch[..rows.len() * vocab], rows.len(), vocab);
        let chunk_hidden = hidden.rows(rows.clone());
        linear::forward(
            threads,
            F::ONE,
            chunk_hidden,
            head,
            F::ZERO,
            logits.reborrow(),
        );
        let losses = &mut losses[..rows.len()];
        let parts = (logits.reborrow(), &labels[rows.clone()], &mut *losses);
        threads.split(parts, 8, |(logits, labels, losses)| {
            dispatch(CrossEntropy {
                logits,
                labels,
                losses,
            });
        });
        loss += losses.iter().sum::<f64>();
        use_gradient(rows, logits.as_mat());
    }
    loss
}

/// The loss of each row, and its logits to their gradient.
struct CrossEntropy<'a, F> {
    logits: MatMut<'a, F>,
    labels: &'a [u32],
    losses: &'a mut [f64],
}

impl<F: Float> Op for CrossEntropy<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for (row, (&label, loss)) in self.labels.iter().zip(self.losses).enumerate() {
            let (row, label) = (self.logits.row_mut(row), label as usize);
            let max = softmax::max(row);
            let target = (row[label] - max).to_f64();
            let sum = softmax::exp_and_sum(row, F::ONE, max);
            *loss = sum.ln() - target;
            let inverse = F::from_f64(1.0 / sum);
            for p in row.iter_mut() {
                *p *= inverse;
            }
            row[label] -= F::ONE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_close, check_gradient, narrow, random, thread_counts};

    fn loss(hidden: &[f64], head: &[f64], labels: &[u32], cols: usize) -> f64 {
        let (hidden, head) = (
            Mat::new(hidden, labels.len(), cols),
            Mat::new(head, head.len() / cols, cols),
        );
        forward(&Threads::single(), hidden, head, labels, &mut Vec::new())
    }

    #[test]
    fn loss_follows_its_definition() {
        let (hidden, head, labels) = (random::<f64>(12, 1), random::<f64>(30, 2), [9, 0, 4, 4]);
        let mut expected = 0.0;
        for (hidden, &label) in hidden.chunks(3).zip(&labels) {
            let logits: Vec<f64> = head
                .chunks(3)
                .map(|w| w.iter().zip(hidden).map(|(w, h)| w * h).sum())
                .collect();
            expected += logits.iter().map(|x| x.exp()).sum::<f64>().ln() - logits[label as usize];
        }
        assert!((loss(&hidden, &head, &labels, 3) - expected).abs() < 1e-12);
        assert_eq!(loss(&[], &head, &[], 3), 0.0);
    }

    #[test]
    fn gradient_matches_finite_differences() {
        let (rows, cols, vocab) = (5, 7, 19);
        let (hidden, head, labels) = (
            random(rows * cols, 1),
            random(vocab * cols, 2),
            [3, 0, 18, 3, 7],
        );
        let (mut dhidden, mut dhead) = (vec![0.0; rows * cols], vec![0.25; vocab * cols]);
        let (h, w) = (Mat::new(&hidden, rows, cols), Mat::new(&head, vocab, cols));
        let grads = Grads {
            dhidden: MatMut::new(&mut dhidden, rows, cols),
            dhead: Some(MatMut::new(&mut dhead, vocab, cols)),
        };
        let threads = Threads::single();
        let sum = forward_backward(&threads, h, w, &labels, 11.0, grads, &mut Vec::new());
        assert_eq!(sum, loss(&hidden, &head, &labels, cols));
        dhead.iter_mut().for_each(|d| *d -= 0.25); // it was added to
        check_gradient("dhead", &head, &dhead, |head| {
            loss(&hidden, head, &labels, cols) / 11.0
        });
        check_gradient("dhidden", &hidden, &dhidden, |hidden| {
            loss(hidden, &head, &labels, cols) / 11.0
        });
    }

    #[test]
    fn chunks_and_threads_and_f32_agree() {
        let (rows, cols, vocab) = (2 * MAX_CHUNK + 3, 5, 1050);
        let (hidden, head) = (random(rows * cols, 1), random::<f64>(vocab * cols, 2));
        let labels: Vec<u32> = (0..rows as u32).map(|row| row * 7 % vocab as u32).collect();
        // Row by row there is only ever one chunk.
        let expected: f64 = hidden
            .chunks(cols)
            .zip(&labels)
            .map(|(hidden, &label)| loss(hidden, &head, &[label], cols))
            .sum();
        let (mut expected_dhidden, mut expected_dhead) =
            (vec![0.0; rows * cols], vec![0.0; vocab * cols]);
        for ((hidden, &label), dhidden) in hidden
            .chunks(cols)
            .zip(&labels)
            .zip(expected_dhidden.chunks_mut(cols))
        {
            let (h, w) = (Mat::new(hidden, 1, cols), Mat::new(&head, vocab, cols));
            let grads = Grads {
                dhidden: MatMut::new(dhidden, 1, cols),
                dhead: Some(MatMut::new(&mut expected_dhead, vocab, cols)),
            };
            let threads = Threads::single();
            forward_backward(&threads, h, w, &[label], 2.0, grads, &mut Vec::new());
        }
        let (hidden, head) = (narrow(&hidden), narrow(&head));
        let (hidden, head) = (Mat::new(&hidden, rows, cols), Mat::new(&head, vocab, cols));
        for threads in &thread_counts() {
            let (mut scratch, mut dhidden) = (Vec::new(), vec![0.0_f32; rows * cols]);
            let mut dhead = vec![0.0_f32; vocab * cols];
            let sum = forward(threads, hidden, head, &labels, &mut scratch);
            assert!(
                (sum / expected - 1.0).abs() < 1e-6,
                "{sum}, expected {expected}"
            );
            let grads = Grads {
                dhidden: MatMut::new(&mut dhidden, rows, cols),
                dhead: Some(MatMut::new(&mut dhead, vocab, cols)),
            };
            assert_eq!(
                forward_backward(threads, hidden, head, &labels, 2.0, grads, &mut scratch),
                sum
            );
            check_close("dhidden", &dhidden, &expected_dhidden, 1e-5);
            check_close("dhead", &dhead, &expected_dhead, 1e-5);
        }
    }
}
