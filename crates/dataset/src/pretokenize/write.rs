//! Examples to a shard's bytes, while more examples are made.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use updraft_chat::Example;
use updraft_store::Hashed;

use super::tokenize::Tokenize;
use crate::{Result, examples};

/// Chunks of examples that may wait for the writer.
const CHUNKS_WAITING: usize = 4;

/// Where to send a shard's examples, and its bytes once there are no more to come.
pub(super) fn shard(
    tokenize: Arc<Tokenize>,
) -> (mpsc::Sender<Vec<Example>>, JoinHandle<Result<Hashed>>) {
    let (sender, mut chunks) = mpsc::channel::<Vec<Example>>(CHUNKS_WAITING);
    let encoding = tokio::task::spawn_blocking(move || {
        let write = &tokenize.work.write;
        let mut waited = std::time::Duration::ZERO;
        let started = std::time::Instant::now();
        let rows = std::iter::from_fn(|| {
            let waiting = std::time::Instant::now();
            let chunk = chunks.blocking_recv();
            waited += waiting.elapsed();
            chunk
        });
        let shard = examples::encode(rows.flatten()).map(Hashed::new);
        write.add(started.elapsed().saturating_sub(waited));
        shard
    });
    (sender, encoding)
}
