//! The raw copy: a source's rows as they came, one JSON object a line, in `raw/<dataset>/`.

use futures::stream::{self, BoxStream};
use futures::{StreamExt as _, TryStreamExt as _};
use serde_json::{Value, json};
use updraft_store::{
    CancelToken, FinishedStage, Hashed, JournalEntry, Opened, Progress, ProgressSink, Reject,
    StageId, StageWriter, Store, open_stage,
};

use super::ImportOptions;
use crate::source::{BatchStream, Cursor, Row};
use crate::tally::Tally;
use crate::{Error, Result, Source};

/// Raised whenever the same rows would become other shards.
const STAGE_VERSION: u32 = 3;
/// Shards compressed and uploaded at a time while the next one is gathered.
const SHARDS_IN_FLIGHT: usize = 2;

/// Copies the rows of `source` to `raw/<dataset>/`, before any format has looked at them;
/// [`Files::in_stage`](crate::source::Files::in_stage) makes them a source again.
///
/// A row that is no JSON object has nothing to copy but is listed with its reason. Columns that
/// cannot become JSON (images in Parquet) are left out, and a number of JSON is copied as 64 bits
/// hold it: as an integer, or else as a float.
///
/// # Errors
/// Those of the source and the store, and of options that make no sense.
pub async fn copy_raw(
    store: &Store,
    dataset: &str,
    source: &dyn Source,
    options: &ImportOptions,
    progress: &dyn ProgressSink,
    cancel: &CancelToken,
) -> Result<FinishedStage> {
    options.validate()?;
    let id = StageId::raw(dataset)?;
    let inputs = json!({ "source": source.identity(), "limit": options.limit, "shards": options.shards, "version": STAGE_VERSION });
    let writer = match open_stage(store, &id, "raw", &inputs).await? {
        Opened::Finished(stage) => return Ok(stage),
        Opened::Open(writer) => writer,
    };
    let (mut all, index, place) = resume(&writer).await?;
    let gather = Gather {
        rows: source.open(place.next).await?,
        waiting: Vec::new().into_iter(),
        at: place,
        index,
        options,
        progress,
        cancel,
        ended: false,
    };
    let shards = gather.shards().map_ok(|shard| write(&writer, shard));
    let mut written = shards.try_buffered(SHARDS_IN_FLIGHT).boxed();
    while let Some(tally) = written.try_next().await? {
        all.append(tally)?;
    }
    drop(written);
    cancel.check()?;
    let draft = all.into_draft(&writer).await?;
    Ok(writer.commit(draft).await?)
}

#[derive(Debug, Clone, Copy, Default, serde::Serialize, serde::Deserialize)]
struct Place {
    next: Cursor,
    /// Rows of the source before `next`.
    rows: u64,
}

/// What an earlier try finished without a gap, how many shards, and where it stopped.
async fn resume(writer: &StageWriter) -> Result<(Tally, u32, Place)> {
    let (mut all, mut shards, mut place) = (Tally::default(), 0, Place::default());
    for ((index, entry), expected) in writer.journal().await?.into_iter().zip(0..) {
        match serde_json::from_value(entry.cursor.clone()) {
            Ok(next) if index == expected => place = next,
            _ => break,
        }
        shards = expected + 1;
        all.append(entry.into())?;
    }
    Ok((all, shards, place))
}

struct Shard {
    index: u32,
    lines: Vec<u8>,
    tally: Tally,
    after: Place,
}

struct Gather<'a> {
    rows: BatchStream,
    waiting: std::vec::IntoIter<Row>,
    at: Place,
    index: u32,
    options: &'a ImportOptions,
    progress: &'a dyn ProgressSink,
    cancel: &'a CancelToken,
    ended: bool,
}

impl<'a> Gather<'a> {
    fn shards(self) -> BoxStream<'a, Result<Shard>> {
        let next = |mut gather: Self| async move {
            let shard = gather.next_shard().await?;
            Ok(shard.map(|shard| (shard, gather)))
        };
        stream::try_unfold(self, next).boxed()
    }

    async fn next_shard(&mut self) -> Result<Option<Shard>> {
        let (mut lines, mut tally) = (Vec::new(), Tally::default());
        while !self.ended {
            let Some(row) = self.next_row().await? else {
                self.ended = true;
                break;
            };
            self.take(row, &mut lines, &mut tally)?;
            let plan = self.options.shards;
            if plan.is_full(tally.count("source_rows"), lines.len() as u64) {
                break;
            }
        }
        if tally.counts.is_empty() {
            return Ok(None);
        }
        self.index += 1;
        let (index, after) = (self.index - 1, self.at);
        Ok(Some(Shard {
            index,
            lines,
            tally,
            after,
        }))
    }

    async fn next_row(&mut self) -> Result<Option<Row>> {
        if self
            .options
            .limit
            .is_some_and(|limit| self.at.rows >= limit)
        {
            return Ok(None);
        }
        loop {
            if let Some(row) = self.waiting.next() {
                return Ok(Some(row));
            }
            let batch = tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Err(updraft_store::Error::Cancelled.into()),
                batch = self.rows.try_next() => batch?,
            };
            let Some(batch) = batch else {
                return Ok(None);
            };
            self.progress.report(&Progress::new(
                "raw",
                self.at.rows,
                self.options.limit,
                "rows",
            ));
            let parsed = tokio::task::spawn_blocking(move || batch.rows());
            self.waiting = parsed.await.map_err(Error::internal)?.into_iter();
        }
    }

    fn take(&mut self, row: Row, lines: &mut Vec<u8>, tally: &mut Tally) -> Result<()> {
        tally.add("source_rows", 1);
        match row.value {
            Ok(columns) => {
                tally.add("rows", 1);
                lines.extend_from_slice(Value::Object(columns).to_string().as_bytes());
                lines.push(b'\n');
            }
            Err(reason) => tally.reject(Reject {
                source: row.origin.to_string(),
                row: self.at.rows,
                reason,
            })?,
        }
        self.at = Place {
            next: row.next,
            rows: self.at.rows + 1,
        };
        Ok(())
    }
}

/// Writes a shard's objects, then its journal entry.
async fn write(writer: &StageWriter, shard: Shard) -> Result<Tally> {
    let Shard {
        index,
        lines,
        mut tally,
        after,
    } = shard;
    if !lines.is_empty() {
        let compress =
            move || zstd::bulk::compress(&lines, zstd::DEFAULT_COMPRESSION_LEVEL).map(Hashed::new);
        let shard = tokio::task::spawn_blocking(compress)
            .await
            .map_err(Error::internal)?
            .map_err(Error::internal)?;
        let name = format!("shard-{index:05}-{}.jsonl.zst", &shard.sha256()[..16]);
        let object = writer.put_hashed(&name, &shard).await?;
        tally.objects.push(object.with_rows(tally.count("rows")));
    }
    tally.put_rejects(writer, index).await?;
    let cursor = serde_json::to_value(after).map_err(Error::internal)?;
    let entry: JournalEntry = writer
        .put_journal(index, &tally.into_journal(cursor))
        .await?;
    Ok(entry.into())
}
