//! Converting: a batch's rows into cells, on whichever core is free.

use arrow_array::StringArray;
use arrow_array::builder::StringBuilder;
use serde_json::{Map, Value};

use crate::Format;
use crate::format::Turns;
use crate::record::{COLUMNS, Cells};
use crate::source::{Batch, Cursor, MAX_ROW_BYTES, Row, too_long};

/// How rows are converted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Convert<'a> {
    pub(super) format: &'a dyn Format,
    /// Whether plain turns may go straight to JSON, as the format would have them.
    pub(super) plain_turns: bool,
    pub(super) keep_columns: bool,
}

/// A part of the memory that all batches at hand may take.
pub(super) type Share = tokio::sync::OwnedSemaphorePermit;

/// A batch's rows after conversion.
#[derive(Default)]
pub(super) struct Converted {
    /// The cells of the rows that were taken.
    pub(super) columns: Vec<StringArray>,
    /// Every row, in order.
    pub(super) rows: Vec<Outcome>,
    /// Given back with the memory of the rows.
    pub(super) _share: Option<Share>,
}

/// What became of a row.
pub(super) struct Outcome {
    /// The place right after it.
    pub(super) next: Cursor,
    /// The bytes of its cells, or why it has none.
    pub(super) cells: Result<u64, Rejected>,
}

/// A row that was not taken: where it stood and why.
pub(super) struct Rejected {
    pub(super) origin: String,
    pub(super) reason: String,
}

impl Convert<'_> {
    /// Parses and converts a batch.
    pub(super) fn batch(self, batch: Batch) -> Converted {
        let mut done = Collect::default();
        // Other columns are kept as the format leaves them, so it has to look at the rows.
        let arrow = batch
            .as_arrow()
            .filter(|_| self.plain_turns && !self.keep_columns);
        let Some((arrow, turns)) =
            arrow.and_then(|arrow| Some((arrow, Turns::find(&arrow.batch)?)))
        else {
            for row in batch.rows() {
                self.row(row, &mut done);
            }
            return done.finish();
        };
        for row in 0..arrow.batch.num_rows() {
            if done.cells.write_messages(|json| turns.write(row, json)) {
                done.take(arrow.next(row), || arrow.origin(row).to_string());
            } else {
                self.row(arrow.row(row), &mut done);
            }
        }
        done.finish()
    }

    fn row(self, row: Row, done: &mut Collect) {
        let Row {
            origin,
            next,
            value,
        } = row;
        match value.and_then(|columns| self.columns(columns, &mut done.cells)) {
            Ok(()) => done.take(next, || origin.to_string()),
            Err(reason) => done.reject(next, origin.to_string(), reason),
        }
    }

    fn columns(self, mut columns: Map<String, Value>, cells: &mut Cells) -> Result<(), String> {
        let record = self.format.convert(&mut columns)?;
        let rest = self.keep_columns.then_some(&columns);
        record.write(rest, cells).map_err(|err| err.to_string())
    }
}

/// Rows as they are converted.
#[derive(Default)]
struct Collect {
    /// The row at hand.
    cells: Cells,
    columns: [StringBuilder; COLUMNS.len()],
    rows: Vec<Outcome>,
}

impl Collect {
    /// Takes the row at hand, if it is not too long.
    fn take(&mut self, next: Cursor, origin: impl FnOnce() -> String) {
        let bytes = self.cells.bytes();
        if bytes > MAX_ROW_BYTES as u64 {
            return self.reject(next, origin(), too_long());
        }
        for (column, cell) in self.columns.iter_mut().zip(self.cells.iter()) {
            column.append_option(cell);
        }
        let cells = Ok(bytes);
        self.rows.push(Outcome { next, cells });
    }

    fn reject(&mut self, next: Cursor, origin: String, reason: String) {
        let cells = Err(Rejected { origin, reason });
        self.rows.push(Outcome { next, cells });
    }

    fn finish(mut self) -> Converted {
        Converted {
            columns: self.columns.iter_mut().map(StringBuilder::finish).collect(),
            rows: self.rows,
            _share: None,
        }
    }
}
