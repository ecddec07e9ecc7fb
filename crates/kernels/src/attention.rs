//! Causal attention inside each sequence of a packed batch, with grouped key/value heads.
//!
//! # Source
//! Dao 2023 (the log-sum-exp and the backward pass), <https://arxiv.org/abs/2307.08691>; Ainslie et al. 2023 (grouped
//! queries), <https://arxiv.org/abs/2305.13245>

use crate::{Float, Mat, MatMut, Threads};

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
    mut out: MatMut<'_, F>,
    lse: &mut [F],
) {
    let _ = threads;
    for seq in seq_starts.windows(2) {
        for t in seq[0] as usize..seq[1] as usize {
            for h in 0..heads.num_heads {
                let d = heads.head_dim;
                let kv = h / (heads.num_heads / heads.num_kv_heads) * d;
                let q = &qkv.q.row(t)[h * d..(h + 1) * d];
                let keys = seq[0] as usize..=t;
                let score = |j: usize| -> F {
                    q.iter()
                        .zip(&qkv.k.row(j)[kv..kv + d])
                        .map(|(&q, &k)| q * k)
                        .sum::<F>()
                        * heads.scale
                };
                let max = keys.clone().map(score).fold(F::NEG_INFINITY, F::larger);
                let sum: F = keys.clone().map(|j| (score(j) - max).exp()).sum();
                let out = &mut out.row_mut(t)[h * d..(h + 1) * d];
                out.fill(F::ZERO);
                for j in keys {
                    let p = (score(j) - max).exp() / sum;
                    for (out, &v) in out.iter_mut().zip(&qkv.v.row(j)[kv..kv + d]) {
                        *out += p * v;
                    }
                }
                lse[t * heads.num_heads + h] = max + sum.ln();
            }
        }
    }
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
    let _ = threads;
    let QkvGrads {
        mut dq,
        mut dk,
        mut dv,
    } = grads;
    for row in 0..dq.num_rows() {
        dq.row_mut(row).fill(F::ZERO);
        dk.row_mut(row).fill(F::ZERO);
        dv.row_mut(row).fill(F::ZERO);
    }
    let d = heads.head_dim;
    for seq in seq_starts.windows(2) {
        for t in seq[0] as usize..seq[1] as usize {
            for h in 0..heads.num_heads {
                let kv = h / (heads.num_heads / heads.num_kv_heads) * d;
                let dot = |a: &[F], b: &[F]| a.iter().zip(b).map(|(&a, &b)| a * b).sum::<F>();
                let q = &qkv.q.row(t)[h * d..(h + 1) * d];
                let dout = &dout.row(t)[h * d..(h + 1) * d];
                let delta = dot(dout, &saved.out.row(t)[h * d..(h + 1) * d]);
                for j in seq[0] as usize..=t {
                    let (k, v) = (&qkv.k.row(j)[kv..kv + d], &qkv.v.row(j)[kv..kv + d]);
                    let p = (dot(q, k) * heads.scale - saved.lse[t * heads.num_heads + h]).exp();
                    let ds = p * (dot(dout, v) - delta) * heads.scale;
                    for i in 0..d {
                        dv.row_mut(j)[kv + i] += p * dout[i];
                        dk.row_mut(j)[kv + i] += ds * q[i];
                        dq.row_mut(t)[h * d + i] += ds * k[i];
                    }
                }
            }
        }
    }
}
