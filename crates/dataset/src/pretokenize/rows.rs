//! A standardized shard's rows, decoded ahead and tokenized on all cores, in order.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{Array as _, RecordBatch};
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{StreamExt as _, TryStreamExt as _};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use tokio::sync::mpsc;
use updraft_store::CancelToken;

use super::tokenize::{Tokenize, Tokenized, Unfit};
use crate::record::schema;
use crate::{Error, Result};

/// Rows tokenized as one piece of work.
const CHUNK_ROWS: usize = 256;

/// What became of a chunk's rows.
type Outcomes = Vec<Result<Tokenized, Unfit>>;

/// The outcome of every row, chunk by chunk.
pub(super) fn tokenized(
    bytes: Bytes,
    name: String,
    tokenize: Arc<Tokenize>,
    cancel: CancelToken,
) -> BoxStream<'static, Result<Outcomes>> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (sender, mut chunks) = mpsc::channel(cores);
    let reading = Arc::clone(&tokenize);
    tokio::task::spawn_blocking(move || decode(bytes, &name, &reading, &sender));
    stream::poll_fn(move |context| chunks.poll_recv(context))
        .map_ok(move |chunk| {
            let (tokenize, cancel) = (Arc::clone(&tokenize), cancel.clone());
            async move {
                cancel.check()?;
                let work = move || tokenize_chunk(&chunk, &tokenize);
                tokio::task::spawn_blocking(work)
                    .await
                    .map_err(Error::internal)
            }
        })
        .try_buffered(cores + 1) // one to take while the others are made
        .boxed()
}

/// Sends the chunks until there is none, or nobody to take them.
fn decode(
    bytes: Bytes,
    name: &str,
    tokenize: &Tokenize,
    chunks: &mpsc::Sender<Result<RecordBatch>>,
) {
    let corrupt = |problem: String| Error::corrupt(name, problem);
    let reader = ParquetRecordBatchReaderBuilder::try_new(bytes)
        .and_then(|builder| builder.with_batch_size(CHUNK_ROWS).build());
    let mut reader = match reader {
        Ok(reader) => reader,
        Err(err) => return drop(chunks.blocking_send(Err(corrupt(err.to_string())))),
    };
    while let Some(chunk) = tokenize.work.read.time(|| reader.next()) {
        let chunk = match chunk {
            Ok(chunk) if chunk.schema_ref().fields() == schema().fields() => Ok(chunk),
            Ok(_) => Err(corrupt(
                "its columns are not those of a standardized shard".to_owned(),
            )),
            Err(err) => Err(corrupt(err.to_string())),
        };
        let failed = chunk.is_err();
        if chunks.blocking_send(chunk).is_err() || failed {
            return;
        }
    }
}

fn tokenize_chunk(chunk: &RecordBatch, tokenize: &Tokenize) -> Outcomes {
    let columns: Vec<_> = chunk
        .columns()
        .iter()
        .map(AsArray::as_string::<i32>)
        .collect();
    let cell = |column: usize, row: usize| {
        columns[column]
            .is_valid(row)
            .then(|| columns[column].value(row))
    };
    (0..chunk.num_rows())
        .map(|row| tokenize.row(std::array::from_fn(|column| cell(column, row))))
        .collect()
}
