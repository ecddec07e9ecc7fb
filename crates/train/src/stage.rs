//! Training as a stage of a store: base model and data in; adapter, merged
//! model and loss curve out; nothing to do the second time.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use candle_core::{DType, Device};
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use updraft_model::{
    Adapter, Compute, Decoder, INDEX_FILE, LoraConfig, ModelConfig, ModelFiles, Threads, Weights,
    load_model_config, load_model_files, merge, peft,
};
use updraft_store::{
    CancelToken, FinishedStage, ManifestDraft, ObjectEntry, Opened, Progress, ProgressSink,
    StageId, StageKey, StageWriter, Store, open_stage,
};

use crate::checkpoints::Checkpoints;
use crate::evaluation::EvalRecord;
use crate::export::{FUSED, LORA_MODEL, adapter_folder, fused_folder, model_card};
use crate::flops::gemm_ceiling;
use crate::merged::check_merged;
use crate::metrics::{RunInfo, Sink, loss_curve_svg, write_log};
use crate::observer::ProgressObserver;
use crate::place::Place;
use crate::source::ExampleSource;
use crate::stop::Stop;
use crate::trainer::{TrainReport, Trainer};
use crate::verify::{Probe, compare, tolerance};
use crate::{Error, Result, StepRecord, TrainConfig};

/// Raised when the same inputs would give other bytes than before.
const VERSION: u32 = 1;
/// Folder of the checkpoints within the stage; in no manifest, gone when the
/// stage is finished.
const CHECKPOINTS: &str = "checkpoints";
/// What is written between two looks at whether to stop.
const PIECE_BYTES: usize = 16 << 20;
/// Operations that take longer than measuring what the processor could do.
const WORTH_A_CEILING: f64 = 1e10;

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
/// [`Trainer::run`], [`Error::Verification`], [`Error::Model`] and
/// [`Error::Store`].
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
        stage,
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
    let (draft, report) = work.await.map_err(|error| Error::Thread(error.into()))??;
    Stop::new(std::slice::from_ref(cancel), report.steps).check()?;
    let stage = writer.commit(draft).await?;
    // The result stands. What is left, here or by a kill, `updraft_store::garbage` lists.
    if let Err(error) = checkpoints.delete_all().await {
        tracing::warn!(%error, "checkpoints are left beside the finished stage");
    }
    Ok(Trained {
        stage,
        report: Some(report),
    })
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

/// What a finished run leaves in memory.
struct Run {
    report: TrainReport,
    adapter: Adapter,
    log: Vec<StepRecord>,
    evals: Vec<EvalRecord>,
}

/// The part of the stage that computes, on a thread of its own.
struct Work {
    stage: TrainStage,
    place: Place,
    base: ModelFiles,
    sources: Sources,
    writer: StageWriter,
    checkpoints: Checkpoints,
    runtime: Handle,
    cancel: [CancelToken; 2],
}

