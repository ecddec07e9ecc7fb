//! Causal attention inside each sequence of a packed batch, with grouped key/value heads.
//!
//! # Source
//! Dao 2023 (the log-sum-exp and the backward pass), <https://arxiv.org/abs/2307.08691>; Ainslie et al. 2023 (grouped
//! queries), <https://arxiv.org/abs/2305.13245>

use std::ops::Range;

use crate::linear::{normal, product_block, transposed};
use crate::simd::{Op, Simd, dispatch, dot};
use crate::{Float, Mat, MatMut, Threads, softmax};

/// Queries of one head that are scored at once.
const BLOCK: usize = 64;

/// How the columns of queries, keys and values divide into heads; also for [`crate::paged_attention`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads<F> {
    /// `H`, a multiple of `H_kv`: query head `h` reads key/value head `h / (H / H_kv)`.
    pub num_heads: usize,
    /// `H_kv`.
    pub num_kv_heads: usize,
    /// `D`.
    pub head_dim: usize,
    /// Multiplies every score, usually `1 / sqrt(D)`.
    pub scale: F,
}

/// What attention reads, after the rotary embedding.
#[derive(Clone, Copy, Debug)]
pub struct Qkv<'a, F> {
    /// `[T, H · D]`
    pub q: Mat<'a, F>,
    /// `[T, H_kv · D]`
    pub k: Mat<'a, F>,
    /// `[T, H_kv · D]`
    pub v: Mat<'a, F>,
}

/// What the backward pass needs of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a, F> {
    /// The output, `[T, H · D]`.
    pub out: Mat<'a, F>,
    /// The log-sum-exp of the scaled scores, `[T, H]`.
    pub lse: &'a [F],
}

/// The gradients of [`Qkv`], overwritten.
#[derive(Debug)]
pub struct QkvGrads<'a, F> {
    /// `[T, H · D]`
    pub dq: MatMut<'a, F>,
    /// `[T, H_kv · D]`
    pub dk: MatMut<'a, F>,
    /// `[T, H_kv · D]`
    pub dv: MatMut<'a, F>,
}

/// `out = softmax(scale · q·kᵀ)·v` over the positions up to and including each query's own, in its own sequence.
///
/// Sequence `s` is the tokens `seq_starts[s]..seq_starts[s + 1]`. What a sequence gets does not depend on any other.
///
/// # Shapes
/// `q: [T, H · D]`, `k`, `v: [T, H_kv · D]`, `seq_starts: [S + 1]` → `out: [T, H · D]`, `lse: [T, H]`
///
/// # Panics
/// If the shapes do not agree or `seq_starts` does not rise from 0 to `T`.
pub fn forward<F: Float>(
    threads: &Threads,
    heads: &Heads<F>,
    seq_starts: &[u32],
    qkv: Qkv<'_, F>,
    out: MatMut<'_, F>,
    lse: &mut [F],
) {
    check(heads, seq_starts, &qkv, &out.as_mat(), lse.len());
    let group = heads.group();
    let (mut out, mut lse) = (out, MatMut::new(lse, qkv.q.num_rows(), heads.num_heads));
    let mut units = Vec::with_capacity((seq_starts.len() - 1) * heads.num_kv_heads);
    for tokens in sequences(seq_starts) {
        let (mut seq_out, mut seq_lse);
        (seq_out, out) = out.split_rows(tokens.len());
        (seq_lse, lse) = lse.split_rows(tokens.len());
        for kv_head in 0..heads.num_kv_heads {
            let (head_out, head_lse);
            (head_out, seq_out) = seq_out.split_cols(group * heads.head_dim);
            (head_lse, seq_lse) = seq_lse.split_cols(group);
            let qkv = qkv.unit(heads, tokens.clone(), kv_head);
            units.push(Forward {
                qkv,
                scale: heads.scale,
                out: head_out,
                lse: head_lse,
            });
        }
    }
    threads.for_each(&mut units, Forward::run);
}

