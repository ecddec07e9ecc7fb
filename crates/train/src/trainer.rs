//! The training loop.

mod pause;
mod report;
mod resume;
mod step;
mod update;

use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use updraft_model::{Adapter, Decoder, Gradients, Parameter};
use updraft_store::{CancelToken, sha256_hex};

use crate::checkpoints::Checkpoints;
use crate::collective::{Alone, Collective};
use crate::evaluation::{EvalRecord, patience_is_out};
use crate::flops::Work;
use crate::identity::values_of;
use crate::loader::{StepExamples, StepReader, read_ahead};
use crate::loss_scale::LossScale;
use crate::observer::{Observer, StepRecord, StepStats};
use crate::optim::{self, Optimizer};
use crate::plan::{Cursor, RunPlan};
use crate::schedule::Schedule;
use crate::source::ExampleSource;
use crate::{Error, Result, TrainConfig};

pub use report::TrainReport;

/// How often a run that waits for data looks whether it was cancelled.
const CANCEL_CHECK: Duration = Duration::from_millis(50);

/// Trains one adapter over a frozen decoder, from the first step to the last,
/// as one continuous run over all of a source's data. An adapter may hold whole weights of the
/// decoder's, or nothing else ([`LoraConfig::full_fine_tuning`](updraft_model::LoraConfig::full_fine_tuning)).
///
/// ```text
/// loss = Σ cross-entropy / Σ trained tokens       over the whole optimizer step
/// g    = ∂loss/∂θ · min(1, max_grad_norm / (‖g‖₂ + 1e-6))
/// ```
///
/// then one optimizer step at the schedule's learning rate.
///
/// # Source
/// transformers 5, `trainer.py` and `loss/loss_utils.py`.
#[derive(Debug)]
pub struct Trainer<'a> {
    decoder: &'a Decoder,
    source: &'a dyn ExampleSource,
    config: TrainConfig,
    plan: RunPlan<'a>,
    schedule: Schedule,
    adapter: Adapter,
    /// A hash of what it began with.
    start: String,
    parameters: Vec<Parameter>,
    gradients: Gradients,
    optimizer: Box<dyn Optimizer>,
    cursor: Cursor,
    log: Vec<StepRecord>,
    held_out: Option<&'a dyn ExampleSource>,
    evals: Vec<EvalRecord>,
    /// The adapter of the best evaluation so far, if that is the one wanted.
    best: Option<Adapter>,
    observers: Vec<Box<dyn Observer + 'a>>,
    /// The base model's content.
    base: Option<String>,
    checkpoints: Option<(Checkpoints, Handle)>,
    /// The step of a checkpoint that no later step has gone on from yet.
    unproven: Option<u64>,
    cancels: Vec<CancelToken>,
    workers: Box<dyn Collective + 'a>,
    /// Work of this process.
    work: Work,
    gemm_ceiling: Option<f64>,
    loss_scale: Option<LossScale>,
}

impl<'a> Trainer<'a> {
    /// A run that has not begun.
    ///
    /// # Errors
    /// As [`RunPlan::new`]; [`Error::Model`] when the adapter does not fit the
    /// decoder.
    pub fn new(
        decoder: &'a Decoder,
        adapter: Adapter,
        source: &'a dyn ExampleSource,
        config: TrainConfig,
    ) -> Result<Self> {
        adapter.check(decoder.config())?;
        let plan = RunPlan::new(source, &config)?;
        plan.check_context(decoder.config().max_len())?;
        Ok(Self {
            decoder,
            source,
            plan,
            schedule: config.schedule(plan.total_steps()),
            parameters: adapter.parameters().to_vec(),
            gradients: Gradients::zeros(&adapter)?,
            optimizer: optim::build(&config, decoder.threads()),
            start: values_of(&adapter)?,
            adapter,
            cursor: plan.start(),
            log: Vec::new(),
            held_out: None,
            evals: Vec::new(),
            best: None,
            observers: Vec::new(),
            base: None,
            checkpoints: None,
            unproven: None,
            cancels: Vec::new(),
            workers: Box::new(Alone),
            work: Work::default(),
            gemm_ceiling: None,
            loss_scale: config.fp16.then(|| LossScale::after(&[])),
            config,
        })
    }

    /// Tells an observer of every step.
    pub fn with_observer(mut self, observer: impl Observer + 'a) -> Self {
        self.observers.push(Box::new(observer));
        self
    }

