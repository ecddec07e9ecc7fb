//! The pretokenize stage: standardized shards in, one model's token ids and loss spans out.

mod rows;
mod tokenize;
mod work;
mod write;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::stream::{self, BoxStream};
use futures::{StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use updraft_chat::{Chat, Example, LocalTime, LossOptions, Role, TrainOnEos};
use updraft_store::{
    CancelToken, FinishedStage, Hashed, JournalEntry, ObjectEntry, Opened, Progress, ProgressSink,
    Reject, StageId, StageWriter, Store, open_stage,
};

use crate::examples;
use crate::shard;
use crate::source::hex;
use crate::tally::{RejectLimit, Tally};
use crate::{Error, Result};
pub use tokenize::Overflow;
use tokenize::{Tokenize, Tokenized, Unfit};

/// Raised whenever the same shards would become other tokens or other shards.
const STAGE_VERSION: u32 = 2;
/// Shards in memory at a time: one tokenizing while the other is fetched or written.
const SHARDS_IN_FLIGHT: usize = 2;

/// How to tokenize.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PretokenizeOptions {
    /// The most tokens an example may have; no limit if absent.
    pub max_seq_len: Option<u32>,
    /// What happens to a longer one.
    pub overflow: Overflow,
    /// The day that templates read from the clock, as `2026-11-22`; part of the stage's key
    /// where the template asks. No clock is read, so that a rerun finds the stage finished.
    pub date: Option<String>,
    /// The roles whose messages are trained, where a message does not say it itself.
    pub roles_to_train: Vec<Role>,
    /// Which turns' ends are trained.
    pub train_on_eos: TrainOnEos,
    /// The share of rows that may be rejected before the stage fails. Not part of the stage's
    /// key.
    pub max_reject_rate: f64,
}

impl Default for PretokenizeOptions {
    fn default() -> Self {
        Self {
            max_seq_len: None,
            overflow: Overflow::default(),
            date: None,
            roles_to_train: LossOptions::default().roles_to_train,
            train_on_eos: TrainOnEos::default(),
            max_reject_rate: 0.1,
        }
    }
}

impl PretokenizeOptions {
    /// Says what makes no sense.
    ///
    /// # Errors
    /// [`Error::InvalidOption`].
    pub fn validate(&self) -> Result<()> {
        if self.max_seq_len.is_some_and(|len| len < 2) {
            return Err(Error::InvalidOption {
                option: "max_seq_len",
                problem: "is below 2: one token has nothing to predict it".to_owned(),
            });
        }
        let wrong = |date: &&String| LocalTime::from_date(date).is_none();
        if let Some(date) = self.date.as_ref().filter(wrong) {
            return Err(Error::InvalidOption {
                option: "date",
                problem: format!("is {date:?}: write it as 2026-11-22"),
            });
        }
        RejectLimit(self.max_reject_rate).validate()
    }
}

