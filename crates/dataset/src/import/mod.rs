//! The import stage: any source's rows, standardized, into committed Parquet shards.

mod convert;
mod gather;
mod groups;
mod raw;

use std::sync::Arc;

use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use updraft_store::{
    CancelToken, FinishedStage, JournalEntry, Opened, ProgressSink, StageId, StageWriter, Store,
    open_stage,
};

use crate::record::schema;
use crate::shard::{self, ShardPlan};
use crate::source::{Cursor, Row};
use crate::tally::{RejectLimit, Tally};
use crate::{Error, Format, Formats, Result, Source};
use gather::{Gather, Shard};

pub use raw::copy_raw;

/// Raised whenever the same rows would become other shards.
const STAGE_VERSION: u32 = 3;
/// Rows looked at to find the format.
const DETECT_ROWS: usize = 100;
/// Shards encoded and uploaded at a time while the next one is gathered.
const SHARDS_IN_FLIGHT: usize = 2;

/// How to import.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImportOptions {
    /// The format's name; found by looking at the first rows if absent.
    pub format: Option<String>,
    /// Take only this many rows of the source, rejects included.
    pub limit: Option<u64>,
    /// The share of rows that may be rejected before the import fails. Not part of the stage's
    /// key: after raising it, a rerun goes on where it stopped.
    pub max_reject_rate: f64,
    /// Keep the columns no format reads, as JSON in the column `columns`; else they are ignored.
    pub keep_columns: bool,
    /// Keep the rows as they came too, in `raw/<dataset>/` ([`copy_raw`]), which reads the source
    /// once more. Not part of the stage's key.
    pub keep_raw: bool,
    /// What joins the Alpaca formats' instruction and input.
    pub input_separator: String,
    /// When a shard is full.
    pub shards: ShardPlan,
}

impl Default for ImportOptions {
    fn default() -> Self {
        Self {
            format: None,
            limit: None,
            max_reject_rate: 0.1,
            keep_columns: false,
            keep_raw: false,
            input_separator: "\n".to_owned(),
            shards: ShardPlan::default(),
        }
    }
}

impl ImportOptions {
    /// Says what makes no sense.
    ///
    /// # Errors
    /// [`Error::InvalidOption`].
    pub fn validate(&self) -> Result<()> {
        if self.limit == Some(0) {
            return Err(Error::InvalidOption {
                option: "limit",
                problem: "is 0: leave it out to take all rows".to_owned(),
            });
        }
        RejectLimit(self.max_reject_rate).validate()?;
        self.shards.validate()
    }

    /// The options that decide the output.
    fn identity(&self) -> Value {
        let Self {
            format,
            limit,
            keep_columns,
            input_separator,
            shards,
            max_reject_rate: _,
            keep_raw: _,
        } = self;
        json!({ "format": format, "limit": limit, "keep_columns": keep_columns, "input_separator": input_separator, "shards": shards })
    }
}

/// Imports `source` as `standardized/<dataset>/`, with the built-in formats.
///
/// Rows become JSON columns of Parquet shards (`messages`, `tools`, `documents`, …). A row that
/// cannot be taken is counted and listed with its reason ([`rejects`](crate::rejects)). A finished import of the same source with the same
/// options is found with one GET; one that was interrupted goes on after its last whole shard.
///
/// # Errors
/// [`Error::UnknownFormat`] if no format fits, [`Error::TooManyRejects`], [`Error::Empty`],
/// [`Error::InvalidOption`], and the errors of the source and the store. Whatever the error, the
/// store holds nothing that could be taken for finished.
pub async fn import(
    store: &Store,
    dataset: &str,
    source: &dyn Source,
    options: &ImportOptions,
    progress: &dyn ProgressSink,
    cancel: &CancelToken,
) -> Result<FinishedStage> {
    let formats = Formats::built_in(&options.input_separator);
    import_with(store, dataset, source, &formats, options, progress, cancel).await
}

/// [`import`] with formats of your own.
///
/// # Errors
/// As [`import`].
pub async fn import_with(
    store: &Store,
    dataset: &str,
    source: &dyn Source,
    formats: &Formats,
    options: &ImportOptions,
    progress: &dyn ProgressSink,
    cancel: &CancelToken,
) -> Result<FinishedStage> {
    options.validate()?;
    if options.keep_raw {
        copy_raw(store, dataset, source, options, progress, cancel).await?;
    }
    let id = StageId::standardized(dataset)?;
    let formats_key: Vec<&str> = formats.names().collect();
    let inputs = json!({ "source": source.identity(), "options": options.identity(), "formats": formats_key, "version": STAGE_VERSION });
    let writer = match open_stage(store, &id, "import", &inputs).await? {
        Opened::Open(writer) => writer,
        Opened::Finished(stage) => {
            RejectLimit(options.max_reject_rate)
                .check_finished(&stage)
                .await?;
            return Ok(stage);
        }
    };
    Import {
        writer,
        source,
        formats,
        options,
        progress,
        cancel,
    }
    .run()
    .await
}

struct Import<'a> {
    writer: StageWriter,
    source: &'a dyn Source,
    formats: &'a Formats,
    options: &'a ImportOptions,
    progress: &'a dyn ProgressSink,
    cancel: &'a CancelToken,
}

/// Where the next shard begins and what it needs to know; the cursor of a journal entry.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Place {
    next: Cursor,
    /// Rows of the source before `next`.
    rows: u64,
    format: String,
}