    /// Evaluates the loss on these examples every `eval_steps` steps and at
    /// the end. `early_stopping_patience` and `load_best_model_at_end` need
    /// both.
    pub fn with_evaluation(mut self, held_out: &'a dyn ExampleSource) -> Self {
        self.held_out = Some(held_out);
        self
    }

    /// Steps with this optimizer instead of the one that the settings name. Checkpoints carry its
    /// [`state`](Optimizer::state), not its kind: continue with the same.
    pub fn with_optimizer(mut self, optimizer: impl Optimizer + 'static) -> Self {
        self.optimizer = Box::new(optimizer);
        self
    }

    /// Names the base model's content, such as by
    /// [`ModelFiles::fingerprint`](updraft_model::ModelFiles::fingerprint) or a stage's key.
    /// Checkpoints carry it, and a run over another base refuses them.
    pub fn with_base(mut self, id: impl Into<String>) -> Self {
        self.base = Some(id.into());
        self
    }

    /// Shares the run with other workers: each is given the same model, data and settings, takes
    /// its part of every step's micro-batches, and ends with the same bits. A step stays what the
    /// settings say, so `gradient_accumulation_steps` counts the micro-batches of all workers
    /// together. The first worker alone evaluates and writes checkpoints, and the others wait for it.
    ///
    /// Every worker reads all examples of a step, not only those it takes: any of them can go on from any checkpoint
    /// with any other number of workers, packing and noise are the same for all, and how many tokens a step trains
    /// needs no message. It costs four bytes a token: at a million tokens a second, what one disk gives many times over.
    pub fn with_workers(mut self, workers: impl Collective + 'a) -> Self {
        let (micro_batches, num_workers) = (
            self.config.gradient_accumulation_steps as usize,
            workers.num_workers(),
        );
        if micro_batches < num_workers {
            tracing::warn!(
                micro_batches,
                num_workers,
                "some workers have nothing to do: raise gradient_accumulation_steps to a multiple \
                 of the workers, and lower per_device_train_batch_size for the same step"
            );
        }
        self.workers = Box::new(workers);
        self
    }

    /// Stops when this token is cancelled, or one given before: after the step or evaluation batch
    /// under way, and when the source has come back from the example it is reading.
    pub fn with_cancel(mut self, cancel: CancelToken) -> Self {
        self.cancels.push(cancel);
        self
    }

    /// Writes checkpoints every `save_steps` steps, at the end and when
    /// cancelled. The store is asynchronous: `runtime` carries its calls, so
    /// [`run`](Self::run) must be called outside of asynchronous code, such as
    /// from `spawn_blocking`. Old ones are deleted once the step after a newer
    /// one had a finite loss, so a run that explodes leaves a good one behind.
    pub fn with_checkpoints(mut self, checkpoints: Checkpoints, runtime: Handle) -> Self {
        self.checkpoints = Some((checkpoints, runtime));
        self
    }

    /// Reports the run's model FLOPs utilization against this many operations
    /// per second, such as [`gemm_ceiling`](crate::gemm_ceiling) measures.
    pub fn with_gemm_ceiling(mut self, flops_per_second: f64) -> Self {
        self.gemm_ceiling = Some(flops_per_second);
        self
    }

    /// About how many operations the whole run will be: six for each token and number of the model.
    pub(crate) fn expected_flops(&self) -> f64 {
        let epoch = self.plan.epoch(0);
        let tokens = epoch.tokens as f64 / epoch.steps.max(1) as f64;
        let numbers = self.decoder.config().num_parameters() as f64;
        6.0 * numbers * tokens * self.plan.total_steps() as f64
    }

    /// The adapter as trained so far.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// Every step so far.
    pub fn log(&self) -> &[StepRecord] {
        &self.log
    }

    /// Every evaluation so far.
    pub fn evals(&self) -> &[EvalRecord] {
        &self.evals
    }

    /// Hands out the adapter that the run ends with, the last or the best one,
    /// and the log.
    pub fn into_parts(self) -> (Adapter, Vec<StepRecord>) {
        (self.best.unwrap_or(self.adapter), self.log)
    }

    /// Trains to the last step, or until the held-out loss no longer falls.
    ///
    /// # Errors
    /// [`Error::Cancelled`] after writing a checkpoint;
    /// [`Error::LossNotFinite`] and the others for data or settings that
    /// cannot be trained on. The last checkpoint stays.
    ///
    /// # Panics
    /// Inside asynchronous code, when checkpoints are written.
    pub fn run(&mut self) -> Result<TrainReport> {
        let total_steps = self.plan.total_steps();
        self.run_until(total_steps)
    }