impl Work {
    /// Trains, exports and verifies; returns what is to be committed.
    fn run(self, events: Events) -> Result<(ManifestDraft, TrainReport)> {
        let (config, settings) = (&self.base.config, &self.stage.config);
        let lora = &self.stage.lora;
        let dtype = self.stage.config.dtype();
        let decoder = self.place.decoder(&self.base, dtype, &self.stage.threads)?;
        let seed = self.stage.config.seed;
        let adapter = Adapter::init_over(lora, config, &self.base.weights, seed, &Device::Cpu)?;
        let Run {
            report,
            adapter,
            log,
            evals,
        } = self.train(&decoder, adapter, events)?;
        let stop = Stop::new(&self.cancel, report.steps);
        stop.check()?;

        let decoder = match dtype {
            DType::F32 if !decoder.is_on_gpu() => decoder,
            _ => {
                drop(decoder);
                // Verified at full precision, however it was trained.
                Place::Cpu.decoder(&self.base, DType::F32, &self.stage.threads)?
            }
        };
        let probe = self.probe()?;
        stop.check()?;
        let expected = probe.logits(&decoder, Some(&adapter))?;
        let card = model_card(&self.stage.dataset, lora, settings, &log);
        let mut objects = Vec::new();
        if !adapter.is_whole() {
            objects = self.put_all(&stop, adapter_folder(&adapter, &card, &self.base.files)?)?;
            self.verify_adapter(&stop, &probe, &decoder, &expected)?;
        }
        drop(decoder); // A second one is loaded to verify the merged model.
        objects.extend(self.write_fused(&stop, &adapter, &card)?);
        self.verify_fused(&stop, &objects, &adapter, &probe, &expected)?;
        objects.extend(self.put_all(&stop, self.curve(&log))?);
        if !evals.is_empty() {
            let evals = ("eval.jsonl".to_owned(), write_log(&evals).into());
            objects.extend(self.put_all(&stop, vec![evals])?);
        }

        let counts = [
            ("examples", report.examples),
            ("steps", report.steps),
            ("tokens", report.tokens),
            ("trained_tokens", report.trained_tokens),
        ];
        let mut attributes = BTreeMap::from([("train_loss".to_owned(), report.train_loss.into())]);
        if let Some(eval) = report.eval {
            attributes.insert("eval_loss".to_owned(), eval.eval_loss.into());
            attributes.insert("eval_step".to_owned(), eval.step.into());
        }
        let draft = ManifestDraft {
            objects,
            counts: counts.map(|(name, count)| (name.to_owned(), count)).into(),
            attributes,
            ..Default::default()
        };
        Ok((draft, report))
    }

    fn train(&self, decoder: &Decoder, adapter: Adapter, events: Events) -> Result<Run> {
        let mut trainer = Trainer::new(
            decoder,
            adapter,
            &*self.sources.train,
            self.stage.config.clone(),
        )?
        .with_base(self.stage.base.key().to_string())
        .with_checkpoints(self.checkpoints.clone(), self.runtime.clone())
        .with_observer(ProgressObserver::new(events));
        if trainer.expected_flops() > WORTH_A_CEILING {
            let ceiling = gemm_ceiling(decoder.threads(), self.stage.config.dtype());
            trainer = trainer.with_gemm_ceiling(ceiling);
        }
        for sink in &self.stage.report_to {
            trainer = trainer.with_observer(sink.open(&self.run_info()?)?);
        }
        if let Some(held_out) = &self.sources.held_out {
            trainer = trainer.with_evaluation(&**held_out);
        }
        for cancel in &self.cancel {
            trainer = trainer.with_cancel(cancel.clone());
        }
        if let Some(checkpoint) = self
            .runtime
            .block_on(self.checkpoints.latest(decoder.config()))?
        {
            tracing::info!(
                step = checkpoint.state.cursor.step,
                "continuing from a checkpoint"
            );
            trainer = trainer.resume(checkpoint)?;
        }
        let report = trainer.run()?;
        let evals = trainer.evals().to_vec();
        let (adapter, log) = trainer.into_parts();
        Ok(Run {
            report,
            adapter,
            log,
            evals,
        })
    }

    fn write_fused(&self, stop: &Stop, adapter: &Adapter, card: &str) -> Result<Vec<ObjectEntry>> {
        let mut objects = self.put_all(stop, fused_folder(adapter, card, &self.base)?)?;
        let merged = merge::merge(&self.base.weights, &self.base.config, adapter)?;
        for file in merged.with_cancels(stop.switches()) {
            stop.check()?;
            let (name, bytes) = file?;
            objects.push(self.put_large(stop, &format!("{FUSED}/{name}"), bytes.into())?);
        }
        Ok(objects)
    }

    fn run_info(&self) -> Result<RunInfo> {
        let TrainStage { model, dataset, .. } = &self.stage;
        RunInfo::new(format!("{model} on {dataset}"))
            .with_identity(self.writer.key().to_string())
            .with_params(&self.stage.lora)?
            .with_params(&self.stage.config)
    }

