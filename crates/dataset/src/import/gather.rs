//! Gathering: batches parsed and converted on all cores, then cut into shards in the source's
//! order.

use std::sync::Arc;

use futures::stream::{self, BoxStream};
use futures::{StreamExt as _, TryStreamExt as _};
use tokio::sync::Semaphore;
use updraft_store::{Progress, Reject};

use super::convert::{Convert, Converted, Rejected, Share};
use super::groups::{Encoding, Groups};
use super::{Import, Place};
use crate::source::Batch;
use crate::tally::{RejectLimit, Tally};
use crate::{Error, Format, Result};

/// Batches converted at a time, on machines of many cores: each is in memory in two forms.
const CONVERTING: usize = 8;

/// Bytes of all batches between the source and their shards. Batches are small; but where rows are
/// long, as many as there are cores would be much.
const CONVERTING_BYTES: usize = 64 << 20;

/// A shard gathered but not yet written. It may have rejects only.
pub(super) struct Shard {
    pub(super) index: u32,
    pub(super) rows: Groups,
    pub(super) tally: Tally,
    pub(super) after: Place,
}

/// Gathers converted rows into shards, in the source's order.
pub(super) struct Gather<'a> {
    import: &'a Import<'a>,
    batches: BoxStream<'a, Result<Converted>>,
    waiting: Waiting,
    encoding: Encoding,
    at: Place,
    index: u32,
    /// Rejected so far, and the first of them, for the limit.
    rejected: u64,
    first_rejects: Vec<Reject>,
    total: Option<u64>,
    ended: bool,
}

/// A batch of which some rows are in a shard.
#[derive(Default)]
struct Waiting {
    batch: Converted,
    /// How many rows are.
    rows: usize,
    /// How many of them were taken.
    taken: usize,
}

/// Waits until a batch has room beside those before it; one over the limit comes alone.
async fn admit(batch: Batch, memory: Arc<Semaphore>) -> Result<(Batch, Share)> {
    let bytes = batch.bytes().min(CONVERTING_BYTES) as u32;
    let share = memory.acquire_many_owned(bytes).await;
    Ok((batch, share.map_err(Error::internal)?))
}

impl<'a> Gather<'a> {
    pub(super) async fn start(
        import: &'a Import<'a>,
        format: Arc<dyn Format>,
        at: Place,
        index: u32,
        before: &Tally,
    ) -> Result<Self> {
        let keep_columns = import.options.keep_columns;
        let plain_turns = import.formats.takes_plain_turns(format.name());
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let batches = import.source.open(at.next).await?;
        let memory = Arc::new(Semaphore::new(CONVERTING_BYTES));
        let admitted = batches.and_then(move |batch| admit(batch, Arc::clone(&memory)));
        let converted = admitted.map(move |admitted| {
            let format = Arc::clone(&format);
            async move {
                let (batch, share) = admitted?;
                let convert = move || Converted {
                    _share: Some(share),
                    ..Convert {
                        format: &*format,
                        plain_turns,
                        keep_columns,
                    }
                    .batch(batch)
                };
                tokio::task::spawn_blocking(convert)
                    .await
                    .map_err(Error::internal)
            }
        });
        let total = match (import.options.limit, import.source.num_rows()) {
            (Some(limit), Some(rows)) => Some(limit.min(rows)),
            (limit, rows) => limit.or(rows),
        };
        Ok(Self {
            import,
            batches: converted.buffered(threads.min(CONVERTING)).boxed(),
            waiting: Waiting::default(),
            encoding: Encoding::new()?,
            at,
            index,
            rejected: before.count("rejected"),
            first_rejects: before.rejects.first().cloned().into_iter().collect(),
            total,
            ended: false,
        })
    }

    /// The shards from here to the end of the source.
    pub(super) fn shards(self) -> BoxStream<'a, Result<Shard>> {
        let next = |mut gather: Self| async move {
            let shard = gather.next_shard().await?;
            Ok(shard.map(|shard| (shard, gather)))
        };
        stream::try_unfold(self, next).boxed()
    }

    async fn next_shard(&mut self) -> Result<Option<Shard>> {
        let mut rows = Groups::new(self.encoding.clone());
        let mut tally = Tally::default();
        while !self.ended {
            if !self.has_row().await? {
                self.ended = true;
                self.report();
                break;
            }
            self.take(&mut rows, &mut tally).await?;
            let plan = self.import.options.shards;
            // Rejects count, so that a shard ends where there are nothing but rejects.
            if plan.is_full(tally.count("source_rows"), rows.num_bytes()) {
                break;
            }
        }
        if rows.num_rows() == 0 && tally.counts.is_empty() {
            return Ok(None);
        }
        let index = self.index;
        self.index += 1;
        Ok(Some(Shard {
            index,
            rows,
            tally,
            after: self.at.clone(),
        }))
    }

    fn report(&self) {
        let event = Progress::new("import", self.at.rows, self.total, "rows");
        self.import.progress.report(&event);
    }

    /// Whether there is a row to take; waits for the next batch if need be.
    async fn has_row(&mut self) -> Result<bool> {
        let options = self.import.options;
        if options.limit.is_some_and(|limit| self.at.rows >= limit) {
            return Ok(false);
        }
        while self.waiting.rows == self.waiting.batch.rows.len() {
            // Gone before the next one comes, which may have to wait for its memory.
            self.waiting = Waiting::default();
            let batch = tokio::select! {
                biased;
                () = self.import.cancel.cancelled() => return Err(updraft_store::Error::Cancelled.into()),
                batch = self.batches.try_next() => batch?,
            };
            let limit = RejectLimit(options.max_reject_rate);
            limit.check_early(self.rejected, self.at.rows, &self.first_rejects)?;
            self.report();
            let Some(batch) = batch else {
                return Ok(false);
            };
            self.waiting = Waiting {
                batch,
                ..Waiting::default()
            };
        }
        Ok(true)
    }

    /// Puts the next row into the shard, or among its rejects.
    async fn take(&mut self, rows: &mut Groups, tally: &mut Tally) -> Result<()> {
        let waiting = &mut self.waiting;
        let row = &mut waiting.batch.rows[waiting.rows];
        let number = self.at.rows;
        waiting.rows += 1;
        tally.add("source_rows", 1);
        self.at.rows += 1;
        self.at.next = row.next;
        match &mut row.cells {
            Ok(bytes) => {
                tally.add("rows", 1);
                waiting.taken += 1;
                rows.push(&waiting.batch.columns, waiting.taken - 1, *bytes)
                    .await?;
            }
            Err(Rejected { origin, reason }) => {
                let reject = Reject {
                    source: std::mem::take(origin),
                    row: number,
                    reason: std::mem::take(reason),
                };
                self.rejected += 1;
                if self.first_rejects.is_empty() {
                    self.first_rejects.push(reject.clone());
                }
                tally.reject(reject)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn batches_share_the_memory_until_their_rows_are_in_shards() {
        let memory = Arc::new(Semaphore::new(CONVERTING_BYTES));
        let batch = |bytes| {
            admit(
                Batch::new(Vec::new()).with_bytes(bytes),
                Arc::clone(&memory),
            )
        };
        let half = batch(CONVERTING_BYTES / 2).await.expect("room");
        let quarter = batch(CONVERTING_BYTES / 4).await.expect("room");
        let mut huge = Box::pin(batch(usize::MAX));
        assert!(huge.as_mut().now_or_never().is_none(), "it comes alone");
        drop(half);
        assert!(huge.as_mut().now_or_never().is_none());
        drop(quarter);
        assert!(huge.as_mut().now_or_never().is_some());
    }
}