/// The gradients of [`forward`]'s inputs. With `P = exp(scale · q·kᵀ − lse)` and `Δ = Σ_d dout ⊙ out`:
/// `dV = Pᵀ·dO`, `dS = scale · P ⊙ (dO·Vᵀ − Δ)`, `dQ = dS·K`, `dK = dSᵀ·Q`.
///
/// The query heads of a group add to their key/value head in order, so the result repeats bit for bit.
///
/// # Shapes
/// as [`forward`]; `dout: [T, H · D]`
///
/// # Panics
/// If the shapes do not agree or `seq_starts` does not rise from 0 to `T`.
pub fn backward<F: Float>(
    threads: &Threads,
    heads: &Heads<F>,
    seq_starts: &[u32],
    qkv: Qkv<'_, F>,
    saved: Saved<'_, F>,
    dout: Mat<'_, F>,
    grads: QkvGrads<'_, F>,
) {
    check(heads, seq_starts, &qkv, &saved.out, saved.lse.len());
    let tokens = qkv.q.num_rows();
    let (width, kv_width) = (
        heads.num_heads * heads.head_dim,
        heads.num_kv_heads * heads.head_dim,
    );
    let QkvGrads {
        mut dq,
        mut dk,
        mut dv,
    } = grads;
    assert_eq!(
        (dout.num_rows(), dout.num_cols()),
        (tokens, width),
        "dout's shape"
    );
    assert_eq!(
        (dq.num_rows(), dq.num_cols()),
        (tokens, width),
        "dq's shape"
    );
    assert_eq!(
        (dk.num_rows(), dk.num_cols()),
        (tokens, kv_width),
        "dk's shape"
    );
    assert_eq!(
        (dv.num_rows(), dv.num_cols()),
        (tokens, kv_width),
        "dv's shape"
    );
    let (d, group) = (heads.head_dim, heads.group());
    let lse = Mat::new(saved.lse, tokens, heads.num_heads);
    let mut units = Vec::with_capacity((seq_starts.len() - 1) * heads.num_kv_heads);
    for tokens in sequences(seq_starts) {
        let (mut seq_dq, mut seq_dk, mut seq_dv);
        (seq_dq, dq) = dq.split_rows(tokens.len());
        (seq_dk, dk) = dk.split_rows(tokens.len());
        (seq_dv, dv) = dv.split_rows(tokens.len());
        for kv_head in 0..heads.num_kv_heads {
            let (head_dq, head_dk, head_dv);
            (head_dq, seq_dq) = seq_dq.split_cols(group * d);
            (head_dk, seq_dk) = seq_dk.split_cols(d);
            (head_dv, seq_dv) = seq_dv.split_cols(d);
            let q_heads = kv_head * group..(kv_head + 1) * group;
            let q_cols = q_heads.start * d..q_heads.end * d;
            units.push(Backward {
                qkv: qkv.unit(heads, tokens.clone(), kv_head),
                scale: heads.scale,
                out: saved.out.rows(tokens.clone()).cols(q_cols.clone()),
                lse: lse.rows(tokens.clone()).cols(q_heads),
                dout: dout.rows(tokens.clone()).cols(q_cols),
                grads: QkvGrads {
                    dq: head_dq,
                    dk: head_dk,
                    dv: head_dv,
                },
            });
        }
    }
    threads.for_each(&mut units, Backward::run);
}

impl<F> Heads<F> {
    /// Query heads that share a key/value head.
    pub(crate) fn group(&self) -> usize {
        assert_eq!(
            self.num_heads % self.num_kv_heads,
            0,
            "the same number of query heads for each key/value head"
        );
        self.num_heads / self.num_kv_heads
    }
}

impl<F> Qkv<'_, F> {
    /// One sequence's rows and one key/value head's columns.
    fn unit(&self, heads: &Heads<F>, tokens: Range<usize>, kv_head: usize) -> Self {
        let (d, group) = (heads.head_dim, heads.group());
        let kv_cols = kv_head * d..(kv_head + 1) * d;
        Self {
            q: self
                .q
                .rows(tokens.clone())
                .cols(kv_head * group * d..(kv_head + 1) * group * d),
            k: self.k.rows(tokens.clone()).cols(kv_cols.clone()),
            v: self.v.rows(tokens).cols(kv_cols),
        }
    }
}

