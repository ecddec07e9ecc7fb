//! Rows taken and rows rejected: the running totals of a stage and their limit.

use std::collections::BTreeMap;

use futures::stream::{self, BoxStream};
use futures::{StreamExt as _, TryStreamExt as _};
use serde_json::Value;
use updraft_store::{
    FinishedStage, Hashed, JournalEntry, ManifestDraft, ObjectEntry, Reject, StageWriter,
};

use crate::{Error, Result};

/// A manifest itself lists at most this many rejects; objects beside the shards list the others
/// ([`rejects`](crate::rejects) reads them all).
pub const MAX_LISTED_REJECTS: usize = 1000;
/// And at most this many of one shard: journals are read at once.
const MAX_LISTED_OF_SHARD: usize = 50;

/// A stage stops early only after this many rows, so that a bad start is not taken for the whole.
const MIN_ROWS_TO_JUDGE: u64 = 10_000;

/// The rows of one shard, or of all shards so far.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) objects: Vec<ObjectEntry>,
    pub(crate) counts: BTreeMap<String, u64>,
    pub(crate) rejects: Vec<Reject>,
    more: RejectLines,
    more_rejects: Vec<ObjectEntry>,
}

impl Tally {
    pub(crate) fn add(&mut self, count: &str, more: u64) {
        match self.counts.get_mut(count) {
            Some(count) => *count += more,
            None => drop(self.counts.insert(count.to_owned(), more)),
        }
    }

    pub(crate) fn count(&self, count: &str) -> u64 {
        self.counts.get(count).copied().unwrap_or(0)
    }

    /// Takes a reject of the shard at hand.
    pub(crate) fn reject(&mut self, mut reject: Reject) -> Result<()> {
        self.add("rejected", 1);
        shorten(&mut reject.reason);
        self.list(reject, MAX_LISTED_OF_SHARD)
    }

    fn list(&mut self, reject: Reject, most: usize) -> Result<()> {
        if self.rejects.len() < most {
            self.rejects.push(reject);
            return Ok(());
        }
        self.more.push(&reject)
    }

    /// Writes the rejects of a shard that the manifest will not list itself.
    pub(crate) async fn put_rejects(&mut self, writer: &StageWriter, index: u32) -> Result<()> {
        self.put_list(writer, &format!("{index:05}")).await
    }

    async fn put_list(&mut self, writer: &StageWriter, of: &str) -> Result<()> {
        let lines = std::mem::take(&mut self.more);
        let rows = lines.rows;
        if rows > 0 {
            let list = Hashed::new(lines.finish()?);
            let name = format!("rejects-{of}-{}.jsonl.zst", &list.sha256()[..16]);
            let object = writer.put_hashed(&name, &list).await?;
            self.more_rejects.push(object.with_rows(rows));
        }
        Ok(())
    }

    /// Adds what comes after.
    pub(crate) fn append(&mut self, next: Self) -> Result<()> {
        self.objects.extend(next.objects);
        for (count, more) in next.counts {
            *self.counts.entry(count).or_default() += more;
        }
        self.more_rejects.extend(next.more_rejects);
        let mut rejects = next.rejects.into_iter();
        rejects.try_for_each(|reject| self.list(reject, MAX_LISTED_REJECTS))
    }

    pub(crate) fn into_journal(self, cursor: Value) -> JournalEntry {
        JournalEntry {
            objects: self.objects,
            counts: self.counts,
            rejects: self.rejects,
            more_rejects: self.more_rejects,
            cursor,
        }
    }

    /// What the whole stage commits, once the rejects are written that the manifest cannot hold.
    pub(crate) async fn into_draft(mut self, writer: &StageWriter) -> Result<ManifestDraft> {
        self.put_list(writer, "others").await?;
        Ok(ManifestDraft {
            objects: self.objects,
            counts: self.counts,
            rejects: self.rejects,
            more_rejects: self.more_rejects,
            ..ManifestDraft::default()
        })
    }
}

impl From<JournalEntry> for Tally {
    fn from(entry: JournalEntry) -> Self {
        Self {
            objects: entry.objects,
            counts: entry.counts,
            rejects: entry.rejects,
            more: RejectLines::default(),
            more_rejects: entry.more_rejects,
        }
    }
}

/// A reason holds at most this many bytes of what it quotes.
const MAX_REASON_BYTES: usize = 500;

