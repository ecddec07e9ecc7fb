//! Parquet files: row groups from the one that holds the cursor on, decoded a few rows at a time.

use std::sync::Arc;

use arrow_array::RecordBatch;
use futures::StreamExt as _;
use parquet::arrow::arrow_reader::{ArrowReaderBuilder, ParquetRecordBatchReaderBuilder};
use parquet::arrow::{ParquetRecordBatchStreamBuilder, ProjectionMask};
use parquet::file::metadata::ParquetMetaData;

use super::arrow_rows::{ArrowRows, supported};
use super::files::{BatchReader, DataFile, Io};
use super::row::{Batch, Cursor};
use crate::location::{Location, RangedFile, open_local};
use crate::{Error, Result};

/// Decoded bytes a batch aims at.
const BATCH_BYTES: u64 = 1 << 20;
/// Rows a batch has at most.
const BATCH_ROWS: u64 = 1024;

type Batches = Box<dyn Iterator<Item = Result<RecordBatch>> + Send>;

pub(super) fn open(file: &DataFile, start: Cursor, io: &Io) -> Result<Box<dyn BatchReader>> {
    let damaged = |err: parquet::errors::ParquetError| not_readable(&file.name, err);
    let name = file.name.clone();
    let batches: Batches = match &file.location {
        Location::Local(path, hash) => {
            let opened = open_local(path, hash).map_err(|err| Error::read(&*file.name, err))?;
            let builder = ParquetRecordBatchReaderBuilder::try_new(opened).map_err(damaged)?;
            let reader = from_row(builder, start.row).build().map_err(damaged)?;
            Box::new(
                reader
                    .map(move |batch| batch.map_err(|err| Error::corrupt(&*name, err.to_string()))),
            )
        }
        Location::Remote(remote) => {
            let ranged = RangedFile::new(remote.clone(), file.size);
            let Some(builder) = io.block_on(ParquetRecordBatchStreamBuilder::new(ranged)) else {
                return Ok(Box::new(ParquetReader {
                    name,
                    at: start,
                    batches: Box::new(std::iter::empty()),
                }));
            };
            let mut stream = from_row(builder.map_err(damaged)?, start.row)
                .build()
                .map_err(damaged)?;
            let io = io.clone();
            Box::new(std::iter::from_fn(move || {
                let batch = io.block_on(stream.next())??;
                Some(batch.map_err(|err| not_readable(&name, err)))
            }))
        }
    };
    Ok(Box::new(ParquetReader {
        name: file.name.clone(),
        at: start,
        batches,
    }))
}

/// Tells a store that failed from bytes that are wrong.
pub(crate) fn not_readable(file: &str, err: parquet::errors::ParquetError) -> Error {
    match err {
        parquet::errors::ParquetError::External(source) => Error::read(file, source),
        other => Error::corrupt(file, other.to_string()),
    }
}

/// Leaves out the columns that cannot become JSON and the rows before `row`.
fn from_row<T>(builder: ArrowReaderBuilder<T>, row: u64) -> ArrowReaderBuilder<T> {
    let metadata = Arc::clone(builder.metadata());
    let fields = builder.schema().fields();
    let roots = (0..fields.len()).filter(|&i| supported(fields[i].data_type()));
    let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
    let (groups, offset) = groups_from(&metadata, row);
    builder
        .with_projection(mask)
        .with_batch_size(batch_rows(&metadata))
        .with_row_groups(groups)
        .with_offset(offset)
}

fn groups_from(metadata: &ParquetMetaData, row: u64) -> (Vec<usize>, usize) {
    let mut before = 0;
    for (i, group) in metadata.row_groups().iter().enumerate() {
        let rows = group.num_rows().max(0) as u64;
        if before + rows > row {
            return (
                (i..metadata.num_row_groups()).collect(),
                (row - before) as usize,
            );
        }
        before += rows;
    }
    (Vec::new(), 0)
}

fn batch_rows(metadata: &ParquetMetaData) -> usize {
    let bytes: u64 = metadata
        .row_groups()
        .iter()
        .map(|group| group.total_byte_size().max(0) as u64)
        .sum();
    let rows = metadata.file_metadata().num_rows().max(1) as u64;
    (BATCH_BYTES / (bytes / rows).max(1)).clamp(1, BATCH_ROWS) as usize
}

struct ParquetReader {
    name: Arc<str>,
    at: Cursor,
    batches: Batches,
}

impl BatchReader for ParquetReader {
    fn next_batch(&mut self) -> Result<Option<Batch>> {
        let Some(batch) = self.batches.next().transpose()? else {
            return Ok(None);
        };
        let (file, first) = (self.name.clone(), self.at);
        self.at.row += batch.num_rows() as u64;
        Ok(Some(Batch::arrow(ArrowRows { file, first, batch })))
    }
}
