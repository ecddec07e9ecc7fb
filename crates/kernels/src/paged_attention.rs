//! Causal attention of new tokens over keys and values that lie in pages, for prefill and decode alike.
//!
//! # Source
//! Kwon et al. 2023, <https://arxiv.org/abs/2309.06180>

use std::ops::Range;

use crate::attention::Heads;
use crate::simd::{LANES, Lanes, Op, Simd, dispatch, dots};
use crate::{Float, Mat, MatMut, Threads, softmax};

/// Query rows of a sequence that one thread takes at once.
const BLOCK: usize = 16;
/// Queries that share the keys and values in registers.
const TILE: usize = 4;

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
    out: MatMut<'_, F>,
) {
    check(heads, sequences, pages, &q, &out.as_mat());
    let cols = heads.group() * heads.head_dim;
    let mut units = Vec::with_capacity(
        (q.num_rows() / BLOCK + sequences.block_tables.len()) * heads.num_kv_heads,
    );
    let mut out = out;
    for (s, table) in sequences.block_tables.iter().enumerate() {
        let (start, end) = (
            sequences.seq_starts[s] as usize,
            sequences.seq_starts[s + 1] as usize,
        );
        let first_position = sequences.context_lens[s] as usize - (end - start);
        for row in (start..end).step_by(BLOCK) {
            let rows = row..end.min(row + BLOCK);
            let mut row_out;
            (row_out, out) = out.split_rows(rows.len());
            for kv_head in 0..heads.num_kv_heads {
                let head_out;
                (head_out, row_out) = row_out.split_cols(cols);
                units.push(Unit {
                    heads,
                    pages,
                    table,
                    kv_head,
                    position: first_position + row - start,
                    q: q.rows(rows.clone())
                        .cols(kv_head * cols..(kv_head + 1) * cols),
                    out: head_out,
                });
            }
        }
    }
    threads.for_each(&mut units, |scratch, unit| {
        dispatch(Attend { unit, scratch });
    });
}

fn check<F>(
    heads: &Heads<F>,
    sequences: &Sequences<'_>,
    pages: &Pages<'_, F>,
    q: &Mat<'_, F>,
    out: &Mat<'_, F>,
) {
    let shape = (q.num_rows(), heads.num_heads * heads.head_dim);
    assert_eq!(q.num_cols(), shape.1, "q's columns");
    assert_eq!(
        (out.num_rows(), out.num_cols()),
        shape,
        "the output's shape"
    );
    assert_eq!(
        pages.keys.len(),
        pages.values.len(),
        "as many keys as values"
    );
    let Sequences {
        seq_starts,
        context_lens,
        block_tables,
    } = sequences;
    assert_eq!(
        seq_starts.len(),
        block_tables.len() + 1,
        "one start for each sequence, and the end"
    );
    assert_eq!(
        context_lens.len(),
        block_tables.len(),
        "one context length for each sequence"
    );
    assert_eq!(seq_starts[0], 0, "the first sequence starts at 0");
    assert_eq!(
        seq_starts[block_tables.len()] as usize,
        shape.0,
        "the last sequence ends at the last row"
    );
    for (s, rows) in seq_starts.windows(2).enumerate() {
        assert!(rows[0] <= rows[1], "sequences follow each other");
        assert!(
            context_lens[s] >= rows[1] - rows[0],
            "the context includes the queries"
        );
        let blocks = (context_lens[s] as usize).div_ceil(pages.block_size);
        assert!(
            blocks <= block_tables[s].len(),
            "a block for every {} tokens",
            pages.block_size
        );
    }
}

/// Some rows of one sequence, and the query heads of one key/value head.
struct Unit<'a, F> {
    heads: &'a Heads<F>,
    pages: &'a Pages<'a, F>,
    table: &'a [u32],
    kv_head: usize,
    /// The first row's place in its sequence.
    position: usize,
    /// `[rows, group · D]`
    q: Mat<'a, F>,
    /// `[rows, group · D]`
    out: MatMut<'a, F>,
}

/// What a thread keeps from unit to unit.
#[derive(Default)]
struct Scratch<F> {
    /// Where the head of each position starts in page memory.
    starts: Vec<usize>,
    /// `[TILE, positions]`
    scores: Vec<F>,
}

struct Attend<'a, 'b, F> {
    unit: &'a mut Unit<'b, F>,
    scratch: &'a mut Scratch<F>,
}

impl<F: Float> Op for Attend<'_, '_, F> {
    type Output = ();

    /// Takes the queries, `(row, head)` in order, a tile at a time.
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { unit, scratch } = self;
        unit.find_starts(&mut scratch.starts);
        let group = unit.heads.group();
        let num_queries = unit.q.num_rows() * group;
        let mut query = 0;
        while query + TILE <= num_queries {
            unit.tile::<S, TILE>(simd, scratch, query, group);
            query += TILE;
        }
        while query < num_queries {
            unit.tile::<S, 1>(simd, scratch, query, group);
            query += 1;
        }
    }
}

