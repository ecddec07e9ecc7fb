//! The product with a weight kept in `bf16`, multiplying pairs of `bf16` into `f32` sums, which machines with
//! `vdpbf16ps` do twice as fast as `f32`.
//!
//! The input is rounded to `bf16` (its sums are not). Each element of the output adds up its pairs in the order of `k`
//! in one sum, whatever rows and columns are computed with it and on however many threads.
//!
//! Blocking: a block of the weight is packed into panels of [`NR`] columns, `[pairs of k][column]`; a block of the input
//! is rounded to rows of pairs; tiles of up to 12 × [`NR`] sums stay in registers while one panel passes by.
//!
//! # Source
//! Goto and van de Geijn 2008 (the blocking), <https://doi.org/10.1145/1356052.1356053>

mod tile;

use std::cell::RefCell;
use std::ops::Range;

use half::bf16;

#[cfg(target_arch = "x86_64")]
use self::tile::x86;
use self::tile::{Scale, Tile, Widened};
use crate::{Mat, MatMut, Parts, Threads};

/// Columns of a tile: two vectors of 16 sums.
const NR: usize = 32;
/// Pairs of `k` in a block: one panel takes 16 KiB, half of a first-level cache.
const MAX_PAIRS: usize = 128;
/// Columns of a packed block.
const MAX_COLS: usize = 4096;
/// Rows of the input that are rounded at a time: 128 KiB of pairs.
const MAX_ROWS: usize = 252;
/// Multiply-adds that a thread takes at least.
const MIN_WORK: usize = 1 << 20;

/// Two neighbours along `k`, the first in the low half.
type Pair = u32;
type Panel = [[Pair; NR]];

