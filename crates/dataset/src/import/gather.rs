//! Gathering: batches parsed and converted on all cores, then cut into shards in the source's
//! order.

use std::sync::Arc;

use futures::stream::{self, BoxStream};
use futures::{StreamExt as _, TryStreamExt as _};
use serde_json::{Map, Value};
use updraft_store::{Progress, Reject};

use super::groups::{Groups, size};
use super::{Import, Place};
use crate::record::Cells;
use crate::source::{Batch, MAX_ROW_BYTES, Row};
use crate::tally::{RejectLimit, Tally};
use crate::{Error, Format, Result};

/// A shard gathered but not yet written. The last one may have rejects only.
pub(super) struct Shard {
    pub(super) index: u32,
    pub(super) rows: Groups,
    pub(super) tally: Tally,
    pub(super) after: Place,
}

/// A row converted, or not.
struct Converted {
    row: Row,
    cells: Option<Cells>,
}

/// Gathers converted rows into shards, in the source's order.
pub(super) struct Gather<'a> {
    import: &'a Import<'a>,
    batches: BoxStream<'a, Result<Vec<Converted>>>,
    /// Rows converted but not yet in a shard.
    waiting: std::vec::IntoIter<Converted>,
    at: Place,
    index: u32,
    /// Rejected so far, and the first of them, for the limit.
    rejected: u64,
    first_rejects: Vec<Reject>,
    total: Option<u64>,
    ended: bool,
}

impl<'a> Gather<'a> {
    pub(super) async fn start(
        import: &'a Import<'a>,
        format: Arc<dyn Format>,
        at: Place,
        before: &Tally,
    ) -> Result<Self> {
        let keep_columns = import.options.keep_columns;
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let batches = import.source.open(at.next).await?;
        let converted = batches.map(move |batch| {
            let format = Arc::clone(&format);
            async move {
                let batch = batch?;
                tokio::task::spawn_blocking(move || convert(batch, &*format, keep_columns))
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
            batches: converted.buffered(threads).boxed(),
            waiting: Vec::new().into_iter(),
            at,
            index: before.objects.len() as u32,
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
        let (mut rows, mut tally) = (Groups::default(), Tally::default());
        while !self.ended {
            let Some(converted) = self.next_row().await? else {
                self.ended = true;
                break;
            };
            self.take(converted, &mut rows, &mut tally);
            let plan = self.import.options.shards;
            if plan.is_full(rows.num_rows(), rows.num_bytes()) {
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

    async fn next_row(&mut self) -> Result<Option<Converted>> {
        if self
            .import
            .options
            .limit
            .is_some_and(|limit| self.at.rows >= limit)
        {
            return Ok(None);
        }
        loop {
            if let Some(converted) = self.waiting.next() {
                return Ok(Some(converted));
            }
            let batch = tokio::select! {
                biased;
                () = self.import.cancel.cancelled() => return Err(updraft_store::Error::Cancelled.into()),
                batch = self.batches.try_next() => batch?,
            };
            let limit = RejectLimit(self.import.options.max_reject_rate);
            limit.check_early(self.rejected, self.at.rows, &self.first_rejects)?;
            self.import
                .progress
                .report(&Progress::new("import", self.at.rows, self.total, "rows"));
            match batch {
                Some(rows) => self.waiting = rows.into_iter(),
                None => return Ok(None),
            }
        }
    }

    /// Puts a row into the shard, or among its rejects.
    fn take(&mut self, converted: Converted, rows: &mut Groups, tally: &mut Tally) {
        let Converted { row, cells } = converted;
        let number = self.at.rows;
        tally.add("source_rows", 1);
        self.at.rows += 1;
        self.at.next = row.next;
        match (cells, row.value) {
            (Some(cells), _) => {
                tally.add("rows", 1);
                rows.push(&cells);
            }
            (None, value) => {
                let reject = Reject {
                    source: row.origin.to_string(),
                    row: number,
                    reason: value.err().unwrap_or_default(),
                };
                self.rejected += 1;
                if self.first_rejects.is_empty() {
                    self.first_rejects.push(reject.clone());
                }
                tally.reject(reject);
            }
        }
    }
}

/// Parses and converts a batch: the work that runs on all cores.
fn convert(batch: Batch, format: &dyn Format, keep_columns: bool) -> Vec<Converted> {
    let convert = |mut row: Row| {
        let columns = std::mem::replace(&mut row.value, Ok(Map::new()));
        match columns.and_then(|columns| cells(columns, format, keep_columns)) {
            Ok(cells) => Converted {
                row,
                cells: Some(cells),
            },
            Err(reason) => Converted {
                row: Row {
                    value: Err(reason),
                    ..row
                },
                cells: None,
            },
        }
    };
    batch.rows().into_iter().map(convert).collect()
}

fn cells(
    mut columns: Map<String, Value>,
    format: &dyn Format,
    keep_columns: bool,
) -> Result<Cells, String> {
    let record = format.convert(&mut columns)?;
    let cells = record
        .into_cells(keep_columns.then_some(&columns))
        .map_err(|err| err.to_string())?;
    if size(&cells) > MAX_ROW_BYTES as u64 {
        Err(crate::source::too_long())
    } else {
        Ok(cells)
    }
}
