//! The engine's thread: who is admitted, and what is computed next.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use tokio::sync::{mpsc, oneshot};
use updraft_model::{Adapter, Decoder, Hidden, KvPages};

use super::grammar::Grammar;
use super::guard::{Failure, guard};
use super::options::EngineOptions;
use super::pace::Pace;
use super::registry::Generation;
use super::sequence::{Row, Sequence};
use super::status::Status;
use crate::engine::{GenerateRequest, TokenEvent};
use crate::error::{Error, Result};
use crate::prefix::PrefixRoot;
use crate::scheduler::{Newcomer, Scheduler, SequenceId, Step};

mod batch;
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
mod on_gpu;
mod outcome;

pub(super) use outcome::LOGIT_ROWS_ON_GPU;

/// A request on its way to the thread.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) request: GenerateRequest,
    /// Which adapter, if not the base.
    pub(super) adapter: Option<Generation>,
    /// What the answer must follow.
    pub(super) grammar: Option<Grammar>,
    pub(super) events: mpsc::UnboundedSender<Result<TokenEvent>>,
}

/// Requests that come together, to be admitted together or not at all.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) jobs: Vec<Job>,
    /// Whether they got places in the queue.
    pub(super) admitted: oneshot::Sender<Result<()>>,
}

/// Everything the thread owns.
#[derive(Debug)]
pub(super) struct Worker {
    decoder: Decoder,
    kv: KvPages,
    scheduler: Scheduler,
    sequences: BTreeMap<SequenceId, Sequence>,
    /// Sequences of a step that failed. Each runs alone until it has shown that it can.
    suspects: VecDeque<SequenceId>,
    next_id: SequenceId,
    prefix_cache: bool,
    pace: Pace,
    inbox: Receiver<Arrival>,
    status: Arc<Status>,
}

impl Worker {
    /// With a cache of as many blocks as the scheduler hands out.
    pub(super) fn new(
        decoder: Decoder,
        scheduler: Scheduler,
        options: &EngineOptions,
        inbox: Receiver<Arrival>,
        status: Arc<Status>,
    ) -> updraft_model::Result<Self> {
        status.caches_prefixes(options.prefix_cache);
        status.publish(&scheduler);
        Ok(Self {
            kv: pages(&decoder, &scheduler)?,
            decoder,
            scheduler,
            sequences: BTreeMap::new(),
            suspects: VecDeque::new(),
            next_id: 0,
            prefix_cache: options.prefix_cache,
            pace: Pace::default(),
            inbox,
            status,
        })
    }

    /// Works until the engine is dropped and nothing is left to do.
    pub(super) fn run(mut self) {
        loop {
            let mut first = None;
            if self.sequences.is_empty() {
                self.pace.idle();
                match self.inbox.recv() {
                    Ok(arrival) => first = Some(arrival),
                    Err(_) => break,
                }
            }
            let turn = guard(|| {
                self.turn(first);
                Ok(())
            });
            if let Err(failure) = turn {
                self.start_over(&failure);
            }
        }
    }

    /// Forgets what has gone, admits what has come, and computes one step.
    fn turn(&mut self, first: Option<Arrival>) {
        // In this order a client that drops one request and sends another finds its place free.
        let arrivals: Vec<Arrival> = first.into_iter().chain(self.inbox.try_iter()).collect();
        self.drop_cancelled();
        arrivals.into_iter().for_each(|arrival| self.admit(arrival));
        self.step();
        self.publish();
    }

    fn publish(&self) {
        self.status.publish(&self.scheduler);
        let with_adapter = || {
            let adapted = |(_, sequence): &(&SequenceId, &Sequence)| sequence.adapter.is_some();
            self.sequences.iter().filter(adapted)
        };
        let adapters = |runs: bool| {
            let chosen = with_adapter()
                .filter(|(id, _)| self.scheduler.block_table(**id).is_empty() != runs);
            chosen
                .map(|(_, sequence)| sequence.request.model.as_str())
                .collect()
        };
        self.status.adapters(adapters(true), adapters(false));
    }