/// A weight as a factor: its rows or its columns run along `k`.
#[derive(Clone, Copy)]
pub(crate) enum Along<'a> {
    /// `w: [N, K]`, as in the forward pass.
    Rows(Mat<'a, bf16>),
    /// `w: [K, N]`, as in the gradient of the input.
    Cols(Mat<'a, bf16>),
}

impl<'a> Along<'a> {
    /// `(K, N)`
    fn shape(&self) -> (usize, usize) {
        match self {
            Self::Rows(w) => (w.num_cols(), w.num_rows()),
            Self::Cols(w) => (w.num_rows(), w.num_cols()),
        }
    }

    fn columns(&self, columns: Range<usize>) -> Self {
        match self {
            Self::Rows(w) => Self::Rows(w.rows(columns)),
            Self::Cols(w) => Self::Cols(w.cols(columns)),
        }
    }

    /// Packs `pairs.len()` pairs of [`NR`] columns from `col` on; what lies outside is zero.
    fn pack(&self, pairs: Range<usize>, col: usize, panel: &mut Panel) {
        let (inner, cols) = self.shape();
        let width = NR.min(cols - col);
        panel.fill([0; NR]);
        match self {
            Self::Rows(w) => {
                for j in 0..width {
                    let ks = &w.row(col + j)[2 * pairs.start..inner.min(2 * pairs.end)];
                    let (twos, rest) = ks.as_chunks::<2>();
                    for (row, two) in panel.iter_mut().zip(twos) {
                        row[j] = pair(two[0], two[1]);
                    }
                    if let [last] = rest {
                        panel[twos.len()][j] = pair(*last, bf16::ZERO);
                    }
                }
            }
            Self::Cols(w) => {
                for (row, p) in panel.iter_mut().zip(pairs) {
                    let first = &w.row(2 * p)[col..col + width];
                    if 2 * p + 1 < inner {
                        let second = &w.row(2 * p + 1)[col..col + width];
                        for ((out, &a), &b) in row.iter_mut().zip(first).zip(second) {
                            *out = pair(a, b);
                        }
                    } else {
                        for (out, &a) in row.iter_mut().zip(first) {
                            *out = pair(a, bf16::ZERO);
                        }
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn pair(first: bf16, second: bf16) -> Pair {
    u32::from(first.to_bits()) | u32::from(second.to_bits()) << 16
}

/// `y = alpha · bf16(x)·w + beta · y`, the weight's columns divided among threads.
pub(crate) fn product(
    threads: &Threads,
    alpha: f32,
    x: Mat<'_, f32>,
    w: Along<'_>,
    beta: f32,
    y: MatMut<'_, f32>,
) {
    let (inner, cols) = w.shape();
    assert_eq!(
        (x.num_rows(), cols),
        (y.num_rows(), y.num_cols()),
        "the product's shape"
    );
    assert_eq!(x.num_cols(), inner, "the inner dimension of the product");
    let min_cols = MIN_WORK.div_ceil((x.num_rows() * inner).max(1)).max(NR);
    threads.split(Columns { w, y }, min_cols, |Columns { w, y }| {
        SCRATCH.with_borrow_mut(|scratch| {
            let scale = Scale { alpha, beta };
            let product = Product { scale, x, w, y };
            #[cfg(target_arch = "x86_64")]
            if let Some(tile) = x86::Avx512Bf16::find() {
                return product.run(tile, scratch);
            }
            product.run(Widened, scratch);
        });
    });
}

thread_local! {
    /// The packed blocks of the product that runs on this thread; nothing in it outlives a product.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[derive(Default)]
struct Scratch {
    panels: Vec<[Pair; NR]>,
    input: Vec<Pair>,
}

/// Some columns of the weight, and those of the output.
struct Columns<'a> {
    w: Along<'a>,
    y: MatMut<'a, f32>,
}

impl Parts for Columns<'_> {
    fn num_rows(&self) -> usize {
        self.y.num_cols()
    }
    fn split_at_row(self, col: usize) -> (Self, Self) {
        let cols = self.y.num_cols();
        let (first, second) = self.y.split_cols(col);
        (
            Self {
                w: self.w.columns(0..col),
                y: first,
            },
            Self {
                w: self.w.columns(col..cols),
                y: second,
            },
        )
    }
}

struct Product<'a> {
    scale: Scale,
    x: Mat<'a, f32>,
    w: Along<'a>,
    y: MatMut<'a, f32>,
}

impl Product<'_> {
    fn run<T: Tile>(mut self, tile: T, scratch: &mut Scratch) {
        let (inner, cols) = self.w.shape();
        if inner == 0 {
            return self.clear(); // An empty sum is zero.
        }
        for col in (0..cols).step_by(MAX_COLS) {
            let width = MAX_COLS.min(cols - col);
            for start in (0..inner.div_ceil(2)).step_by(MAX_PAIRS) {
                let pairs = start..inner.div_ceil(2).min(start + MAX_PAIRS);
                let beta = if start == 0 { self.scale.beta } else { 1.0 };
                let scale = Scale { beta, ..self.scale };
                scratch
                    .panels
                    .resize(width.div_ceil(NR) * pairs.len(), [0; NR]);
                for (panel, col) in scratch
                    .panels
                    .chunks_mut(pairs.len())
                    .zip((col..).step_by(NR))
                {
                    self.w.pack(pairs.clone(), col, panel);
                }
                for row in (0..self.x.num_rows()).step_by(MAX_ROWS) {
                    let rows = row..self.x.num_rows().min(row + MAX_ROWS);
                    self.round(tile, rows.clone(), pairs.clone(), &mut scratch.input);
                    self.block(tile, rows, col..col + width, pairs.len(), scale, scratch);
                }
            }
        }
    }

    /// `y = beta · y`
    fn clear(mut self) {
        let zeros = vec![0.0; self.y.num_cols()];
        for row in 0..self.y.num_rows() {
            self.scale.apply(&zeros, self.y.row_mut(row));
        }
    }

    /// Some pairs of some rows of the input.
    fn round<T: Tile>(
        &self,
        tile: T,
        rows: Range<usize>,
        pairs: Range<usize>,
        out: &mut Vec<Pair>,
    ) {
        out.resize(rows.len() * pairs.len(), 0);
        let numbers = 2 * pairs.start..self.x.num_cols().min(2 * pairs.end);
        for (row, out) in rows.zip(out.chunks_mut(pairs.len())) {
            tile.round(&self.x.row(row)[numbers.clone()], out);
        }
    }

    /// One block of the input against one block of the weight.
    fn block<T: Tile>(
        &mut self,
        tile: T,
        rows: Range<usize>,
        cols: Range<usize>,
        num_pairs: usize,
        scale: Scale,
        scratch: &Scratch,
    ) {
        let input: Vec<&[Pair]> = scratch.input.chunks(num_pairs).collect();
        for (panel, col) in scratch
            .panels
            .chunks(num_pairs)
            .zip((cols.start..).step_by(NR))
        {
            let cols = col..cols.end.min(col + NR);
            let (mut input, mut row) = (&input[..], rows.start);
            while !input.is_empty() {
                let at = (row, cols.clone());
                let done = match input.len() {
                    12.. => self.tile::<T, 12>(tile, scale, input, panel, at),
                    8.. => self.tile::<T, 8>(tile, scale, input, panel, at),
                    4.. => self.tile::<T, 4>(tile, scale, input, panel, at),
                    _ => self.tile::<T, 1>(tile, scale, input, panel, at),
                };
                (input, row) = (&input[done..], row + done);
            }
        }
    }

    /// The first rows of `input`; how many.
    fn tile<T: Tile, const M: usize>(
        &mut self,
        tile: T,
        scale: Scale,
        input: &[&[Pair]],
        panel: &Panel,
        (row, cols): (usize, Range<usize>),
    ) -> usize {
        let y = self.y.reborrow().block(row..row + M, cols);
        tile.multiply::<M>(scale, std::array::from_fn(|m| input[m]), panel, y);
        M
    }
}

#[cfg(test)]
mod tests {
    use super::tile::rounded;
    use super::*;
    use crate::testing::{random, thread_counts};

    const SHAPES: [(usize, usize, usize); 7] = [
        (1, 1, 1),
        (3, 7, 33),
        (13, 300, 65),
        (31, 64, 5),
        (7, 513, 100),
        (270, 17, 40),
        (2, 6, 4200),
    ];

    fn kept(len: usize, seed: u64) -> Vec<bf16> {
        random::<f32>(len, seed)
            .into_iter()
            .map(bf16::from_f32)
            .collect()
    }

    #[test]
    fn rounding_is_that_of_bf16() {
        for bits in (0..=u32::MAX).step_by(40_503) {
            let number = f32::from_bits(bits);
            assert_eq!(
                rounded(number),
                u32::from(bf16::from_f32(number).to_bits()),
                "{number}"
            );
        }
    }

    #[test]
    fn products_follow_their_definition_on_every_path() {
        for (t, k, n) in SHAPES {
            let (x, y) = (random::<f32>(t * k, 1), random::<f32>(t * n, 2));
            let w = kept(k * n, 3);
            for (along, at) in [
                (Along::Rows(Mat::new(&w, n, k)), (k, 1)),
                (Along::Cols(Mat::new(&w, k, n)), (1, n)),
            ] {
                let x_mat = Mat::new(&x, t, k);
                for (alpha, beta) in [(1.0, 0.0), (0.5, 1.0), (2.0, -0.5)] {
                    let exact = |i: usize, j: usize| {
                        let sum: f64 = (0..k)
                            .map(|l| {
                                bf16::from_f32(x[i * k + l]).to_f64()
                                    * w[j * at.0 + l * at.1].to_f64()
                            })
                            .sum();
                        f64::from(alpha) * sum + f64::from(beta) * f64::from(y[i * n + j])
                    };
                    let check = |name: &str, actual: &[f32]| {
                        for i in 0..t {
                            for j in 0..n {
                                let (actual, expected) =
                                    (f64::from(actual[i * n + j]), exact(i, j));
                                let error = (actual - expected).abs();
                                assert!(
                                    error < 1e-5 * (k as f64).sqrt().max(4.0),
                                    "{name} {t} {k} {n}: {error}"
                                );
                            }
                        }
                    };
                    for threads in &thread_counts() {
                        let mut actual = y.clone();
                        product(
                            threads,
                            alpha,
                            x_mat,
                            along,
                            beta,
                            MatMut::new(&mut actual, t, n),
                        );
                        check("dispatched", &actual);
                    }
                    let mut actual = y.clone();
                    let out = MatMut::new(&mut actual, t, n);
                    Product {
                        scale: Scale { alpha, beta },
                        x: x_mat,
                        w: along,
                        y: out,
                    }
                    .run(Widened, &mut Scratch::default());
                    check("widened", &actual);
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_any_company() {
        let (t, k, n) = (29, 300, 70);
        let (x, w) = (random::<f32>(t * k, 1), kept(k * n, 2));
        let w = Along::Rows(Mat::new(&w, n, k));
        let mut alone = vec![0.0; t * n];
        for (x, y) in x.chunks(k).zip(alone.chunks_mut(n)) {
            product(
                &Threads::single(),
                1.0,
                Mat::new(x, 1, k),
                w,
                0.0,
                MatMut::new(y, 1, n),
            );
        }
        for threads in &thread_counts() {
            for rows in 1..=t {
                let (x, mut y) = (Mat::new(&x[..rows * k], rows, k), vec![f32::NAN; rows * n]);
                product(threads, 1.0, x, w, 0.0, MatMut::new(&mut y, rows, n));
                assert_eq!(y, alone[..rows * n]);
            }
        }
    }

    #[test]
    fn no_inputs_make_zeros() {
        let mut y = [f32::NAN, 3.0];
        let w = Along::Rows(Mat::new(&[], 2, 0));
        product(
            &Threads::single(),
            1.0,
            Mat::new(&[], 1, 0),
            w,
            0.0,
            MatMut::new(&mut y, 1, 2),
        );
        assert_eq!(y, [0.0, 0.0]);
    }
}
