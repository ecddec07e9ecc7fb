//! A shard's rows as Arrow columns, a row group at a time.

use std::sync::Arc;

use arrow_array::builder::{ArrayBuilder as _, StringBuilder};
use arrow_array::{Array as _, ArrayRef, RecordBatch};

use crate::record::{COLUMNS, Cells, schema};

/// Uncompressed bytes of a row group.
const ROW_GROUP_BYTES: u64 = 16 << 20;

/// Rows that wait for their shard to fill. Each row's cells go to a few long buffers at once: kept
/// apart, the many short strings that one thread makes and another frees would hold twice their
/// size in the allocator.
#[derive(Default)]
pub(super) struct Groups {
    full: Vec<RecordBatch>,
    open: [StringBuilder; COLUMNS.len()],
    open_bytes: u64,
    num_rows: u64,
    num_bytes: u64,
}

impl Groups {
    /// Rows so far.
    pub(super) fn num_rows(&self) -> u64 {
        self.num_rows
    }

    /// Bytes of all cells so far.
    pub(super) fn num_bytes(&self) -> u64 {
        self.num_bytes
    }

    /// Appends a row; the one that reaches a row group's bytes ends the group.
    pub(super) fn push(&mut self, cells: &Cells) {
        for (column, cell) in self.open.iter_mut().zip(cells) {
            column.append_option(cell.as_deref());
        }
        let bytes = size(cells);
        self.num_rows += 1;
        self.num_bytes += bytes;
        self.open_bytes += bytes;
        if self.open_bytes >= ROW_GROUP_BYTES {
            self.close();
        }
    }

    /// The row groups.
    pub(super) fn finish(mut self) -> Vec<RecordBatch> {
        if !self.open[0].is_empty() {
            self.close();
        }
        self.full
    }

    fn close(&mut self) {
        let columns = self.open.iter_mut().map(|column| -> ArrayRef {
            let mut column = column.finish();
            column.shrink_to_fit(); // a builder doubles its buffers
            Arc::new(column)
        });
        let group = RecordBatch::try_new(schema(), columns.collect());
        self.full
            .push(group.expect("every column has the schema's type and length"));
        self.open_bytes = 0;
    }
}

/// Bytes of a row's cells.
pub(super) fn size(cells: &Cells) -> u64 {
    cells.iter().flatten().map(|cell| cell.len() as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(bytes: usize) -> Cells {
        let mut cells = Cells::default();
        cells[0] = Some("x".repeat(bytes));
        cells
    }

    #[test]
    fn a_group_ends_with_the_row_that_fills_it() {
        let mut groups = Groups::default();
        let third = ROW_GROUP_BYTES as usize / 3;
        for bytes in [third, third, third + 3, 5, 0] {
            groups.push(&row(bytes));
        }
        assert_eq!(groups.num_rows(), 5);
        assert_eq!(groups.num_bytes(), 3 * third as u64 + 8);
        let groups = groups.finish();
        let rows: Vec<usize> = groups.iter().map(RecordBatch::num_rows).collect();
        assert_eq!(rows, [3, 2]);
        assert!(groups[1].column(1).is_null(0));
        assert!(Groups::default().finish().is_empty());
    }
}
