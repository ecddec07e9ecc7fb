//! Causal attention of new tokens over keys and values that lie in pages, for prefill and decode alike.
//!
//! # Source
//! Kwon et al. 2023, <https://arxiv.org/abs/2309.06180>

use crate::attention::Heads;
use crate::{Float, Mat, MatMut, Threads};

/// One layer's page memory.
#[derive(Clone, Copy, Debug)]
pub struct Pages<'a, F> {
    /// `[num_blocks, block_size, H_kv, D]`
    pub keys: &'a [F],
    /// `[num_blocks, block_size, H_kv, D]`
    pub values: &'a [F],
    /// Tokens in a block.
    pub block_size: usize,
}

/// The sequences of a batch: which rows are theirs, and where their keys and values lie.
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a> {
    /// Sequence `s` owns the query rows `seq_starts[s]..seq_starts[s + 1]`; they are its newest tokens. `[S + 1]`
    pub seq_starts: &'a [u32],
    /// Tokens of each sequence whose keys are in the pages, those of this call included. `[S]`
    pub context_lens: &'a [u32],
    /// The blocks of each sequence in order: token `j` lies in block `block_tables[s][j / block_size]`. `[S]`
    pub block_tables: &'a [Vec<u32>],
}

/// `out = softmax(scale · q·kᵀ)·v` over the positions up to and including each query's own.
///
/// The keys and values of this call's tokens must be in the pages already ([`crate::kv_scatter`]). The result of a row
/// is reduced in the order of the key positions, so its bits depend on its query, keys and values alone: not on the
/// other rows, on how a prompt was cut into chunks, on where the blocks lie, or on the number of threads.
///
/// # Shapes
/// `q: [T, H · D]` → `out: [T, H · D]`
///
/// # Panics
/// If the shapes do not agree or a block table is too short or points outside of the pages.
pub fn forward<F: Float>(
    threads: &Threads,
    heads: &Heads<F>,
    sequences: &Sequences<'_>,
    pages: &Pages<'_, F>,
    q: Mat<'_, F>,
    mut out: MatMut<'_, F>,
) {
    let _ = threads;
    let (d, width) = (heads.head_dim, heads.num_kv_heads * heads.head_dim);
    for (s, table) in sequences.block_tables.iter().enumerate() {
        let rows = sequences.seq_starts[s] as usize..sequences.seq_starts[s + 1] as usize;
        let first_position = sequences.context_lens[s] as usize - rows.len();
        let slot = |j: usize| {
            table[j / pages.block_size] as usize * pages.block_size + j % pages.block_size
        };
        for (row, position) in rows.zip(first_position..) {
            for h in 0..heads.num_heads {
                let kv = h / (heads.num_heads / heads.num_kv_heads) * d;
                let q = &q.row(row)[h * d..(h + 1) * d];
                let scores: Vec<F> = (0..=position)
                    .map(|j| {
                        let start = slot(j) * width + kv;
                        crate::simd::dot(q, &pages.keys[start..start + d]) * heads.scale
                    })
                    .collect();
                let max = scores.iter().copied().fold(F::NEG_INFINITY, F::larger);
                let sum: F = scores.iter().map(|&s| (s - max).exp()).sum();
                let out = &mut out.row_mut(row)[h * d..(h + 1) * d];
                out.fill(F::ZERO);
                for (j, &score) in scores.iter().enumerate() {
                    let p = (score - max).exp() / sum;
                    let start = slot(j) * width + kv;
                    for (out, &v) in out.iter_mut().zip(&pages.values[start..start + d]) {
                        *out = p.mul_add(v, *out);
                    }
                }
            }
        }
    }
}
