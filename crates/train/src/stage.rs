//! Training as a stage of a store: base model and data in; adapter, merged
//! model and loss curve out; nothing to do the second time.

mod work;

use std::sync::Arc;

use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use updraft_model::{Compute, LoraConfig, Threads, load_model_config, load_model_files};
use updraft_store::{
    CancelToken, FinishedStage, Opened, Progress, ProgressSink, StageId, StageKey, Store,
    open_stage,
};

use crate::checkpoints::Checkpoints;
use crate::collective::{Collective, Launch};
use crate::metrics::Sink;
use crate::place::Place;
use crate::source::ExampleSource;
use crate::stop::Stop;
use crate::trainer::TrainReport;
use crate::{Error, Result, TrainConfig};

use self::work::{Done, Work};

/// Raised when the same inputs would give other bytes than before.
const VERSION: u32 = 1;
/// Folder of the checkpoints within the stage; in no manifest, gone when the
/// stage is finished.
const CHECKPOINTS: &str = "checkpoints";

/// What to train on what.
#[derive(Debug, Clone)]
pub struct TrainStage {
    /// Name of the base model, as in `models/<model>`.
    pub model: String,
    /// Name of the data set, as in `standardized/<dataset>`.
    pub dataset: String,
    /// The imported base model.
    pub base: FinishedStage,
    /// The data in the model's tokens.
    pub data: FinishedStage,
    /// Data to evaluate on, in the same tokens.
    pub held_out: Option<FinishedStage>,
    /// The adapter to train. Its base model defaults to `model`.
    pub lora: LoraConfig,
    /// The run's settings.
    pub config: TrainConfig,
    /// Where the figures go while it trains. They decide nothing, and are not part of its key.
    pub report_to: Vec<Sink>,
    /// Where to train; merging and the last checks run on the CPU. It decides the last bits of the result and is not
    /// part of its key.
    pub compute: Compute,
    /// Which of several processes that train the stage together this one is, each with the same store and settings;
    /// `None` alone. The first one exports, verifies and commits, the others wait for it. Like threads, their number
    /// decides the last bits and is not part of the key.
    pub launch: Option<Launch>,
    /// Threads to train on. They decide the last bits of the result and are
    /// not part of its key.
    pub threads: Threads,
}

/// What a stage reads.
#[derive(Debug, Clone)]
pub struct Sources {
    /// The examples of [`TrainStage::data`].
    pub train: Arc<dyn ExampleSource>,
    /// Those of [`TrainStage::held_out`].
    pub held_out: Option<Arc<dyn ExampleSource>>,
}

impl From<Arc<dyn ExampleSource>> for Sources {
    fn from(train: Arc<dyn ExampleSource>) -> Self {
        Self {
            train,
            held_out: None,
        }
    }
}

/// A trained model in the store.
#[derive(Debug)]
pub struct Trained {
    /// `done/<model>/<dataset>/<key16>/`, with `lora_model/` (unless every weight was trained),
    /// `fused/`, `loss.jsonl`, `loss.svg` and, where data was held out, `eval.jsonl`.
    pub stage: FinishedStage,
    /// How the training went; `None` when it was finished before.
    pub report: Option<TrainReport>,
}

/// Everything that decides what the stage writes.
#[derive(Serialize)]
struct Inputs<'a> {
    version: u32,
    base: &'a StageKey,
    data: &'a StageKey,
    #[serde(skip_serializing_if = "Option::is_none")]
    held_out: Option<&'a StageKey>,
    lora: &'a LoraConfig,
    train: TrainConfig,
}