fn sequences(seq_starts: &[u32]) -> impl Iterator<Item = Range<usize>> {
    seq_starts
        .windows(2)
        .map(|seq| seq[0] as usize..seq[1] as usize)
}

fn check<F>(
    heads: &Heads<F>,
    seq_starts: &[u32],
    qkv: &Qkv<'_, F>,
    out: &Mat<'_, F>,
    lse_len: usize,
) {
    let tokens = qkv.q.num_rows();
    let (width, kv_width) = (
        heads.num_heads * heads.head_dim,
        heads.num_kv_heads * heads.head_dim,
    );
    assert_eq!(qkv.q.num_cols(), width, "q's columns");
    assert_eq!(
        (qkv.k.num_rows(), qkv.k.num_cols()),
        (tokens, kv_width),
        "k's shape"
    );
    assert_eq!(
        (qkv.v.num_rows(), qkv.v.num_cols()),
        (tokens, kv_width),
        "v's shape"
    );
    assert_eq!(
        (out.num_rows(), out.num_cols()),
        (tokens, width),
        "the output's shape"
    );
    assert_eq!(
        lse_len,
        tokens * heads.num_heads,
        "one log-sum-exp for each token and head"
    );
    assert_eq!(
        seq_starts.first(),
        Some(&0),
        "the first sequence starts at 0"
    );
    assert_eq!(
        seq_starts.last().map(|&end| end as usize),
        Some(tokens),
        "the last sequence ends at the last token"
    );
    assert!(seq_starts.is_sorted(), "sequences follow each other");
}

/// The forward pass of one sequence and one key/value head.
struct Forward<'a, F> {
    qkv: Qkv<'a, F>,
    scale: F,
    /// `[L, group · D]`
    out: MatMut<'a, F>,
    /// `[L, group]`
    lse: MatMut<'a, F>,
}

impl<F: Float> Forward<'_, F> {
    fn run(scores: &mut Vec<F>, unit: &mut Self) {
        let Self {
            qkv: Qkv { q, k, v },
            scale,
            out,
            lse,
        } = unit;
        let (len, d) = (k.num_rows(), k.num_cols());
        scores.resize(BLOCK.min(len) * len, F::ZERO);
        for (head, cols) in head_cols(q.num_cols(), d).enumerate() {
            for rows in blocks(len) {
                let keys = 0..rows.end;
                let mut scores = MatMut::new(
                    &mut scores[..rows.len() * keys.len()],
                    rows.len(),
                    keys.len(),
                );
                let queries = q.rows(rows.clone()).cols(cols.clone());
                let (k, v) = (k.rows(keys.clone()), v.rows(keys));
                product_block(
                    F::ONE,
                    normal(queries),
                    transposed(k),
                    F::ZERO,
                    scores.reborrow(),
                );
                let mut out = out.reborrow().block(rows.clone(), cols.clone());
                let mut lse = lse.reborrow().block(rows.clone(), head..head + 1);
                let first = rows.start;
                dispatch(Softmax {
                    scores: scores.reborrow(),
                    first,
                    scale: *scale,
                    lse: lse.reborrow(),
                });
                product_block(
                    F::ONE,
                    normal(scores.as_mat()),
                    normal(v),
                    F::ZERO,
                    out.reborrow(),
                );
            }
        }
    }
}

/// Scores to probabilities, in place, for queries from position `first` on.
struct Softmax<'a, F> {
    scores: MatMut<'a, F>,
    first: usize,
    scale: F,
    lse: MatMut<'a, F>,
}

impl<F: Float> Op for Softmax<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        for row in 0..self.scores.num_rows() {
            let (seen, future) = self.scores.row_mut(row).split_at_mut(self.first + row + 1);
            let max = softmax::max(seen);
            let sum = softmax::exp_and_sum(seen, self.scale, max);
            let inverse = F::from_f64(1.0 / sum);
            for p in seen {
                *p *= inverse;
            }
            future.fill(F::ZERO);
            self.lse.row_mut(row)[0] = F::from_f64((max * self.scale).to_f64() + sum.ln());
        }
    }
}