/// Turns the standardized dataset into `model-ready/<model>/<dataset>/`: Parquet shards of
/// `input_ids` and `loss_spans`, one for each standardized shard.
///
/// The work runs on all cores; what is written does not depend on how many there are. Counts in
/// the manifest: `source_rows`, `rows` (examples), `tokens`, `trained_tokens`, `truncated`, `split`,
/// `rejected`. The chat's own clock is not read: [`PretokenizeOptions::date`] is.
///
/// # Errors
/// [`Error::TooManyRejects`], [`Error::Empty`] if no row is left, [`Error::InvalidOption`] (also
/// where the template asks for a date and the options have none), and the store's errors. Whatever the error, nothing could be taken for finished.
#[expect(
    clippy::too_many_arguments,
    reason = "each is another thing: two names, their stage, the chat, how, and who is told"
)]
pub async fn pretokenize(
    store: &Store,
    model: &str,
    dataset: &str,
    standardized: &FinishedStage,
    chat: &Chat,
    options: &PretokenizeOptions,
    progress: &dyn ProgressSink,
    cancel: &CancelToken,
) -> Result<FinishedStage> {
    options.validate()?;
    let date = options.date.as_deref().and_then(LocalTime::from_date);
    let chat = chat.clone().with_now(date).with_loss(LossOptions {
        roles_to_train: options.roles_to_train.clone(),
        train_on_eos: options.train_on_eos,
    });
    let id = StageId::model_ready(model, dataset)?;
    let inputs = json!({
        "standardized": standardized.key(),
        "chat": hex(&chat.hash()),
        "options": { "max_seq_len": options.max_seq_len, "overflow": options.overflow },
        "version": STAGE_VERSION,
    });
    let limit = RejectLimit(options.max_reject_rate);
    let writer = match open_stage(store, &id, "pretokenize", &inputs).await? {
        Opened::Open(writer) => writer,
        Opened::Finished(stage) => {
            limit.check_finished(&stage).await?;
            return Ok(stage);
        }
    };
    let tokenize = Arc::new(Tokenize::new(chat, options));
    Pretokenize {
        writer,
        standardized,
        tokenize,
        limit,
        progress,
        cancel,
        rows: AtomicU64::new(0),
    }
    .run()
    .await
}

struct Pretokenize<'a> {
    writer: StageWriter,
    standardized: &'a FinishedStage,
    tokenize: Arc<Tokenize>,
    limit: RejectLimit,
    progress: &'a dyn ProgressSink,
    cancel: &'a CancelToken,
    /// Source rows done.
    rows: AtomicU64,
}

/// A standardized shard and where it stands.
#[derive(Debug, Clone)]
struct Input {
    index: u32,
    /// Rows of the dataset before the shard.
    first_row: u64,
    object: ObjectEntry,
}

fn inputs(objects: Vec<ObjectEntry>) -> Vec<Input> {
    let mut next_row = 0;
    let input = |(index, object): (u32, ObjectEntry)| {
        let first_row = next_row;
        next_row += object.rows.unwrap_or(0);
        Input {
            index,
            first_row,
            object,
        }
    };
    (0..).zip(objects).map(input).collect()
}

