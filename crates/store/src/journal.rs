//! The journal of an open stage: which of its shards are done.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::layout::JOURNAL;
use crate::{Created, Error, ObjectEntry, Reject, Result, StageWriter};

/// How many journal entries are read at a time.
const READ_AHEAD: usize = 16;

/// One finished shard of a stage that is not committed yet.
///
/// Written after the shard's objects, so that an entry that exists speaks of objects that exist.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct JournalEntry {
    /// The shard's objects.
    pub objects: Vec<ObjectEntry>,
    /// The shard's totals.
    #[serde(default)]
    pub counts: BTreeMap<String, u64>,
    /// Rows of this shard that were not taken.
    #[serde(default)]
    pub rejects: Vec<Reject>,
    /// The objects that list the others of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more_rejects: Vec<ObjectEntry>,
    /// Where the source stands after this shard.
    #[serde(default)]
    pub cursor: Value,
}

impl StageWriter {
    /// The shards that an earlier or a concurrent try of this stage has finished, by index.
    ///
    /// Entries that cannot be read count as absent: their shard is made again.
    ///
    /// # Errors
    /// Those of listing and reading.
    pub async fn journal(&self) -> Result<BTreeMap<u32, JournalEntry>> {
        let listed = self.store().list(&self.path(JOURNAL)).await?;
        futures::stream::iter(listed)
            .map(|object| async move {
                let Some(index) = index_of(&object.path) else {
                    return Ok(None);
                };
                let bytes = self.store().get(&object.path).await?;
                let entry = bytes.and_then(|bytes| parse(&object.path, &bytes));
                Ok::<_, Error>(entry.map(|entry| (index, entry)))
            })
            .buffered(READ_AHEAD)
            .try_filter_map(|entry| async { Ok(entry) })
            .try_collect()
            .await
    }

    /// Records a finished shard. The first record of an index counts: what comes back is
    /// the entry to go on with, this one or that of another process that was faster.
    ///
    /// # Errors
    /// Those of [`Store::create`](crate::Store::create).
    pub async fn put_journal(&self, index: u32, entry: &JournalEntry) -> Result<JournalEntry> {
        let path = self.journal_path(index);
        let bytes: Bytes = serde_json::to_vec(entry)
            .map_err(|source| Error::Json {
                what: "a journal entry",
                source,
            })?
            .into();
        match self.store().create(&path, bytes.clone()).await? {
            Created::New => Ok(entry.clone()),
            Created::Existed(theirs) => match parse(&path, &theirs) {
                Some(theirs) => Ok(theirs),
                None => {
                    self.store().put(&path, bytes).await?;
                    Ok(entry.clone())
                }
            },
        }
    }
}

impl StageWriter {
    /// Takes a record back: its shard turned out to be no good, and the next try makes it again.
    ///
    /// # Errors
    /// Those of [`Store::delete`](crate::Store::delete).
    pub async fn remove_journal(&self, index: u32) -> Result<()> {
        self.store().delete(&self.journal_path(index)).await
    }

    fn journal_path(&self, index: u32) -> String {
        self.path(&format!("{JOURNAL}/{index:05}.json"))
    }
}

fn index_of(path: &str) -> Option<u32> {
    path.rsplit('/').next()?.strip_suffix(".json")?.parse().ok()
}

fn parse(path: &str, bytes: &[u8]) -> Option<JournalEntry> {
    serde_json::from_slice(bytes)
        .inspect_err(|error| tracing::warn!(path, %error, "a journal entry cannot be read; its shard is made again"))
        .ok()
}
