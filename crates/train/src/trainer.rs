//! The training loop.

mod report;
mod resume;

use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use updraft_kernels::clip;
use updraft_kernels::noise::derive;
use updraft_model::{Adapter, Decoder, Gradients, Parameter};
use updraft_store::{CancelToken, sha256_hex};

use crate::batch::{Noise, noisy_parts};
use crate::checkpoints::Checkpoints;
use crate::collective::{Alone, Collective};
use crate::evaluation::{EvalRecord, best, evaluate, patience_is_out};
use crate::flops::Work;
use crate::identity::values_of;
use crate::loader::{StepExamples, StepReader, read_ahead};
use crate::loss_scale::LossScale;
use crate::memory::out_of_gpu_memory;
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
                        let done = self.decoder.threads().install(|| self.step(&examples));
                        done.map_err(|error| self.explained(error))?;
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

    /// A GPU that ran out of memory says what it was asked for; what fits is known here.
    fn explained(&self, error: Error) -> Error {
        let asked = match &error {
            Error::Model(error) => error.out_of_gpu_memory(),
            _ => None,
        };
        match asked {
            Some(bytes) => {
                let (lora, data) = (self.adapter.config(), self.source.plan());
                out_of_gpu_memory(self.decoder, lora, data, &self.config, bytes)
            }
            None => error,
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

    /// One optimizer step.
    fn step(&mut self, examples: &StepExamples) -> Result<()> {
        let step = self.cursor.step + 1;
        let all = || examples.micro_batches.iter().flatten();
        let trained_tokens: u64 = all()
            .map(|example| u64::from(example.trained_tokens()))
            .sum();
        if trained_tokens == 0 {
            return Err(Error::EmptyStep { step });
        }

        self.gradients.zero()?;
        let factor = self.loss_scale.map_or(1.0, |scale| scale.factor());
        let mut loss_sum = 0.0;
        let mut noise = Noise {
            step_seed: derive(self.config.seed, step),
            first_example: 0,
            neftune_noise_alpha: self.config.neftune_noise_alpha.unwrap_or(0.0),
        };
        for (place, micro_batch) in examples.micro_batches.iter().enumerate() {
            if !self.workers.takes(place) {
                noise.first_example += micro_batch.len() as u64;
                continue;
            }
            let num_parts = self.decoder.num_parts();
            let vocab_size = self.decoder.config().vocab_size;
            let parts = noisy_parts(micro_batch, num_parts, vocab_size, noise)?;
            noise.first_example += micro_batch.len() as u64;
            if parts.is_empty() {
                continue; // Another micro-batch of the step has trained tokens.
            }
            loss_sum += self.decoder.loss_and_backward(
                &parts,
                &self.adapter,
                trained_tokens as f64 / factor,
                &mut self.gradients,
                self.config.activations(),
            )?;
        }
        self.gradients.update(|values| self.workers.sum(values))??;
        let loss = self.workers.sum_f64(loss_sum)? / trained_tokens as f64;
        if !loss.is_finite() {
            return Err(Error::LossNotFinite { step, loss });
        }
        let mut grad_norm = self
            .gradients
            .with(|values| clip::sum_of_squares(values).sqrt())?
            / factor;
        let overflowed = !grad_norm.is_finite();
        let skipped = match &mut self.loss_scale {
            Some(scale) => {
                let skipped = scale.overflows();
                scale.update(overflowed);
                skipped
            }
            None => 0,
        };
        let learning_rate = self.schedule.learning_rate(self.cursor.step - skipped);
        if !overflowed {
            self.update(grad_norm, factor, learning_rate)?;
        } else if self.loss_scale.is_some_and(|scale| !scale.is_exhausted()) {
            grad_norm = 0.0;
        } else {
            return Err(Error::GradientNotFinite {
                step,
                norm: grad_norm,
            });
        }

        for example in all() {
            self.work.add(example);
        }
        self.cursor = examples.next.clone();
        self.log.push(StepRecord {
            step,
            epoch: examples.epoch,
            loss,
            learning_rate,
            grad_norm,
            tokens: all().map(|example| example.len() as u64).sum(),
            trained_tokens,
            examples: all().count() as u64,
            overflowed,
        });
        Ok(())
    }

    /// Takes the loss scale out of the gradients, clips them and moves the parameters.
    fn update(&mut self, grad_norm: f64, factor: f64, learning_rate: f64) -> Result<()> {
        let coefficient = clip::coefficient(grad_norm, self.config.max_grad_norm) / factor;
        if coefficient < 1.0 {
            let threads = self.decoder.threads();
            self.gradients
                .update(|values| clip::scale(threads, coefficient, values))?;
        }
        self.optimizer.begin_step(learning_rate);
        let Self {
            adapter,
            gradients,
            optimizer,
            parameters,
            ..
        } = self;
        gradients.with(|gradients| {
            adapter.update(|values| {
                parameters
                    .iter()
                    .try_for_each(|Parameter { name, range, .. }| {
                        optimizer.update(
                            name,
                            &mut values[range.clone()],
                            &gradients[range.clone()],
                        )
                    })
            })
        })??
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

    /// Whether no step is left to be done.
    fn is_over(&self) -> bool {
        self.cursor.step == self.plan.total_steps() || patience_is_out(&self.evals, &self.config)
    }

    /// What follows a step: an evaluation and a checkpoint where they are due, unless some worker
    /// is cancelled.
    fn finish_step(&mut self) -> Result<ControlFlow<()>> {
        if self.evaluation_is_due() && self.evaluate()?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        if self.cursor.step.is_multiple_of(self.config.save_steps) || self.is_over() {
            self.save()?;
        }
        // There is no step after the last, but its held-out loss says as much.
        if self.is_over() && self.has_evaluated() {
            self.prune()?;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Whether the newest evaluation is of the newest step.
    fn has_evaluated(&self) -> bool {
        let newest = self.evals.last();
        newest.is_some_and(|eval| eval.step == self.cursor.step)
    }

    fn evaluation_is_due(&self) -> bool {
        let step = self.cursor.step;
        let every = |every: u64| step.is_multiple_of(every);
        let now = self.config.eval_steps.is_some_and(every) || step == self.plan.total_steps();
        now && step > 0 && self.held_out.is_some() && !self.has_evaluated()
    }

    /// Evaluates on the first worker, until it is cancelled.
    fn evaluate(&mut self) -> Result<ControlFlow<()>> {
        const CANCELLED: [f64; 2] = [0.0, -1.0];
        let Some(held_out) = self.held_out else {
            return Ok(ControlFlow::Continue(()));
        };
        let step = self.cursor.step;
        let batch_size = self.config.per_device_eval_batch_size as usize;
        let adapter = Some(&self.adapter);
        let own = match self.workers.leads() {
            true => match evaluate(self.decoder, adapter, held_out, batch_size, &self.cancels) {
                Ok((loss, tokens)) => [loss, tokens as f64],
                Err(Error::Cancelled { .. }) => CANCELLED,
                Err(error) => return Err(error),
            },
            false => [0.0, 0.0],
        };
        // What follows from it must follow on all workers.
        let told = self.workers.of_the_first(own)?;
        if told == CANCELLED {
            return Ok(ControlFlow::Break(()));
        }
        let [eval_loss, trained_tokens] = told;
        if !eval_loss.is_finite() {
            return Err(Error::EvalLossNotFinite {
                step,
                loss: eval_loss,
            });
        }
        let eval = EvalRecord {
            step,
            epoch: self.log.last().map_or(0.0, |record| record.epoch),
            eval_loss,
            trained_tokens: trained_tokens as u64,
        };
        self.evals.push(eval);
        if self.config.load_best_model_at_end && best(&self.evals) == Some(&eval) {
            self.best = Some(self.adapter.to_dtype(self.adapter.dtype())?);
        }
        for observer in &mut self.observers {
            observer.on_evaluation(&eval);
        }
        Ok(ControlFlow::Continue(()))
    }

    fn cancelled(&mut self) -> Result<()> {
        if self.cursor.step > 0 {
            self.save()?;
        }
        Err(Error::Cancelled {
            step: self.cursor.step,
        })
    }

    fn save(&mut self) -> Result<()> {
        let step = self.cursor.step;
        let all_finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
        if !self.adapter.with(all_finite)? {
            return Err(Error::ParametersNotFinite { step });
        }
        self.check_adapters()?;
        let place = self.checkpoints.as_ref().filter(|_| self.workers.leads());
        let Some((checkpoints, runtime)) = place else {
            return Ok(());
        };
        runtime.block_on(checkpoints.save(&self.snapshot()))?;
        self.unproven = Some(step);
        for observer in &mut self.observers {
            observer.on_checkpoint(step);
        }
        Ok(())
    }

    /// Deletes what a checkpoint made superfluous, now that the run has gone on from it.
    fn prune(&mut self) -> Result<()> {
        let place = self.checkpoints.as_ref().filter(|_| self.workers.leads());
        if let (Some((checkpoints, runtime)), Some(step)) = (place, self.unproven.take()) {
            runtime.block_on(checkpoints.prune(step))?;
        }
        Ok(())
    }
}
