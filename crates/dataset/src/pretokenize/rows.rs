//! A standardized shard's rows, decoded ahead and tokenized on all cores, in order.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{Array as _, RecordBatch};
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt as _, TryStreamExt as _};
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
    let reading = Arc::clone(&tokenize);
    ahead(cores, move |sender| {
        decode(bytes, &name, &reading, sender);
    })
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

/// What a thread of its own sends, `most` things ahead; then the panic that ended it, if one did:
/// its end must not look like the end of what there was to send.
fn ahead<T: Send + 'static>(
    most: usize,
    send: impl FnOnce(&mpsc::Sender<Result<T>>) + Send + 'static,
) -> impl Stream<Item = Result<T>> + Send {
    let (sender, received) = mpsc::channel(most);
    let thread = tokio::task::spawn_blocking(move || send(&sender));
    stream::unfold(Some((received, thread)), |open| async {
        let (mut received, thread) = open?;
        match received.recv().await {
            Some(sent) => Some((sent, Some((received, thread)))),
            None => thread
                .await
                .err()
                .map(|panic| (Err(Error::internal(panic)), None)),
        }
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_thread_that_panics_is_no_end() {
        let sent: Vec<Result<u32>> = ahead(2, |sender| {
            for i in 0..3 {
                sender.blocking_send(Ok(i)).expect("wanted");
            }
            panic!("a decoder gave up");
        })
        .collect()
        .await;
        assert!(
            matches!(sent[..], [Ok(0), Ok(1), Ok(2), Err(Error::Internal(_))]),
            "{sent:?}"
        );
        let calm: Vec<Result<u32>> = ahead(2, |sender| {
            sender.blocking_send(Ok(7)).expect("wanted");
        })
        .collect()
        .await;
        assert!(matches!(calm[..], [Ok(7)]), "{calm:?}");
    }
}