    fn admit(&mut self, arrival: Arrival) {
        let Arrival { jobs, admitted } = arrival;
        if jobs.iter().all(|job| job.events.is_closed()) {
            return; // Whoever asked has gone.
        }
        let first = self.next_id;
        let newcomers: Vec<Newcomer<'_>> = jobs
            .iter()
            .map(|job| Newcomer {
                prompt: &job.request.prompt_ids,
                max_tokens: job.request.max_tokens,
                root: self.root(job),
            })
            .collect();
        let result = match self.scheduler.admit_all(first, &newcomers) {
            Ok(()) => {
                self.next_id += jobs.len() as SequenceId;
                for (id, job) in (first..).zip(jobs) {
                    let (request, events) = (job.request, job.events);
                    let sequence = Sequence::new(request, job.adapter, job.grammar, events);
                    self.sequences.insert(id, sequence);
                }
                Ok(())
            }
            Err(Error::Overloaded { .. }) => Err(Error::Overloaded {
                retry_after: self.pace.retry_after(self.scheduler.num_waiting()),
            }),
            Err(other) => Err(other),
        };
        self.publish();
        // Nobody listens if the client has just gone; the next sweep finds that out.
        let _ = admitted.send(result);
    }

    /// What a request's prefix shares; nothing where every position's logits are wanted.
    fn root(&self, job: &Job) -> Option<PrefixRoot> {
        let generation = job.adapter.as_ref().map_or(0, |adapter| adapter.number);
        let shares = self.prefix_cache && job.request.prompt_logprobs.is_none();
        shares.then(|| PrefixRoot::new(generation, job.request.cache_salt.as_deref()))
    }

    /// Forgets requests whose stream was dropped, before anything more is computed for them.
    fn drop_cancelled(&mut self) {
        let gone =
            |(id, sequence): (&SequenceId, &Sequence)| sequence.events.is_closed().then_some(*id);
        let gone: Vec<_> = self.sequences.iter().filter_map(gone).collect();
        gone.into_iter().for_each(|id| self.forget(id));
    }

    fn forget(&mut self, id: SequenceId) {
        self.scheduler.finish(id);
        self.sequences.remove(&id);
        self.suspects.retain(|&suspect| suspect != id);
    }

    fn step(&mut self) {
        let step = match self.suspects.front() {
            Some(&suspect) => self.scheduler.schedule_only(suspect),
            None => self.scheduler.schedule(),
        };
        for &(id, cached_tokens) in &step.started {
            if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.cached_tokens = cached_tokens;
                sequence.tell(Ok(TokenEvent::Started { cached_tokens }));
            }
        }
        if step.slices.is_empty() {
            return;
        }
        match self.forward(&step) {
            Ok((hidden, rows)) => self.use_hidden(&step, &hidden, &rows),
            Err(failure) => self.isolate(&step, &failure),
        }
    }

    fn forward(&mut self, step: &Step) -> Result<(Hidden, Vec<Row>), Failure> {
        guard(|| {
            let (batch, generations, rows) = self.batch(step);
            let adapters: Vec<&Adapter> = generations
                .iter()
                .map(|generation| generation.adapter.as_ref())
                .collect();
            let hidden = self
                .decoder
                .forward(&batch, &adapters, Some(&mut self.kv))?; // [N, C]
            Ok((hidden, rows))
        })
    }

    /// The requests of a step that failed are computed one by one: whoever fails alone is the one.
    fn isolate(&mut self, step: &Step, failure: &Failure) {
        let (cause, requests) = (&failure.cause, step.slices.len());
        tracing::error!(cause, requests, "a forward pass failed");
        if failure.panicked {
            self.clear_cache();
        }
        match step.slices.as_slice() {
            [alone] => self.fail(alone.id, cause),
            several => self.suspects = several.iter().map(|slice| slice.id).collect(),
        }
    }

    /// A panic may have left pages half written, or their locks poisoned.
    fn clear_cache(&mut self) {
        self.scheduler.restart();
        // The old pages go first: on a GPU they take most of what there is.
        if let Ok(least) = self.decoder.new_pages(1, self.kv.block_size()) {
            self.kv = least;
        }
        match pages(&self.decoder, &self.scheduler) {
            Ok(kv) => self.kv = kv,
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "no new cache");
            }
        }
    }

    /// The last resort: what went wrong is not one request's computation, so all of them end.
    fn start_over(&mut self, failure: &Failure) {
        let (cause, requests) = (&failure.cause, self.sequences.len());
        tracing::error!(cause, requests, "the engine starts over");
        for (_, sequence) in std::mem::take(&mut self.sequences) {
            sequence.tell(Err(Error::Step {
                source: cause.as_str().into(),
            }));
        }
        self.suspects.clear();
        self.scheduler.reset();
        self.clear_cache();
        self.publish();
    }
}

/// As many pages as the scheduler hands out.
fn pages(decoder: &Decoder, scheduler: &Scheduler) -> updraft_model::Result<KvPages> {
    let config = scheduler.config();
    decoder.new_pages(config.num_blocks as usize, config.block_size as usize)
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.status.stopped();
    }
}

#[cfg(test)]
mod tests;
