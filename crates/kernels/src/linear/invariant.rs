//! The product whose rows do not depend on each other's company.

use std::ops::Range;

use crate::simd::{Op, Simd, dispatch, dots};
use crate::{Float, Mat, MatMut, Parts, Stored, Threads};

/// Multiply-adds that a thread takes at least: about 10 µs of work.
const MIN_WORK: usize = 1 << 18;

/// Numbers of `x` that stay in the second-level cache while the weight passes by.
const BLOCK: usize = 1 << 17;

/// `y = alpha · x·wᵀ + beta · y`, each element reduced in the same order whatever the number of rows, the row's place
/// among them, the number of threads, and the instruction set.
///
/// So a prompt processed in chunks gives the bits of a prompt processed whole, and a sequence decoded in a batch those
/// of one decoded alone. For few rows, where reading the weight is what takes time, it is also the faster product, and
/// the faster the smaller the form that the weight is kept in, at the bits of the widened weight.
///
/// # Shapes
/// `x: [T, K]`, `w: [N, K]` (`[N, K / 32]` blocks in q8_0) → `y: [T, N]`
///
/// # Panics
/// If the shapes do not agree.
pub fn forward_invariant<F: Float, W: Stored<F>>(
    threads: &Threads,
    alpha: F,
    x: Mat<'_, F>,
    w: Mat<'_, W>,
    beta: F,
    y: MatMut<'_, F>,
) {
    assert_eq!(
        (x.num_rows(), w.num_rows()),
        (y.num_rows(), y.num_cols()),
        "the product's shape"
    );
    assert_eq!(
        x.num_cols(),
        w.num_cols() * W::NUMBERS,
        "the inner dimension of the product"
    );
    let min_cols = MIN_WORK.div_ceil((x.num_rows() * x.num_cols()).max(1));
    threads.split(Columns { w, y }, min_cols, |Columns { w, y }| {
        dispatch(Product {
            alpha,
            x,
            w,
            beta,
            y,
        });
    });
}

/// Some rows of the weight, and the columns of the output that they make.
struct Columns<'a, F, W> {
    w: Mat<'a, W>,
    y: MatMut<'a, F>,
}

impl<F: Float, W: Stored<F>> Parts for Columns<'_, F, W> {
    fn num_rows(&self) -> usize {
        self.w.num_rows()
    }
    fn split_at_row(self, row: usize) -> (Self, Self) {
        let (first, second) = self.y.split_cols(row);
        let (w_first, w_second) = self.w.split_at_row(row);
        (
            Self {
                w: w_first,
                y: first,
            },
            Self {
                w: w_second,
                y: second,
            },
        )
    }
}

struct Product<'a, F, W> {
    alpha: F,
    x: Mat<'a, F>,
    w: Mat<'a, W>,
    beta: F,
    y: MatMut<'a, F>,
}

impl<F: Float, W: Stored<F>> Op for Product<'_, F, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let rows = self.x.num_rows();
        let block = (BLOCK / self.x.num_cols().max(1)).max(8);
        let mut start = 0;
        while start < rows {
            let end = rows.min(start + block);
            self.panel(simd, start..end);
            start = end;
        }
    }
}

impl<F: Float, W: Stored<F>> Product<'_, F, W> {
    /// All columns of some rows, in tiles that fit the vector registers.
    ///
    /// The columns of a tile lie a quarter of the weight apart: four streams that memory's prefetchers follow, where
    /// neighbours would look to them like one stream that jumps.
    #[inline(always)]
    fn panel<S: Simd>(&mut self, simd: S, rows: Range<usize>) {
        let cols = self.w.num_rows();
        let apart = cols / 4;
        for col in 0..apart {
            let mut row = rows.start;
            while row < rows.end {
                row += match rows.end - row {
                    4.. if S::WIDE => self.tile::<S, 4, 4>(simd, row, col, apart),
                    3 if S::WIDE => self.tile::<S, 3, 4>(simd, row, col, apart),
                    2.. if S::WIDE => self.tile::<S, 2, 4>(simd, row, col, apart),
                    2.. => {
                        self.tile::<S, 2, 2>(simd, row, col, apart);
                        self.tile::<S, 2, 2>(simd, row, col + 2 * apart, apart)
                    }
                    _ => self.tile::<S, 1, 4>(simd, row, col, apart),
                };
            }
        }
        for col in 4 * apart..cols {
            for row in rows.clone() {
                self.tile::<S, 1, 1>(simd, row, col, 0);
            }
        }
    }

    /// Some rows of the columns `col, col + apart, …`; how many rows.
    #[inline(always)]
    fn tile<S: Simd, const M: usize, const N: usize>(
        &mut self,
        simd: S,
        row: usize,
        col: usize,
        apart: usize,
    ) -> usize {
        let x = std::array::from_fn(|m| self.x.row(row + m));
        let w = std::array::from_fn(|n| self.w.row(col + n * apart));
        let sums = dots::<F, W, S, M, N>(simd, x, w);
        for (m, sums) in sums.iter().enumerate() {
            let y = self.y.row_mut(row + m);
            for (n, &sum) in sums.iter().enumerate() {
                let y = &mut y[col + n * apart];
                let product = self.alpha * sum;
                *y = if self.beta == F::ZERO {
                    product
                } else {
                    self.beta.mul_add(*y, product)
                };
            }
        }
        M
    }
}