impl Import<'_> {
    async fn run(self) -> Result<FinishedStage> {
        let (mut all, shards, place) = self.resume().await?;
        let format = match &place {
            Some(place) => self.named_format(&place.format)?,
            None => self.find_format().await?,
        };
        let name = format.name().to_owned();
        let start = place.unwrap_or_else(|| Place {
            next: Cursor::default(),
            rows: 0,
            format: name.clone(),
        });
        let gather = Gather::start(&self, format, start, shards, &all).await?;
        let mut written = self.write_all(gather);
        while let Some(tally) = written.try_next().await? {
            all.append(tally)?;
        }
        drop(written);
        self.commit(all, &name).await
    }

    /// Writes shards as they are gathered, in their order.
    fn write_all<'s>(&'s self, gather: Gather<'s>) -> BoxStream<'s, Result<Tally>> {
        gather
            .shards()
            .map_ok(|shard| self.write(shard))
            .try_buffered(SHARDS_IN_FLIGHT)
            .boxed()
    }

    /// What an earlier try finished without a gap, how many shards, and where the next begins.
    async fn resume(&self) -> Result<(Tally, u32, Option<Place>)> {
        let (mut all, mut shards, mut place) = (Tally::default(), 0, None);
        for ((index, entry), expected) in self.writer.journal().await?.into_iter().zip(0..) {
            let Ok(next) = serde_json::from_value(entry.cursor.clone()) else {
                break;
            };
            if index != expected {
                break;
            }
            place = Some(next);
            shards = expected + 1;
            all.append(entry.into())?;
        }
        if place.is_some() {
            tracing::info!(stage = %self.writer.id(), shards, "import goes on after its finished shards");
        }
        Ok((all, shards, place))
    }

    fn named_format(&self, name: &str) -> Result<Arc<dyn Format>> {
        self.formats.get(name).cloned().ok_or_else(|| {
            self.unknown_format(format!("the name '{name}'"), "not looked at".to_owned())
        })
    }

    /// The format asked for, or the one that claims the most of the first rows.
    async fn find_format(&self) -> Result<Arc<dyn Format>> {
        if let Some(name) = &self.options.format {
            return self.named_format(name);
        }
        let mut rows = Vec::new();
        let mut batches = self.source.open(Cursor::default()).await?;
        while rows.len() < DETECT_ROWS {
            let batch = tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Err(updraft_store::Error::Cancelled.into()),
                batch = batches.try_next() => batch?,
            };
            let Some(batch) = batch else {
                break;
            };
            rows.extend(batch.rows());
        }
        let good: Vec<&Map<String, Value>> = rows
            .iter()
            .take(DETECT_ROWS)
            .filter_map(|row| row.value.as_ref().ok())
            .collect();
        if let Some(format) = self.formats.detect(&good) {
            return Ok(Arc::clone(format));
        }
        match (good.first(), rows.first()) {
            (Some(first), _) => {
                let columns = first
                    .keys()
                    .map(String::as_str)
                    .collect::<Vec<_>>()
                    .join(", ");
                Err(self.unknown_format(self.source.label(), columns))
            }
            (
                None,
                Some(Row {
                    origin,
                    value: Err(reason),
                    ..
                }),
            ) => Err(Error::TooManyRejects {
                rejected: rows.len() as u64,
                rows: rows.len() as u64,
                limit: self.options.max_reject_rate,
                first: format!("{origin}: {reason}"),
            }),
            _ => Err(self.empty()),
        }
    }

    fn unknown_format(&self, what: String, columns: String) -> Error {
        Error::UnknownFormat {
            what,
            columns,
            known: self.formats.names().collect::<Vec<_>>().join(", "),
        }
    }

    fn empty(&self) -> Error {
        Error::Empty {
            what: self.source.label(),
            hint: "check the file and the split".to_owned(),
        }
    }

    /// Writes a shard's object, then its journal entry.
    async fn write(&self, shard: Shard) -> Result<Tally> {
        let Shard {
            index,
            rows,
            mut tally,
            after,
        } = shard;
        let num_rows = rows.num_rows();
        if num_rows > 0 {
            let shard = rows.finish().await?;
            let name = shard::name(index, &shard);
            let object = self.writer.put_hashed(&name, &shard).await?;
            tally.objects.push(object.with_rows(num_rows));
        }
        tally.put_rejects(&self.writer, index).await?;
        let cursor = serde_json::to_value(after).map_err(Error::internal)?;
        let entry: JournalEntry = self
            .writer
            .put_journal(index, &tally.into_journal(cursor))
            .await?;
        Ok(entry.into())
    }

    async fn commit(&self, all: Tally, format: &str) -> Result<FinishedStage> {
        let (rows, rejected) = (all.count("rows"), all.count("rejected"));
        let source_rows = all.count("source_rows");
        if source_rows == 0 {
            return Err(self.empty());
        }
        RejectLimit(self.options.max_reject_rate).check(rejected, source_rows, &all.rejects)?;
        if rows == 0 {
            let hint = format!(
                "all {rejected} rows were rejected, the first for: {}",
                all.rejects[0].reason
            );
            return Err(Error::Empty {
                what: self.source.label(),
                hint,
            });
        }
        self.cancel.check()?;
        let mut draft = all.into_draft(&self.writer).await?;
        draft.schema = Some(shard::describe(&schema()));
        draft.attributes.insert("format".to_owned(), format.into());
        Ok(self.writer.clone().commit(draft).await?)
    }
}