    /// Trains until `step` optimizer steps are done, or to the last step.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    ///
    /// # Panics
    /// As [`run`](Self::run).
    pub fn run_until(&mut self, step: u64) -> Result<TrainReport> {
        let began = Instant::now();
        let resumed_from = self.cursor.step;
        self.work = Work::default();
        self.config.check_evaluation(self.held_out.is_some())?;
        self.check_workers()?;
        let reader = StepReader::new(self.source, self.plan, self.cursor.clone());
        std::thread::scope(|scope| {
            let steps = read_ahead(scope, reader);
            // A run that was cancelled while it evaluated goes on with that.
            if self.evaluation_is_due() && self.finish_step()?.is_break() {
                return self.cancelled();
            }
            while self.cursor.step < step.min(self.plan.total_steps())
                && !patience_is_out(&self.evals, &self.config)
            {
                match self.next(&steps)? {
                    ControlFlow::Continue(examples) => {
                        self.step_in_place(&examples)?;
                    }
                    ControlFlow::Break(()) => return self.cancelled(),
                }
                self.prune()?;
                self.report(began, resumed_from);
                if self.finish_step()?.is_break() {
                    return self.cancelled();
                }
            }
            Ok(())
        })?;
        let report = self.summary(began.elapsed(), resumed_from);
        if self.is_over() {
            for observer in &mut self.observers {
                observer.on_end(&report);
            }
        }
        Ok(report)
    }

    /// On the decoder's threads; on a GPU here, for what waits for one must not hold up a thread that others wait for.
    fn step_in_place(&mut self, examples: &StepExamples) -> Result<()> {
        match self.decoder.is_on_gpu() {
            true => self.step(examples),
            false => self.decoder.threads().install(|| self.step(examples)),
        }
    }

    /// Workers that train apart from each other would not notice.
    fn check_workers(&mut self) -> Result<()> {
        if self.workers.num_workers() == 1 {
            return Ok(());
        }
        let cursor = format!("{:?}", self.cursor);
        self.workers
            .agree("the data or the step", cursor.as_bytes())?;
        let config = format!("{:?}", self.config.deciding());
        self.workers.agree("TrainConfig", config.as_bytes())?;
        self.check_adapters()
    }

    /// Processors with other instructions may round otherwise.
    fn check_adapters(&mut self) -> Result<()> {
        if self.workers.num_workers() == 1 {
            return Ok(());
        }
        let numbers = self.adapter.values()?;
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.workers
            .agree("the adapter", sha256_hex(&bytes).as_bytes())
    }

    /// The next step's examples, unless some worker is cancelled.
    fn next(
        &mut self,
        steps: &Receiver<Result<StepExamples>>,
    ) -> Result<ControlFlow<(), StepExamples>> {
        let next = self.wait(steps)?;
        let cancelled = self.cancels.iter().any(CancelToken::is_cancelled);
        match (next, self.workers.any(cancelled)?) {
            (ControlFlow::Continue(examples), false) => Ok(ControlFlow::Continue(examples)),
            _ => Ok(ControlFlow::Break(())),
        }
    }

    /// Waits for the next step's examples, or, if nobody waits for this worker, for being
    /// cancelled.
    fn wait(
        &self,
        steps: &Receiver<Result<StepExamples>>,
    ) -> Result<ControlFlow<(), StepExamples>> {
        loop {
            let alone = self.workers.num_workers() == 1;
            if alone && self.cancels.iter().any(CancelToken::is_cancelled) {
                return Ok(ControlFlow::Break(()));
            }
            match steps.recv_timeout(CANCEL_CHECK) {
                Ok(step) => return step.map(ControlFlow::Continue),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::source(
                        "the reading thread stopped before the run's last step",
                    ));
                }
            }
        }
    }

    fn report(&mut self, began: Instant, resumed_from: u64) {
        let record = self.log.last().expect("a step was just logged");
        let new = &self.log[resumed_from as usize..];
        let tokens: u64 = new.iter().map(|record| record.tokens).sum();
        let stats = StepStats {
            record,
            total_steps: self.plan.total_steps(),
            tokens_per_second: tokens as f64 / began.elapsed().as_secs_f64(),
        };
        for observer in &mut self.observers {
            observer.on_step(&stats);
        }
    }
}