/// The backward pass of one sequence and one key/value head.
struct Backward<'a, F> {
    qkv: Qkv<'a, F>,
    scale: F,
    /// `[L, group · D]`
    out: Mat<'a, F>,
    /// `[L, group]`
    lse: Mat<'a, F>,
    /// `[L, group · D]`
    dout: Mat<'a, F>,
    grads: QkvGrads<'a, F>,
}

impl<F: Float> Backward<'_, F> {
    fn run(scratch: &mut Vec<F>, unit: &mut Self) {
        let Self {
            qkv: Qkv { q, k, v },
            scale,
            out,
            lse,
            dout,
            grads: QkvGrads { dq, dk, dv },
        } = unit;
        let (len, d) = (k.num_rows(), k.num_cols());
        scratch.resize(2 * BLOCK.min(len) * len, F::ZERO);
        for row in 0..len {
            dk.row_mut(row).fill(F::ZERO);
            dv.row_mut(row).fill(F::ZERO);
        }
        for (head, cols) in head_cols(q.num_cols(), d).enumerate() {
            for rows in blocks(len) {
                let keys = 0..rows.end;
                let size = rows.len() * keys.len();
                let (p, dp) = scratch[..2 * size].split_at_mut(size);
                let mut p = MatMut::new(p, rows.len(), keys.len());
                let mut dp = MatMut::new(dp, rows.len(), keys.len());
                let queries = q.rows(rows.clone()).cols(cols.clone());
                let dout = dout.rows(rows.clone()).cols(cols.clone());
                let (k, v) = (k.rows(keys.clone()), v.rows(keys.clone()));
                product_block(
                    *scale,
                    normal(queries),
                    transposed(k),
                    F::ZERO,
                    p.reborrow(),
                );
                product_block(F::ONE, normal(dout), transposed(v), F::ZERO, dp.reborrow());
                dispatch(SoftmaxBackward {
                    p: p.reborrow(),
                    dp: dp.reborrow(),
                    first: rows.start,
                    scale: *scale,
                    out: out.rows(rows.clone()).cols(cols.clone()),
                    dout,
                    lse: lse.rows(rows.clone()).cols(head..head + 1),
                });
                let (p, ds) = (p.as_mat(), dp.as_mat());
                let dq = dq.reborrow().block(rows, cols.clone());
                product_block(F::ONE, normal(ds), normal(k), F::ZERO, dq);
                let dk = dk.reborrow().block(keys.clone(), 0..d);
                product_block(F::ONE, transposed(ds), normal(queries), F::ONE, dk);
                let dv = dv.reborrow().block(keys, 0..d);
                product_block(F::ONE, transposed(p), normal(dout), F::ONE, dv);
            }
        }
    }
}

/// Scaled scores to probabilities, and the gradient of probabilities to that of scores, both in place.
struct SoftmaxBackward<'a, F> {
    p: MatMut<'a, F>,
    dp: MatMut<'a, F>,
    first: usize,
    scale: F,
    out: Mat<'a, F>,
    dout: Mat<'a, F>,
    lse: Mat<'a, F>,
}

impl<F: Float> Op for SoftmaxBackward<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        for row in 0..self.p.num_rows() {
            let delta = dot(simd, self.dout.row(row), self.out.row(row));
            let lse = self.lse.row(row)[0];
            let (p, p_future) = self.p.row_mut(row).split_at_mut(self.first + row + 1);
            let (ds, ds_future) = self.dp.row_mut(row).split_at_mut(self.first + row + 1);
            for (p, ds) in p.iter_mut().zip(ds) {
                *p = (*p - lse).exp();
                *ds = *p * (*ds - delta) * self.scale;
            }
            p_future.fill(F::ZERO);
            ds_future.fill(F::ZERO);
        }
    }
}

/// The columns of each head.
fn head_cols(cols: usize, head_dim: usize) -> impl Iterator<Item = Range<usize>> {
    (0..cols)
        .step_by(head_dim)
        .map(move |start| start..start + head_dim)
}

/// The positions of a sequence, [`BLOCK`] at a time.
fn blocks(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len)
        .step_by(BLOCK)
        .map(move |start| start..len.min(start + BLOCK))
}

#[cfg(test)]
mod tests;