    fn curve(&self, log: &[StepRecord]) -> Vec<(String, Bytes)> {
        let title = format!("{} on {}", self.stage.model, self.stage.dataset);
        let picture = loss_curve_svg(&title, log).into_bytes();
        vec![
            ("loss.jsonl".to_owned(), write_log(log).into()),
            ("loss.svg".to_owned(), picture.into()),
        ]
    }

    fn put_all(&self, stop: &Stop, files: Vec<(String, Bytes)>) -> Result<Vec<ObjectEntry>> {
        let put = |(name, bytes): (String, Bytes)| {
            stop.wait(&self.runtime, self.writer.put_object(&name, bytes))
        };
        files.into_iter().map(put).collect()
    }

    /// Writes a file that may be too large for one request.
    fn put_large(&self, stop: &Stop, name: &str, mut bytes: Bytes) -> Result<ObjectEntry> {
        let mut writer = self.writer.object_writer(name)?;
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(PIECE_BYTES));
            stop.wait(&self.runtime, writer.write(piece))?;
        }
        stop.wait(&self.runtime, writer.finish())
    }

    fn probe(&self) -> Result<Probe> {
        let source_id = || self.sources.train.plan().id.clone();
        let first = self.sources.train.open(0, 0)?.next();
        let first = first.ok_or_else(|| Error::NothingToLearn {
            source_id: source_id(),
        })??;
        Ok(Probe::new(&first))
    }

    fn verify_adapter(
        &self,
        stop: &Stop,
        probe: &Probe,
        decoder: &Decoder,
        expected: &[f32],
    ) -> Result<()> {
        let config = self.read(stop, &format!("{LORA_MODEL}/{}", peft::CONFIG_FILE))?;
        let weights = self.read(stop, &format!("{LORA_MODEL}/{}", peft::WEIGHTS_FILE))?;
        let adapter = peft::read_adapter(&config, &weights, decoder.config())?;
        compare(
            LORA_MODEL,
            expected,
            &probe.logits(decoder, Some(&adapter))?,
            0.0,
        )
    }

    fn verify_fused(
        &self,
        stop: &Stop,
        written: &[ObjectEntry],
        adapter: &Adapter,
        probe: &Probe,
        expected: &[f32],
    ) -> Result<()> {
        let config = ModelConfig::from_json(&self.read(stop, &format!("{FUSED}/config.json"))?)?;
        let weights = self.fused_weights(stop, written)?;
        check_merged(&self.base, adapter, &config, &weights, stop)?;
        let threads = &self.stage.threads;
        let decoder = Decoder::load(&config, &weights, DType::F32, &Device::Cpu, threads)?;
        stop.check()?;
        let merged = probe.logits(&decoder, None)?;
        compare(FUSED, expected, &merged, tolerance(&weights)?)
    }

    /// The merged weights as they lie in the store, mapped where that is possible.
    fn fused_weights(&self, stop: &Stop, written: &[ObjectEntry]) -> Result<Weights> {
        let folder = self.writer.path(FUSED);
        if let Some(path) = self.writer.store().local_path(&folder) {
            return Ok(Weights::from_dir(&path)?);
        }
        let weights = |name: &&str| name.ends_with(".safetensors") || *name == INDEX_FILE;
        let files = written
            .iter()
            .filter_map(|object| object.path.strip_prefix(FUSED)?.strip_prefix('/'))
            .filter(weights)
            .map(|name| {
                Ok((
                    name.to_owned(),
                    self.read(stop, &format!("{FUSED}/{name}"))?,
                ))
            })
            .collect::<Result<_>>()?;
        Ok(Weights::from_files(files)?)
    }

    fn read(&self, stop: &Stop, name: &str) -> Result<Bytes> {
        let path = self.writer.path(name);
        let found = stop.wait(&self.runtime, self.writer.store().get(&path))?;
        found.ok_or_else(|| {
            let url = self.writer.store().url_of(&path);
            Error::Store(updraft_store::Error::Missing {
                url,
                next: "run again to write it",
            })
        })
    }
}