impl Pretokenize<'_> {
    async fn run(self) -> Result<FinishedStage> {
        let objects = self.standardized.manifest().await?.objects;
        let total: u64 = objects.iter().filter_map(|object| object.rows).sum();
        let journal = self.writer.journal().await?;
        let (mut all, mut seen) = (Tally::default(), 0);
        let mut shards = self.shards(inputs(objects), journal, total);
        while let Some((rows, tally)) = shards.try_next().await? {
            all.append(tally)?;
            seen += rows;
            self.limit
                .check_early(all.count("rejected"), seen, &all.rejects)?;
        }
        drop(shards);
        self.commit(all, total).await
    }

    /// Every shard's rows and what became of them, in the dataset's order.
    fn shards<'s>(
        &'s self,
        inputs: Vec<Input>,
        mut journal: BTreeMap<u32, JournalEntry>,
        total: u64,
    ) -> BoxStream<'s, Result<(u64, Tally)>> {
        stream::iter(inputs)
            .map(move |input| {
                let done = journal.remove(&input.index);
                async move {
                    let rows = input.object.rows.unwrap_or(0);
                    let tally = match done {
                        Some(entry) => self.skip(entry, rows, total),
                        None => self.shard(input, total).await?,
                    };
                    Ok((rows, tally))
                }
            })
            .buffered(SHARDS_IN_FLIGHT)
            .boxed()
    }

    /// Counts a shard that an earlier try has finished.
    fn skip(&self, entry: JournalEntry, rows: u64, total: u64) -> Tally {
        self.advance(rows, total);
        entry.into()
    }

    fn advance(&self, rows: u64, total: u64) {
        let done = self.rows.fetch_add(rows, Ordering::Relaxed) + rows;
        self.progress
            .report(&Progress::new("pretokenize", done, Some(total), "rows"));
    }

    /// Fetches, tokenizes and writes one shard, all three at a time.
    async fn shard(&self, input: Input, total: u64) -> Result<Tally> {
        self.cancel.check()?;
        let bytes = self.standardized.read(&input.object).await?;
        let name = self.standardized.path(&input.object.path);
        let tokenize = Arc::clone(&self.tokenize);
        let mut chunks = rows::tokenized(bytes, name.clone(), tokenize, self.cancel.clone());
        let (examples, shard) = write::shard(Arc::clone(&self.tokenize));
        let (mut tally, mut row) = (Tally::default(), input.first_row);
        while let Some(chunk) = chunks.try_next().await? {
            self.advance(chunk.len() as u64, total);
            let mut rows = Vec::with_capacity(chunk.len());
            for outcome in chunk {
                take(outcome, &input.object.path, row, &mut rows, &mut tally)?;
                row += 1;
            }
            if examples.send(rows).await.is_err() {
                break; // the writer has failed and says below why
            }
        }
        drop(examples);
        let shard = shard.await.map_err(Error::internal)??;
        let (found, listed) = (row - input.first_row, input.object.rows.unwrap_or(0));
        if found != listed {
            let problem =
                format!("it has {found} rows where its manifest lists {listed}: import it again");
            return Err(Error::corrupt(name, problem));
        }
        self.write(input.index, shard, tally).await
    }

    async fn write(&self, index: u32, shard: Hashed, mut tally: Tally) -> Result<Tally> {
        let num_rows = tally.count("rows");
        if num_rows > 0 {
            let name = shard::name(index, &shard);
            let object = self.writer.put_hashed(&name, &shard).await?;
            tally.objects.push(object.with_rows(num_rows));
        }
        tally.put_rejects(&self.writer, index).await?;
        let entry = self
            .writer
            .put_journal(index, &tally.into_journal(Value::Null))
            .await?;
        Ok(entry.into())
    }

    async fn commit(self, all: Tally, total: u64) -> Result<FinishedStage> {
        let rejected = all.count("rejected");
        self.limit.check(rejected, total, &all.rejects)?;
        if all.count("rows") == 0 {
            let hint = match all.rejects.first() {
                Some(first) => format!(
                    "all {rejected} rows were rejected, the first for: {}",
                    first.reason
                ),
                None => "import it again".to_owned(),
            };
            return Err(Error::Empty {
                what: self.writer.id().to_string(),
                hint,
            });
        }
        self.cancel.check()?;
        let mut draft = all.into_draft(&self.writer).await?;
        draft.schema = Some(shard::describe(&examples::schema()));
        self.tokenize.work.report();
        Ok(self.writer.commit(draft).await?)
    }
}

/// Puts a row's examples into the shard, or the row among the rejects.
fn take(
    outcome: Result<Tokenized, Unfit>,
    source: &str,
    row: u64,
    rows: &mut Vec<Example>,
    tally: &mut Tally,
) -> Result<()> {
    tally.add("source_rows", 1);
    match outcome {
        Ok(Tokenized {
            examples,
            truncated,
            split,
        }) => {
            for example in &examples {
                tally.add("rows", 1);
                tally.add("tokens", example.len() as u64);
                tally.add("trained_tokens", u64::from(example.trained_tokens()));
            }
            tally.add("truncated", u64::from(truncated));
            tally.add("split", u64::from(split));
            rows.extend(examples);
        }
        Err(Unfit::Row(reason)) => tally.reject(Reject {
            source: source.to_owned(),
            row,
            reason,
        })?,
        Err(Unfit::NoDate) => {
            return Err(Error::InvalidOption {
                option: "date",
                problem: "is absent and the chat template asks for it: give a day, such as \
                          2026-11-22, and the same one again for a rerun"
                    .to_owned(),
            });
        }
    }
    Ok(())
}
