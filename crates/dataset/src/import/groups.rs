//! A shard's row groups: gathered as Arrow columns, encoded on other cores as soon as they are full.

use std::sync::Arc;

use arrow_array::builder::{ArrayBuilder as _, StringBuilder};
use arrow_array::{Array as _, ArrayRef, RecordBatch, StringArray};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, spawn_blocking};
use updraft_store::Hashed;

use crate::record::{COLUMNS, schema};
use crate::shard::{Encoder, Group, LARGE_BYTES};
use crate::{Error, Result};

/// Uncompressed bytes of a row group.
const ROW_GROUP_BYTES: u64 = 16 << 20;
/// Row groups encoded at a time, by all shards together: each holds its bytes twice.
const ENCODING: usize = 4;

/// What the shards of an import share.
#[derive(Clone)]
pub(super) struct Encoding {
    encoder: Arc<Encoder>,
    slots: Arc<Semaphore>,
}

impl Encoding {
    pub(super) fn new() -> Result<Self> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            encoder: Arc::new(Encoder::new(schema())?),
            slots: Arc::new(Semaphore::new(threads.min(ENCODING))),
        })
    }
}

/// The row groups of one shard.
///
/// Each row's cells go to a few long buffers at once: kept apart, the many short strings that one
/// thread makes and another frees would hold twice their size in the allocator. The long buffers
/// are [`LARGE_BYTES`] from the beginning.
pub(super) struct Groups {
    shared: Encoding,
    full: Vec<JoinHandle<Result<Group>>>,
    open: [StringBuilder; COLUMNS.len()],
    open_bytes: u64,
    num_rows: u64,
    num_bytes: u64,
}

impl Groups {
    pub(super) fn new(shared: Encoding) -> Self {
        Self {
            shared,
            full: Vec::new(),
            open: Default::default(),
            open_bytes: 0,
            num_rows: 0,
            num_bytes: 0,
        }
    }

    /// Rows so far.
    pub(super) fn num_rows(&self) -> u64 {
        self.num_rows
    }

    /// Bytes of all cells so far.
    pub(super) fn num_bytes(&self) -> u64 {
        self.num_bytes
    }

    /// Appends a row of `columns` that has `bytes` in its cells; the one that reaches a row
    /// group's bytes ends the group.
    pub(super) async fn push(
        &mut self,
        columns: &[StringArray],
        row: usize,
        bytes: u64,
    ) -> Result<()> {
        for (open, column) in self.open.iter_mut().zip(columns) {
            append(open, column.is_valid(row).then(|| column.value(row)));
        }
        self.num_rows += 1;
        self.num_bytes += bytes;
        self.open_bytes += bytes;
        if self.open_bytes >= ROW_GROUP_BYTES {
            self.close().await?;
        }
        Ok(())
    }

    /// Has the open group encoded, once a core may.
    async fn close(&mut self) -> Result<()> {
        let slot = Arc::clone(&self.shared.slots).acquire_owned().await;
        let slot = slot.map_err(Error::internal)?;
        let columns = self.open.each_mut().map(StringBuilder::finish);
        let encoder = Arc::clone(&self.shared.encoder);
        self.open_bytes = 0;
        self.full.push(spawn_blocking(move || {
            let columns = columns.map(|column| -> ArrayRef { Arc::new(column) });
            let group = RecordBatch::try_new(schema(), columns.into())
                .expect("every column has the schema's type and length");
            let encoded = encoder.encode(&group);
            drop((group, slot));
            encoded
        }));
        Ok(())
    }

    /// The shard's bytes.
    pub(super) async fn finish(mut self) -> Result<Hashed> {
        if !self.open[0].is_empty() {
            self.close().await?;
        }
        let mut groups = Vec::with_capacity(self.full.len());
        for group in self.full {
            groups.push(group.await.map_err(Error::internal)??);
        }
        let assemble = move || self.shared.encoder.assemble(groups).map(Hashed::new);
        spawn_blocking(assemble).await.map_err(Error::internal)?
    }
}

/// Appends a cell; the first one with bytes takes the whole column's memory at once.
fn append(column: &mut StringBuilder, cell: Option<&str>) {
    if column.values_slice().is_empty() && cell.is_some_and(|cell| !cell.is_empty()) {
        let before = column.finish();
        *column = StringBuilder::with_capacity(before.len(), LARGE_BYTES);
        column
            .append_array(&before)
            .expect("no bytes cannot be too many");
    }
    column.append_option(cell);
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use parquet::file::metadata::RowGroupMetaData;
    use parquet::file::reader::{FileReader as _, SerializedFileReader};

    use super::*;

    fn columns(bytes: usize) -> Vec<StringArray> {
        let cell = |i| (i == 0).then(|| "x".repeat(bytes));
        (0..COLUMNS.len())
            .map(|i| StringArray::from(vec![cell(i)]))
            .collect()
    }

    #[tokio::test]
    async fn a_group_ends_with_the_row_that_fills_it() {
        let mut groups = Groups::new(Encoding::new().expect("a schema"));
        let third = ROW_GROUP_BYTES as usize / 3;
        for bytes in [third, third, third + 3, 5, 0] {
            groups
                .push(&columns(bytes), 0, bytes as u64)
                .await
                .expect("encoding");
        }
        assert_eq!(groups.num_rows(), 5);
        assert_eq!(groups.num_bytes(), 3 * third as u64 + 8);
        let bytes: Bytes = groups.finish().await.expect("encoded").bytes().clone();
        let file = SerializedFileReader::new(bytes).expect("Parquet");
        let rows: Vec<i64> = (file.metadata().row_groups().iter())
            .map(RowGroupMetaData::num_rows)
            .collect();
        assert_eq!(rows, [3, 2]);
    }
}