/// Trains, exports, verifies and commits to `done/<model>/<dataset>/`, or finds
/// that done.
///
/// `sources` read `stage.data` in an order that `stage.config` decides and
/// `stage.held_out`; they are awaited only when there is something to train. A run that was killed or
/// cancelled continues from its newest checkpoint and ends with the same
/// objects. Checkpoints are deleted when the stage is committed; what a kill just then leaves of
/// them, [`garbage`](updraft_store::garbage) lists and nobody reads. Both folders are read back from the store and asked for logits
/// before the manifest is written: the adapter must give the trained ones
/// exactly, the merged model in f32 within `1e-4` of their norm. In every type
/// each merged weight must be `round(W + s·B·A)`, byte for byte.
///
/// # Errors
/// [`Error::Cancelled`] once `cancel` is, with a checkpoint written: after a step, or, when the training is over, within a
/// tensor's work or a request to the store, with no manifest written; else as
/// [`Trainer::run`](crate::Trainer::run), [`Error::OutOfMemory`] before anything is loaded,
/// [`Error::Rendezvous`], [`Error::Worker`] and [`Error::WorkersDiffer`] where several train,
/// [`Error::Verification`], [`Error::Model`] and [`Error::Store`].
pub async fn train_stage(
    store: &Store,
    stage: &TrainStage,
    sources: impl Future<Output = Result<Sources>>,
    progress: &dyn ProgressSink,
    cancel: &CancelToken,
) -> Result<Trained> {
    let mut stage = stage.clone();
    stage
        .lora
        .base_model_name_or_path
        .get_or_insert_with(|| stage.model.clone());
    stage.lora.validate()?;
    stage.config.validate()?;
    stage.config.check_evaluation(stage.held_out.is_some())?;
    let id = StageId::done(&stage.model, &stage.dataset)?;
    let inputs = Inputs {
        version: VERSION,
        base: stage.base.key(),
        data: stage.data.key(),
        held_out: stage.held_out.as_ref().map(FinishedStage::key),
        lora: &stage.lora,
        train: stage.config.deciding(),
    };
    let writer = match open_stage(store, &id, "train", &inputs).await? {
        Opened::Finished(stage) => {
            return Ok(Trained {
                stage,
                report: None,
            });
        }
        Opened::Open(writer) => writer,
    };

    // What does not fit is said before the weights are fetched.
    let model = load_model_config(&stage.base, "").await?;
    let stop = Stop::new(std::slice::from_ref(cancel), 0);
    let sources = stop.race(sources).await?;
    let (data, threads) = (sources.train.plan(), &stage.threads);
    let place = Place::open(stage.compute)?;
    place.check_memory(&model, &stage.lora, data, &stage.config, threads)?;
    let base = stop.race(load_model_files(&stage.base, "")).await?;
    let checkpoints = Checkpoints::new(
        store,
        writer.path(CHECKPOINTS),
        stage.config.save_total_limit as usize,
    );
    let abandoned = CancelOnDrop(CancelToken::new());
    let (events, mut received) = unbounded_channel();
    let work = Work {
        stage: stage.clone(),
        place,
        base,
        sources,
        writer: writer.clone(),
        checkpoints: checkpoints.clone(),
        runtime: Handle::current(),
        cancel: [cancel.clone(), abandoned.0.clone()],
    };
    let work = tokio::task::spawn_blocking(move || work.run(Events(events)));
    while let Some(event) = received.recv().await {
        progress.report(&event);
    }
    let Done {
        draft,
        report,
        workers,
    } = work.await.map_err(|error| Error::Thread(error.into()))??;
    let Some(draft) = draft else {
        if let Err(error) = meet_again(workers).await {
            // If this one is cancelled so is the first one, and has left.
            Stop::new(std::slice::from_ref(cancel), report.steps).check()?;
            return Err(error);
        }
        return match open_stage(store, &id, "train", &inputs).await? {
            Opened::Finished(stage) => Ok(Trained {
                stage,
                report: Some(report),
            }),
            Opened::Open(_) => Err(Error::Worker {
                rank: 0,
                source: std::io::Error::other("it did not commit the stage"),
            }),
        };
    };
    Stop::new(std::slice::from_ref(cancel), report.steps).check()?;
    let stage = writer.commit(draft).await?;
    if let Err(error) = meet_again(workers).await {
        tracing::warn!(%error, "a worker did not wait for the result, which stands");
    }
    // The result stands. What is left, here or by a kill, `updraft_store::garbage` lists.
    if let Err(error) = checkpoints.delete_all().await {
        tracing::warn!(%error, "checkpoints are left beside the finished stage");
    }
    Ok(Trained {
        stage,
        report: Some(report),
    })
}

/// Tells the other workers that the stage is committed, or waits for that.
async fn meet_again(workers: Option<Box<dyn Collective>>) -> Result<()> {
    let Some(mut workers) = workers else {
        return Ok(());
    };
    let met = tokio::task::spawn_blocking(move || workers.exchange(b"committed"));
    met.await.map_err(|error| Error::Thread(error.into()))??;
    Ok(())
}

/// Stops the training thread when the stage's future is dropped.
struct CancelOnDrop(CancelToken);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Carries events from the training thread to the stage's future.
#[derive(Debug)]
struct Events(UnboundedSender<Progress>);

impl ProgressSink for Events {
    fn report(&self, progress: &Progress) {
        // A dropped receiver means that nobody looks any more.
        let _ = self.0.send(progress.clone());
    }
}