/// Cuts a reason that quotes a whole row.
fn shorten(reason: &mut String) {
    if reason.len() > MAX_REASON_BYTES {
        let whole = (0..=MAX_REASON_BYTES)
            .rev()
            .find(|&at| reason.is_char_boundary(at));
        reason.truncate(whole.unwrap_or(0));
        reason.push('…');
    }
}

/// Rejects as JSON lines, compressed as they come: a stage may be told to take any number of them.
#[derive(Debug, Default)]
struct RejectLines {
    rows: u64,
    /// Lines not compressed yet.
    lines: Vec<u8>,
    /// Compressed frames, which follow each other as one stream.
    frames: Vec<u8>,
}

/// Lines are compressed when they have this many bytes.
const FRAME_BYTES: usize = 1 << 20;

impl RejectLines {
    fn push(&mut self, reject: &Reject) -> Result<()> {
        self.rows += 1;
        serde_json::to_writer(&mut self.lines, reject).map_err(Error::internal)?;
        self.lines.push(b'\n');
        if self.lines.len() >= FRAME_BYTES {
            self.compress()?;
        }
        Ok(())
    }

    fn compress(&mut self) -> Result<()> {
        let level = zstd::DEFAULT_COMPRESSION_LEVEL;
        let frame = zstd::bulk::compress(&self.lines, level).map_err(Error::internal)?;
        self.frames.extend(frame);
        self.lines.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        if !self.lines.is_empty() {
            self.compress()?;
        }
        Ok(self.frames)
    }
}

/// Every reject of a finished stage: first those in its manifest, then those in its lists.
///
/// # Errors
/// Those of the store, and [`Error::Corrupt`] for a list that cannot be read.
pub async fn rejects(stage: &FinishedStage) -> Result<BoxStream<'static, Result<Reject>>> {
    let manifest = stage.manifest().await?;
    let stage = stage.clone();
    let listed = stream::iter(manifest.rejects).map(Ok);
    let more = stream::iter(manifest.more_rejects)
        .then(move |object| {
            let stage = stage.clone();
            async move { read_list(&stage, &object).await }
        })
        .map_ok(|list| stream::iter(list).map(Ok))
        .try_flatten();
    Ok(listed.chain(more).boxed())
}

async fn read_list(stage: &FinishedStage, object: &ObjectEntry) -> Result<Vec<Reject>> {
    let bytes = stage.read(object).await?;
    let corrupt = |err: String| Error::corrupt(stage.path(&object.path), err);
    let lines =
        zstd::stream::read::Decoder::new(&bytes[..]).map_err(|err| corrupt(err.to_string()))?;
    serde_json::Deserializer::from_reader(std::io::BufReader::new(lines))
        .into_iter()
        .map(|reject| reject.map_err(|err| corrupt(err.to_string())))
        .collect()
}

/// The share of rows that may be rejected.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RejectLimit(pub(crate) f64);

impl RejectLimit {
    pub(crate) fn validate(self) -> Result<()> {
        if (0.0..=1.0).contains(&self.0) {
            return Ok(());
        }
        Err(Error::InvalidOption {
            option: "max_reject_rate",
            problem: format!("is {}: give a share from 0 to 1", self.0),
        })
    }

    /// Judges a stage that an earlier run, perhaps with another limit, has finished.
    pub(crate) async fn check_finished(self, stage: &FinishedStage) -> Result<()> {
        let count = |name: &str| stage.counts().get(name).copied().unwrap_or(0);
        let (rejected, rows) = (count("rejected"), count("source_rows"));
        if self.check(rejected, rows, &[]).is_ok() {
            return Ok(());
        }
        self.check(rejected, rows, &stage.manifest().await?.rejects)
    }

    /// Judges the rows so far.
    pub(crate) fn check_early(self, rejected: u64, rows: u64, rejects: &[Reject]) -> Result<()> {
        if rows < MIN_ROWS_TO_JUDGE {
            Ok(())
        } else {
            self.check(rejected, rows, rejects)
        }
    }

    /// Judges all rows.
    pub(crate) fn check(self, rejected: u64, rows: u64, rejects: &[Reject]) -> Result<()> {
        if rejected as f64 <= self.0 * rows as f64 {
            return Ok(());
        }
        let first = rejects.first().map_or_else(
            || "not listed".to_owned(),
            |first| format!("{}: {}", first.source, first.reason),
        );
        Err(Error::TooManyRejects {
            rejected,
            rows,
            limit: self.0,
            first,
        })
    }
}
