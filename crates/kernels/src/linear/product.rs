//! The general matrix product, over the `gemm` crate, cut into one block of the output for each thread.

use gemm::Parallelism;

use crate::{Float, Mat, MatMut, Parts, Threads};

/// A factor of a product, in place or transposed.
#[derive(Clone, Copy)]
pub(crate) struct Factor<'a, F> {
    mat: Mat<'a, F>,
    transposed: bool,
}

/// The matrix as it is.
pub(crate) fn normal<F>(mat: Mat<'_, F>) -> Factor<'_, F> {
    Factor {
        mat,
        transposed: false,
    }
}

/// The matrix on its side.
pub(crate) fn transposed<F>(mat: Mat<'_, F>) -> Factor<'_, F> {
    Factor {
        mat,
        transposed: true,
    }
}

impl<F> Factor<'_, F> {
    fn rows(&self) -> usize {
        if self.transposed {
            self.mat.num_cols()
        } else {
            self.mat.num_rows()
        }
    }

    fn cols(&self) -> usize {
        if self.transposed {
            self.mat.num_rows()
        } else {
            self.mat.num_cols()
        }
    }

    /// From one row to the next, and from one column to the next.
    fn strides(&self) -> (isize, isize) {
        let stride = self.mat.stride().cast_signed();
        if self.transposed {
            (1, stride)
        } else {
            (stride, 1)
        }
    }

    fn row_block(&self, rows: std::ops::Range<usize>) -> Self {
        let mat = if self.transposed {
            self.mat.cols(rows)
        } else {
            self.mat.rows(rows)
        };
        Self { mat, ..*self }
    }

    fn col_block(&self, cols: std::ops::Range<usize>) -> Self {
        let mat = if self.transposed {
            self.mat.rows(cols)
        } else {
            self.mat.cols(cols)
        };
        Self { mat, ..*self }
    }
}

/// Products of fewer multiply-adds than this stay on one thread: about 10 µs of work.
const MIN_WORK: usize = 1 << 19;

/// `out = alpha · a·b + beta · out`, in blocks of whole rows or whole columns, whichever are more.
pub(crate) fn product<F: Float>(
    threads: &Threads,
    alpha: F,
    a: Factor<'_, F>,
    b: Factor<'_, F>,
    beta: F,
    out: MatMut<'_, F>,
) {
    let (rows, cols, inner) = (out.num_rows(), out.num_cols(), a.cols());
    assert_eq!((a.rows(), b.cols()), (rows, cols), "the product's shape");
    assert_eq!(inner, b.rows(), "the inner dimension of the product");
    let pieces = (rows * cols * inner / MIN_WORK).clamp(1, threads.num_threads());
    if rows >= cols {
        threads.split(RowBlocks { a, out }, rows / pieces, |part| {
            product_block(alpha, part.a, b, beta, part.out);
        });
    } else {
        threads.split(ColBlocks { b, out }, cols / pieces, |part| {
            product_block(alpha, a, part.b, beta, part.out);
        });
    }
}

struct RowBlocks<'a, F> {
    a: Factor<'a, F>,
    out: MatMut<'a, F>,
}

impl<F: Float> Parts for RowBlocks<'_, F> {
    fn num_rows(&self) -> usize {
        self.out.num_rows()
    }
    fn split_at_row(self, row: usize) -> (Self, Self) {
        let (first, second) = self.out.split_rows(row);
        let rows = self.a.rows();
        (
            Self {
                a: self.a.row_block(0..row),
                out: first,
            },
            Self {
                a: self.a.row_block(row..rows),
                out: second,
            },
        )
    }
}

struct ColBlocks<'a, F> {
    b: Factor<'a, F>,
    out: MatMut<'a, F>,
}

impl<F: Float> Parts for ColBlocks<'_, F> {
    fn num_rows(&self) -> usize {
        self.out.num_cols()
    }
    fn split_at_row(self, col: usize) -> (Self, Self) {
        let (first, second) = self.out.split_cols(col);
        let cols = self.b.cols();
        (
            Self {
                b: self.b.col_block(0..col),
                out: first,
            },
            Self {
                b: self.b.col_block(col..cols),
                out: second,
            },
        )
    }
}

/// One block on the calling thread.
pub(crate) fn product_block<F: Float>(
    alpha: F,
    a: Factor<'_, F>,
    b: Factor<'_, F>,
    beta: F,
    mut out: MatMut<'_, F>,
) {
    let (rows, cols, inner) = (out.num_rows(), out.num_cols(), a.cols());
    assert_eq!(
        (a.rows(), b.rows(), b.cols()),
        (rows, inner, cols),
        "the block's shape"
    );
    let (a_row, a_col) = a.strides();
    let (b_row, b_col) = b.strides();
    let stride = out.stride().cast_signed();
    // SAFETY: the views hold every number that these shapes and strides reach, which the assertion ties together, and
    // `out` is exclusive. Without `read_dst` the old contents are never looked at.
    #[expect(unsafe_code, reason = "gemm takes pointers and strides")]
    unsafe {
        gemm::gemm(
            rows,
            cols,
            inner,
            out.as_mut_ptr(),
            1,
            stride,
            beta != F::ZERO,
            a.mat.as_ptr(),
            a_col,
            a_row,
            b.mat.as_ptr(),
            b_col,
            b_row,
            beta,
            alpha,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
