//! The part of the stage that computes: it trains, exports, and verifies what it wrote.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use candle_core::{DType, Device};
use tokio::runtime::Handle;
use updraft_model::{Adapter, Decoder, INDEX_FILE, ModelConfig, ModelFiles, Weights, merge, peft};
use updraft_store::{CancelToken, ManifestDraft, ObjectEntry, StageWriter};

use crate::checkpoints::Checkpoints;
use crate::collective::{Collective, TcpCollective};
use crate::evaluation::EvalRecord;
use crate::export::{FUSED, LORA_MODEL, adapter_folder, fused_folder, model_card};
use crate::flops::gemm_ceiling;
use crate::merged::check_merged;
use crate::metrics::{RunInfo, loss_curve_svg, write_log};
use crate::observer::ProgressObserver;
use crate::place::Place;
use crate::stop::Stop;
use crate::trainer::{TrainReport, Trainer};
use crate::verify::{Probe, compare, tolerance};
use crate::{Error, Result, StepRecord};

use super::{Events, Sources, TrainStage};

/// How long processes that train together wait for each other to come.
const MEETING: Duration = Duration::from_secs(600);
/// What is written between two looks at whether to stop.
const PIECE_BYTES: usize = 16 << 20;
/// Operations that take longer than measuring what the processor could do.
const WORTH_A_CEILING: f64 = 1e10;

/// What a finished run leaves in memory.
struct Run {
    report: TrainReport,
    adapter: Adapter,
    log: Vec<StepRecord>,
    evals: Vec<EvalRecord>,
}

/// What the thread that computes hands back.
pub(super) struct Done {
    /// What is to be committed; `None` where another worker does that.
    pub(super) draft: Option<ManifestDraft>,
    pub(super) report: TrainReport,
    pub(super) workers: Option<Box<dyn Collective>>,
}

/// The part of the stage that computes, on a thread of its own.
pub(super) struct Work {
    pub(super) stage: TrainStage,
    pub(super) place: Place,
    pub(super) base: ModelFiles,
    pub(super) sources: Sources,
    pub(super) writer: StageWriter,
    pub(super) checkpoints: Checkpoints,
    pub(super) runtime: Handle,
    pub(super) cancel: [CancelToken; 2],
}

impl Work {
    /// Trains, and, as the first of the workers, exports and verifies.
    pub(super) fn run(self, events: Events) -> Result<Done> {
        let (base, settings) = (&self.base, &self.stage.config);
        let threads = &self.stage.threads;
        let decoder = self.place.decoder(base, settings.dtype(), threads)?;
        let adapter = Adapter::init_over(
            &self.stage.lora,
            &base.config,
            &base.weights,
            settings.seed,
            &Device::Cpu,
        )?;
        let mut workers = self.join()?;
        let run = self.train(&decoder, adapter, events, &mut workers)?;
        let stop = Stop::new(&self.cancel, run.report.steps);
        stop.check()?;
        let draft = match self.leads() {
            true => Some(self.export(decoder, &run, &stop)?),
            false => None,
        };
        Ok(Done {
            draft,
            report: run.report,
            workers,
        })
    }

    /// Whether this process writes what is written once.
    fn leads(&self) -> bool {
        let launch = self.stage.launch.as_ref();
        launch.is_none_or(|launch| launch.rank == 0)
    }

    fn join(&self) -> Result<Option<Box<dyn Collective>>> {
        let Some(launch) = &self.stage.launch else {
            return Ok(None);
        };
        let workers = TcpCollective::join_unless(launch, MEETING, &self.cancel);
        Stop::new(&self.cancel, 0).check()?;
        let workers = workers?;
        #[cfg(feature = "nccl")]
        if let Place::Gpu(gpu) = &self.place {
            let workers = crate::collective::NcclCollective::join(workers, gpu)?;
            return Ok(Some(Box::new(workers)));
        }
        Ok(Some(Box::new(workers)))
    }

    /// Writes, reads back and compares what a run leaves; returns what is to be committed.
    fn export(&self, decoder: Decoder, run: &Run, stop: &Stop) -> Result<ManifestDraft> {
        let Run {
            report,
            adapter,
            log,
            evals,
        } = run;
        let (lora, settings) = (&self.stage.lora, &self.stage.config);
        let decoder = match settings.dtype() {
            DType::F32 if !decoder.is_on_gpu() => decoder,
            _ => {
                drop(decoder);
                // Verified at full precision, however it was trained.
                Place::Cpu.decoder(&self.base, DType::F32, &self.stage.threads)?
            }
        };
        let probe = self.probe()?;
        stop.check()?;
        let expected = probe.logits(&decoder, Some(adapter))?;
        let card = model_card(&self.stage.dataset, lora, settings, log);
        let mut objects = Vec::new();
        if !adapter.is_whole() {
            objects = self.put_all(stop, adapter_folder(adapter, &card, &self.base.files)?)?;
            self.verify_adapter(stop, &probe, &decoder, &expected)?;
        }
        drop(decoder); // A second one is loaded to verify the merged model.
        objects.extend(self.write_fused(stop, adapter, &card)?);
        self.verify_fused(stop, &objects, adapter, &probe, &expected)?;
        objects.extend(self.put_all(stop, self.curve(log))?);
        if !evals.is_empty() {
            let evals = ("eval.jsonl".to_owned(), write_log(evals).into());
            objects.extend(self.put_all(stop, vec![evals])?);
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
        Ok(ManifestDraft {
            objects,
            counts: counts.map(|(name, count)| (name.to_owned(), count)).into(),
            attributes,
            ..Default::default()
        })
    }

    fn train(
        &self,
        decoder: &Decoder,
        adapter: Adapter,
        events: Events,
        workers: &mut Option<Box<dyn Collective>>,
    ) -> Result<Run> {
        let mut trainer = Trainer::new(
            decoder,
            adapter,
            &*self.sources.train,
            self.stage.config.clone(),
        )?
        .with_base(self.stage.base.key().to_string())
        .with_checkpoints(self.checkpoints.clone(), self.runtime.clone())
        .with_observer(ProgressObserver::new(events));
        if trainer.expected_flops() > WORTH_A_CEILING && !decoder.is_on_gpu() {
            let ceiling = gemm_ceiling(decoder.threads(), self.stage.config.dtype());
            trainer = trainer.with_gemm_ceiling(ceiling);
        }
        if let Some(workers) = workers {
            trainer = trainer.with_workers(&mut **workers);
        }
        for sink in self.stage.report_to.iter().filter(|_| self.leads()) {
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
