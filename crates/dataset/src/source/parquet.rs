//! Parquet files: row groups from the one that holds the cursor on, decoded a few rows at a time.

use std::sync::Arc;

use arrow_array::RecordBatch;
use futures::StreamExt as _;
use parquet::arrow::arrow_reader::{ArrowReaderBuilder, ParquetRecordBatchReaderBuilder};
use parquet::arrow::{ParquetRecordBatchStreamBuilder, ProjectionMask};
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData, RowGroupMetaData};

use super::arrow_rows::{ArrowRows, Leaves};
use super::files::{BatchReader, DataFile, Io};
use super::footer;
use super::row::{Batch, Cursor};
use crate::location::{Location, RangedFile, open_local};
use crate::{Error, Result};

/// Decoded bytes a batch aims at.
const BATCH_BYTES: u64 = 1 << 20;
/// Rows a batch has at most.
const BATCH_ROWS: u64 = 1024;

/// The largest row group of a remote file.
const MAX_GROUP: u64 = 256 << 20;

type Batches = Box<dyn Iterator<Item = Result<RecordBatch>> + Send>;

pub(super) fn open(file: &DataFile, start: Cursor, io: &Io) -> Result<Box<dyn BatchReader>> {
    let damaged = |err: parquet::errors::ParquetError| not_readable(&file.name, err);
    let name = file.name.clone();
    let batches: Batches = match &file.location {
        Location::Local(path, hash) => {
            let failed = |err| Error::read(&*file.name, err);
            let mut opened = open_local(path, hash).map_err(failed)?;
            footer::check_file(&mut opened)
                .map_err(failed)?
                .map_err(|problem| Error::corrupt(&*name, problem))?;
            let builder = ParquetRecordBatchReaderBuilder::try_new(opened).map_err(damaged)?;
            let reader = from_row(builder, start.row, &name)
                .build()
                .map_err(damaged)?;
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
            let builder = from_row(builder.map_err(damaged)?, start.row, &name);
            check_groups(builder.metadata(), &name)?;
            let mut stream = builder.build().map_err(damaged)?;
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

/// Leaves out what cannot become JSON and the rows before `row`.
fn from_row<T>(builder: ArrowReaderBuilder<T>, row: u64, file: &str) -> ArrowReaderBuilder<T> {
    let metadata = Arc::clone(builder.metadata());
    let leaves = Leaves::of(builder.schema());
    leaves.warn(file);
    let mask = ProjectionMask::leaves(builder.parquet_schema(), leaves.read);
    let (groups, offset) = groups_from(&metadata, row);
    builder
        .with_projection(mask)
        .with_batch_size(batch_rows(&metadata))
        .with_row_groups(groups)
        .with_offset(offset)
}

/// A row group of a remote file comes whole, so memory must hold it.
fn check_groups(metadata: &ParquetMetaData, file: &str) -> Result<()> {
    let bytes = |group: &RowGroupMetaData| group.compressed_size().max(0) as u64;
    match metadata.row_groups().iter().map(bytes).max() {
        Some(largest) if largest > MAX_GROUP => Err(Error::corrupt(
            file,
            format!(
                "a row group of {largest} bytes is over the limit of {} MB: write it again with smaller ones, or fetch the file and read it from disk",
                MAX_GROUP >> 20
            ),
        )),
        _ => Ok(()),
    }
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

/// Rows of a batch: so few that those of the row group with the largest ones fit.
fn batch_rows(metadata: &ParquetMetaData) -> usize {
    let rows = |group: &RowGroupMetaData| {
        let encoded = group.total_byte_size().max(0) as u64;
        // A text that a dictionary has once may be in every row.
        let texts = (group.columns().iter())
            .filter_map(ColumnChunkMetaData::unencoded_byte_array_data_bytes);
        let decoded = texts
            .map(|bytes| bytes.max(0) as u64)
            .fold(0, u64::saturating_add);
        let rows = group.num_rows().max(1) as u64;
        BATCH_BYTES / (encoded.max(decoded) / rows).max(1)
    };
    let fewest = metadata.row_groups().iter().map(rows).min();
    fewest.unwrap_or(BATCH_ROWS).clamp(1, BATCH_ROWS) as usize
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

#[cfg(test)]
mod tests {
    use parquet::file::metadata::FileMetaData;
    use parquet::schema::parser::parse_message_type;
    use parquet::schema::types::SchemaDescriptor;

    use super::*;

    /// A file of one column, with row groups of these sizes.
    fn metadata(groups: &[u64]) -> ParquetMetaData {
        let schema = parse_message_type("message m { required int64 a; }").expect("a schema");
        let schema = Arc::new(SchemaDescriptor::new(Arc::new(schema)));
        let group = |&bytes: &u64| {
            let column = ColumnChunkMetaData::builder(schema.column(0))
                .set_total_compressed_size(bytes as i64)
                .build()
                .expect("a column");
            RowGroupMetaData::builder(Arc::clone(&schema))
                .add_column_metadata(column)
                .build()
                .expect("a row group")
        };
        let file = FileMetaData::new(1, 0, None, None, Arc::clone(&schema), None);
        ParquetMetaData::new(file, groups.iter().map(group).collect())
    }

    #[test]
    fn a_remote_row_group_that_memory_could_not_hold_is_refused() {
        assert!(check_groups(&metadata(&[1, MAX_GROUP]), "a.parquet").is_ok());
        let err = check_groups(&metadata(&[1, MAX_GROUP + 1]), "a.parquet").expect_err("too large");
        let text = format!("{err}: {:?}", std::error::Error::source(&err));
        assert!(
            text.contains("a.parquet") && text.contains("256 MB"),
            "{text}"
        );
        assert!(text.contains("smaller ones"), "{text}");
    }
}
