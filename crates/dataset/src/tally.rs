//! Rows taken and rows rejected: the running totals of a stage and their limit.

use std::collections::BTreeMap;

use serde_json::Value;
use updraft_store::{FinishedStage, JournalEntry, ManifestDraft, ObjectEntry, Reject};

use crate::{Error, Result};

/// A manifest lists at most this many rejects; the count of all is exact.
pub const MAX_LISTED_REJECTS: usize = 1000;

/// A stage stops early only after this many rows, so that a bad start is not taken for the whole.
const MIN_ROWS_TO_JUDGE: u64 = 10_000;

/// The rows of one shard, or of all shards so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tally {
    pub(crate) objects: Vec<ObjectEntry>,
    pub(crate) counts: BTreeMap<String, u64>,
    pub(crate) rejects: Vec<Reject>,
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

    pub(crate) fn reject(&mut self, reject: Reject) {
        self.add("rejected", 1);
        if self.rejects.len() < MAX_LISTED_REJECTS {
            self.rejects.push(reject);
        }
    }

    /// Adds what comes after.
    pub(crate) fn append(&mut self, next: Self) {
        self.objects.extend(next.objects);
        for (count, more) in next.counts {
            *self.counts.entry(count).or_default() += more;
        }
        self.rejects.extend(next.rejects);
        self.rejects.truncate(MAX_LISTED_REJECTS);
    }

    pub(crate) fn into_journal(self, cursor: Value) -> JournalEntry {
        JournalEntry {
            objects: self.objects,
            counts: self.counts,
            rejects: self.rejects,
            cursor,
        }
    }

    pub(crate) fn into_draft(self) -> ManifestDraft {
        ManifestDraft {
            objects: self.objects,
            counts: self.counts,
            rejects: self.rejects,
            ..ManifestDraft::default()
        }
    }
}

impl From<JournalEntry> for Tally {
    fn from(entry: JournalEntry) -> Self {
        Self {
            objects: entry.objects,
            counts: entry.counts,
            rejects: entry.rejects,
        }
    }
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