impl<F: Float> Unit<'_, F> {
    fn find_starts(&self, starts: &mut Vec<usize>) {
        let (width, offset) = (
            self.heads.num_kv_heads * self.heads.head_dim,
            self.kv_head * self.heads.head_dim,
        );
        let len = self.position + self.q.num_rows();
        let blocks = self
            .table
            .iter()
            .map(|&block| block as usize * self.pages.block_size);
        starts.clear();
        starts.extend(
            blocks
                .flat_map(|slot| slot..slot + self.pages.block_size)
                .take(len)
                .map(|s| s * width + offset),
        );
    }

    #[inline(always)]
    fn tile<S: Simd, const M: usize>(
        &mut self,
        simd: S,
        scratch: &mut Scratch<F>,
        query: usize,
        group: usize,
    ) {
        let d = self.heads.head_dim;
        let Scratch { starts, scores } = scratch;
        let places: [(usize, usize); M] =
            std::array::from_fn(|m| ((query + m) / group, (query + m) % group * d));
        let lens = places.map(|(row, _)| self.position + row + 1);
        let len = lens[M - 1];
        scores.resize(scores.len().max(M * len), F::ZERO);
        let q = places.map(|(row, col)| &self.q.row(row)[col..col + d]);
        let keys = HeadRows {
            rows: self.pages.keys,
            starts: &starts[..len],
            head_dim: d,
        };
        keys.score(simd, q, &mut scores[..M * len]);

        let mut inverse = [F::ZERO; M];
        for m in 0..M {
            let seen = &mut scores[m * len..][..lens[m]];
            let max = softmax::max(seen);
            inverse[m] = F::from_f64(1.0 / softmax::exp_and_sum(seen, self.heads.scale, max));
        }

        let p = std::array::from_fn(|m| &scores[m * len..][..lens[m]]);
        let values = HeadRows {
            rows: self.pages.values,
            starts: &starts[..len],
            head_dim: d,
        };
        for start in (0..d).step_by(LANES) {
            let dims = start..d.min(start + LANES);
            let sums = values.weigh::<S, M>(simd, p, dims.clone());
            for m in 0..M {
                let (row, col) = places[m];
                let out = &mut self.out.row_mut(row)[col..col + d][dims.clone()];
                for (out, sum) in out.iter_mut().zip(sums[m]) {
                    *out = sum * inverse[m];
                }
            }
        }
    }
}

/// The keys, or the values, of one head at the positions of a sequence.
struct HeadRows<'a, F> {
    rows: &'a [F],
    starts: &'a [usize],
    head_dim: usize,
}

impl<'a, F: Float> HeadRows<'a, F> {
    #[inline(always)]
    fn at(&self, position: usize) -> &'a [F] {
        &self.rows[self.starts[position]..][..self.head_dim]
    }

    /// The dot product of each query with each key: `scores: [M, positions]`.
    #[inline(always)]
    fn score<S: Simd, const M: usize>(&self, simd: S, q: [&[F]; M], scores: &mut [F]) {
        let len = self.starts.len();
        let mut position = 0;
        while S::WIDE && position + 4 <= len {
            let keys = [
                self.at(position),
                self.at(position + 1),
                self.at(position + 2),
                self.at(position + 3),
            ];
            let sums = dots(simd, q, keys);
            for m in 0..M {
                scores[m * len + position..][..4].copy_from_slice(&sums[m]);
            }
            position += 4;
        }
        while position < len {
            let sums = dots(simd, q, [self.at(position)]);
            for m in 0..M {
                scores[m * len + position] = sums[m][0];
            }
            position += 1;
        }
    }

    /// `Σ_j p_j · v_j` over some dimensions of the head, in the order of the positions.
    #[inline(always)]
    fn weigh<S: Simd, const M: usize>(
        &self,
        simd: S,
        p: [&[F]; M],
        dims: Range<usize>,
    ) -> [[F; LANES]; M] {
        let mut sums = [F::Lanes::splat(simd, F::ZERO); M];
        let shared = p[0].len(); // the first query sees least
        for (position, &start) in self.starts[..shared].iter().enumerate() {
            let value = self.lanes(simd, start, &dims);
            for m in 0..M {
                sums[m] = F::Lanes::splat(simd, p[m][position]).mul_add(value, sums[m]);
            }
        }
        for m in 0..M {
            for (&p, &start) in p[m].iter().zip(self.starts).skip(shared) {
                let value = self.lanes(simd, start, &dims);
                sums[m] = F::Lanes::splat(simd, p).mul_add(value, sums[m]);
            }
        }
        sums.map(F::Lanes::to_array)
    }

    /// Some dimensions of the row that begins at `start`, filled up with zeros.
    #[inline(always)]
    fn lanes<S: Simd>(&self, simd: S, start: usize, dims: &Range<usize>) -> F::Lanes<S> {
        let row = &self.rows[start..][dims.clone()];
        match row.first_chunk() {
            Some(row) => F::Lanes::load(simd, row),
            None => F::Lanes::load_part(simd, row),
        }
    }
}

#[cfg(test)]
mod tests;
