//! Borrowed row-major matrices whose rows may lie apart, such as `q` inside a fused `[T, q | k | v]` buffer.

use std::marker::PhantomData;
use std::ops::Range;

/// A shared view of `rows × cols` numbers; row `i` starts `i · stride` after the first.
#[derive(Debug)]
pub struct Mat<'a, F> {
    start: *const F,
    rows: usize,
    cols: usize,
    stride: usize,
    lifetime: PhantomData<&'a [F]>,
}

/// An exclusive view of `rows × cols` numbers; row `i` starts `i · stride` after the first.
///
/// The numbers between two rows are not part of the view, so that one buffer can be cut into views side by side.
#[derive(Debug)]
pub struct MatMut<'a, F> {
    start: *mut F,
    rows: usize,
    cols: usize,
    stride: usize,
    lifetime: PhantomData<&'a mut [F]>,
}

#[expect(
    unsafe_code,
    reason = "the view is a borrow that slices cannot express"
)]
// SAFETY: a `Mat` is a set of `&[F]`, one for each row.
unsafe impl<F: Sync> Send for Mat<'_, F> {}
#[expect(
    unsafe_code,
    reason = "the view is a borrow that slices cannot express"
)]
// SAFETY: as above.
unsafe impl<F: Sync> Sync for Mat<'_, F> {}
#[expect(
    unsafe_code,
    reason = "the view is a borrow that slices cannot express"
)]
// SAFETY: a `MatMut` is a set of disjoint `&mut [F]`, one for each row.
unsafe impl<F: Send> Send for MatMut<'_, F> {}
#[expect(
    unsafe_code,
    reason = "the view is a borrow that slices cannot express"
)]
// SAFETY: as above; a shared `MatMut` only reads.
unsafe impl<F: Sync> Sync for MatMut<'_, F> {}

impl<F> Clone for Mat<'_, F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<F> Copy for Mat<'_, F> {}

impl<'a, F> Mat<'a, F> {
    /// Views a dense buffer.
    ///
    /// # Panics
    /// If `data` does not hold exactly `rows · cols` numbers.
    #[must_use]
    pub fn new(data: &'a [F], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a dense [{rows}, {cols}] matrix");
        Self::strided(data, rows, cols, cols)
    }

    /// Views rows that start `stride` numbers apart, the first at the start of `data`.
    ///
    /// # Panics
    /// If rows would overlap or `data` ends before the last row does.
    #[must_use]
    pub fn strided(data: &'a [F], rows: usize, cols: usize, stride: usize) -> Self {
        check_strided(data.len(), rows, cols, stride);
        Self {
            start: data.as_ptr(),
            rows,
            cols,
            stride,
            lifetime: PhantomData,
        }
    }

    /// Number of rows.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    #[must_use]
    pub fn num_cols(&self) -> usize {
        self.cols
    }

    /// Numbers from the start of one row to the start of the next.
    #[must_use]
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// One row.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline(always)]
    #[must_use]
    pub fn row(&self, row: usize) -> &'a [F] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the constructor checked that every row lies inside the borrowed data.
        #[expect(unsafe_code, reason = "rows of a strided view")]
        unsafe {
            std::slice::from_raw_parts(self.start.add(row * self.stride), self.cols)
        }
    }

    /// Some of the rows.
    ///
    /// # Panics
    /// If the range reaches past the last row.
    #[must_use]
    pub fn rows(&self, rows: Range<usize>) -> Self {
        assert!(
            rows.start <= rows.end && rows.end <= self.rows,
            "rows {rows:?} of {}",
            self.rows
        );
        Self {
            start: self.start.wrapping_add(rows.start * self.stride),
            rows: rows.len(),
            ..*self
        }
    }

    /// Some of the columns.
    ///
    /// # Panics
    /// If the range reaches past the last column.
    #[must_use]
    pub fn cols(&self, cols: Range<usize>) -> Self {
        assert!(
            cols.start <= cols.end && cols.end <= self.cols,
            "columns {cols:?} of {}",
            self.cols
        );
        Self {
            start: self.start.wrapping_add(cols.start),
            cols: cols.len(),
            ..*self
        }
    }

    pub(crate) fn as_ptr(&self) -> *const F {
        self.start
    }
}

impl<'a, F> MatMut<'a, F> {
    /// Views a dense buffer.
    ///
    /// # Panics
    /// If `data` does not hold exactly `rows · cols` numbers.
    #[must_use]
    pub fn new(data: &'a mut [F], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a dense [{rows}, {cols}] matrix");
        Self::strided(data, rows, cols, cols)
    }

    /// Views rows that start `stride` numbers apart, the first at the start of `data`.
    ///
    /// # Panics
    /// If rows would overlap or `data` ends before the last row does.
    #[must_use]
    pub fn strided(data: &'a mut [F], rows: usize, cols: usize, stride: usize) -> Self {
        check_strided(data.len(), rows, cols, stride);
        Self {
            start: data.as_mut_ptr(),
            rows,
            cols,
            stride,
            lifetime: PhantomData,
        }
    }

    /// Number of rows.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    #[must_use]
    pub fn num_cols(&self) -> usize {
        self.cols
    }

    /// Numbers from the start of one row to the start of the next.
    #[must_use]
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// One row.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline(always)]
    #[must_use]
    pub fn row_mut(&mut self, row: usize) -> &mut [F] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the constructor checked that every row lies inside the borrowed data, `&mut self` is exclusive, and
        // no other view holds numbers of this one.
        #[expect(unsafe_code, reason = "rows of a strided view")]
        unsafe {
            std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.cols)
        }
    }

    /// The same view, borrowed for less long.
    #[must_use]
    pub fn reborrow(&mut self) -> MatMut<'_, F> {
        MatMut {
            lifetime: PhantomData,
            ..*self
        }
    }

    /// The same view, read only.
    #[must_use]
    pub fn as_mat(&self) -> Mat<'_, F> {
        Mat {
            start: self.start,
            rows: self.rows,
            cols: self.cols,
            stride: self.stride,
            lifetime: PhantomData,
        }
    }

    /// The rows before `row`, and the others.
    ///
    /// # Panics
    /// If there are fewer rows.
    #[must_use]
    pub fn split_rows(self, row: usize) -> (Self, Self) {
        assert!(row <= self.rows, "split at row {row} of {}", self.rows);
        let rest = self.start.wrapping_add(row * self.stride);
        (
            Self { rows: row, ..self },
            Self {
                start: rest,
                rows: self.rows - row,
                ..self
            },
        )
    }

    /// The columns before `col`, and the others.
    ///
    /// # Panics
    /// If there are fewer columns.
    #[must_use]
    pub fn split_cols(self, col: usize) -> (Self, Self) {
        assert!(col <= self.cols, "split at column {col} of {}", self.cols);
        let rest = self.start.wrapping_add(col);
        (
            Self { cols: col, ..self },
            Self {
                start: rest,
                cols: self.cols - col,
                ..self
            },
        )
    }

    /// Some of the rows of some of the columns.
    ///
    /// # Panics
    /// If a range reaches past the end.
    #[must_use]
    pub fn block(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        let (below, _) = self.split_rows(rows.end);
        let (_, block) = below.split_rows(rows.start);
        let (left, _) = block.split_cols(cols.end);
        left.split_cols(cols.start).1
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut F {
        self.start
    }
}

fn check_strided(len: usize, rows: usize, cols: usize, stride: usize) {
    assert!(
        stride >= cols,
        "a stride of {stride} makes rows of {cols} overlap"
    );
    if rows > 0 {
        let end = (rows - 1) * stride + cols;
        assert!(
            end <= len,
            "[{rows}, {cols}] with stride {stride} needs {end} numbers of {len}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_cut_where_asked() {
        let data: Vec<usize> = (0..20).collect();
        let mat = Mat::strided(&data, 4, 3, 5);
        assert_eq!(mat.rows(1..3).cols(1..3).row(1), [11, 12]);

        let mut data = data;
        let (above, below) = MatMut::new(&mut data, 4, 5).split_rows(1);
        let (mut left, mut right) = below.split_cols(2);
        left.row_mut(0).fill(100);
        right.row_mut(2).fill(200);
        assert_eq!(
            (above.num_rows(), left.num_rows(), right.num_cols()),
            (1, 3, 3)
        );
        assert_eq!(data[5..10], [100, 100, 7, 8, 9]);
        assert_eq!(data[15..], [15, 16, 200, 200, 200]);
    }

    #[test]
    fn a_block_of_the_middle() {
        let mut data = vec![0; 20];
        let mut block = MatMut::new(&mut data, 4, 5).block(1..3, 2..4);
        block.row_mut(0).copy_from_slice(&[1, 2]);
        block.row_mut(1).copy_from_slice(&[3, 4]);
        assert_eq!(data[7..9], [1, 2]);
        assert_eq!(data[12..14], [3, 4]);
        assert_eq!(data.iter().sum::<i32>(), 10);
    }

    #[test]
    fn the_last_row_may_end_before_its_stride() {
        assert_eq!(Mat::strided(&[1, 2, 3, 4], 2, 1, 3).row(1), [4]);
        assert_eq!(Mat::<f32>::new(&[], 0, 7).num_rows(), 0);
    }

    #[test]
    #[should_panic(expected = "needs 5 numbers of 4")]
    fn too_few_numbers_are_refused() {
        let _ = Mat::strided(&[1, 2, 3, 4], 2, 2, 3);
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn overlapping_rows_are_refused() {
        let _ = MatMut::strided(&mut [1, 2, 3, 4], 2, 2, 1);
    }
}
