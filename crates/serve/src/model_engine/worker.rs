//! The engine's thread: admit, plan, compute, sample, tell.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use tokio::sync::{mpsc, oneshot};
use updraft_model::{Adapter, Batch, BlockTables, Decoder, KvPages};

use super::grammar::Grammar;
use super::guard::{Failure, guard};
use super::options::EngineOptions;
use super::pace::Pace;
use super::registry::Generation;
use super::sequence::{Row, Sequence};
use super::status::Status;
use crate::engine::{FinishReason, GenerateRequest, TokenEvent};
use crate::error::{Error, Result};
use crate::prefix::PrefixRoot;
use crate::sampler;
use crate::scheduler::{Newcomer, Scheduler, SequenceId, Step};

/// Rows of logits computed at once: enough to use the hardware, little memory at any vocabulary.
const LOGIT_ROWS: usize = 32;

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

    fn forward(&mut self, step: &Step) -> Result<(Tensor, Vec<Row>), Failure> {
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

    fn use_hidden(&mut self, step: &Step, hidden: &Tensor, rows: &[Row]) {
        self.scheduler.computed(step);
        self.status
            .stepped(step.slices.iter().map(|slice| slice.len).sum());
        self.tell_embeddings(hidden, rows);
        for (index, chunk) in rows.chunks(LOGIT_ROWS).enumerate() {
            let first = index * LOGIT_ROWS;
            if let Ok(logits) = self.logits(hidden, first, chunk.len()) {
                self.use_logits(chunk, &logits);
                continue;
            }
            for (offset, &row) in chunk.iter().enumerate() {
                match self.logits(hidden, first + offset, 1) {
                    Ok(logits) => self.use_logits(&[row], &logits),
                    Err(failure) => self.fail(row.id(), &failure.cause),
                }
            }
        }
        for slice in step.slices.iter().filter(|slice| slice.is_last) {
            self.finish_prompt_only(slice.id);
            self.suspects.retain(|&suspect| suspect != slice.id);
        }
    }

    fn tell_embeddings(&mut self, hidden: &Tensor, rows: &[Row]) {
        for (index, row) in rows.iter().enumerate() {
            let Row::Embed(id) = *row else { continue };
            let state = guard(|| {
                let state = hidden.narrow(0, index, 1)?.to_dtype(DType::F32)?;
                Ok(state.flatten_all()?.to_vec1()?)
            });
            match (state, self.sequences.get(&id)) {
                (Ok(state), Some(sequence)) => sequence.tell(Ok(TokenEvent::Embedding(state))),
                (Err(failure), _) => self.fail(id, &failure.cause),
                (Ok(_), None) => {}
            }
        }
    }

    /// The logits of some rows, `[len, V]`.
    fn logits(&self, hidden: &Tensor, first: usize, len: usize) -> Result<Vec<f32>, Failure> {
        guard(|| {
            let hidden = hidden.narrow(0, first, len)?;
            let logits = self.decoder.logits(&hidden)?.to_dtype(DType::F32)?;
            Ok(logits.flatten_all()?.to_vec1()?)
        })
    }

    fn use_logits(&mut self, rows: &[Row], logits: &[f32]) {
        let vocab_size = logits.len() / rows.len();
        for (&row, logits) in rows.iter().zip(logits.chunks_exact(vocab_size)) {
            let used = guard(|| {
                self.use_row(row, logits);
                Ok(())
            });
            if let Err(failure) = used {
                tracing::error!(cause = failure.cause, "a token could not be chosen");
                self.fail(row.id(), &failure.cause);
            }
        }
    }

    /// The slices as the decoder wants them, the adapters they use, and what each row of logits is
    /// for.
    fn batch(&self, step: &Step) -> (Batch, Vec<Generation>, Vec<Row>) {
        let mut batch = Batch::default();
        let mut generations: Vec<Generation> = Vec::new();
        let mut rows = Vec::new();
        let mut tables = Vec::with_capacity(step.slices.len());
        for slice in &step.slices {
            let sequence = &self.sequences[&slice.id];
            let end = (slice.start + slice.len) as usize;
            let first = batch
                .push(&sequence.tokens[slice.start as usize..end], slice.start)
                .start;
            tables.push(self.scheduler.block_table(slice.id).to_vec());
            let adapter = sequence.adapter.as_ref().map(|adapter| {
                let known = generations
                    .iter()
                    .position(|known| known.number == adapter.number);
                known.unwrap_or_else(|| {
                    generations.push(adapter.clone());
                    generations.len() - 1
                })
            });
            batch.adapters.push(adapter);
            for (position, row) in sequence.rows(slice) {
                batch.logit_rows.push(first + position - slice.start);
                rows.push(row);
            }
        }
        let block_size = self.kv.block_size();
        batch.kv = Some(BlockTables { block_size, tables });
        (batch, generations, rows)
    }

    fn use_row(&mut self, row: Row, logits: &[f32]) {
        match row {
            Row::Prompt(id, position) => {
                if let Some(sequence) = self.sequences.get_mut(&id) {
                    sequence.note_prompt(position, logits);
                }
            }
            Row::Next(id) => self.choose(id, logits),
            Row::Embed(_) => {} // Told already.
        }
    }

    fn choose(&mut self, id: SequenceId, logits: &[f32]) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        sequence.tell_prompt();
        let allowed = match sequence.allowed(logits) {
            Ok(allowed) => allowed,
            Err(error) => return self.end_with(id, error),
        };
        let choice = allowed.as_deref().unwrap_or(logits);
        let Some(token) = sequence.sample(choice) else {
            return match sampler::is_sound(logits) {
                true => self.refuse(id, "the request's own settings leave no token to choose"),
                false => self.fail(id, "the model gave no finite logit"),
            };
        };
        let is_stop = sequence.request.stop_token_ids.contains(&token);
        let logprobs = sequence.logprobs(logits, token);
        sequence.push(token);
        if is_stop {
            return self.finish(id, FinishReason::Stop);
        }
        sequence.tell(Ok(TokenEvent::Token {
            id: token,
            logprobs,
        }));
        match sequence.is_over(token) {
            Ok(false) => {}
            Ok(true) => return self.finish(id, FinishReason::Stop),
            Err(error) => return self.end_with(id, error),
        }
        if sequence.generated().len() == sequence.request.max_tokens as usize {
            return self.finish(id, FinishReason::Length);
        }
        self.scheduler.appended(id, token);
    }

    /// A request for no tokens is done when its prompt is.
    fn finish_prompt_only(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id)
            && sequence.request.max_tokens == 0
        {
            sequence.tell_prompt();
            self.finish(id, FinishReason::Length);
        }
    }

    fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        self.pace.ended(Instant::now());
        if let Some(sequence) = self.sequences.get(&id) {
            sequence.tell(Ok(TokenEvent::Finished {
                reason,
                usage: sequence.usage(),
            }));
        }
        self.forget(id);
    }

    /// What the request asks for contradicts itself, which shows only now.
    fn refuse(&mut self, id: SequenceId, message: &str) {
        let refused = Error::InvalidRequest {
            message: message.to_owned(),
            param: None,
        };
        self.end_with(id, refused);
    }

    fn fail(&mut self, id: SequenceId, cause: &str) {
        let source = cause.into();
        self.end_with(id, Error::Step { source });
    }

    fn end_with(&mut self, id: SequenceId, error: Error) {
        if let Some(sequence) = self.sequences.get(&id) {
            sequence.tell(Err(error));
        }
        self.forget(id);
    }
}

/// As many pages as the scheduler hands out.
fn pages(decoder: &Decoder, scheduler: &Scheduler) -> updraft_model::Result<KvPages> {
    let config = scheduler.config();
    let (num_blocks, block_size) = (config.num_blocks as usize, config.block_size as usize);
    let (model, dtype) = (decoder.config(), decoder.dtype());
    KvPages::new(model, num_blocks, block_size, dtype, &Device::Cpu)
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.status.stopped();
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{adapter_for_another_model, served_parts};
    use super::*;

    type Events = mpsc::UnboundedReceiver<Result<TokenEvent>>;

    fn ask(inbox: &std::sync::mpsc::Sender<Arrival>, request: GenerateRequest) -> Events {
        ask_adapter(inbox, request, None)
    }

    fn ask_adapter(
        inbox: &std::sync::mpsc::Sender<Arrival>,
        request: GenerateRequest,
        adapter: Option<Generation>,
    ) -> Events {
        let (events, received) = mpsc::unbounded_channel();
        let (admitted, _) = oneshot::channel();
        let job = Job {
            request,
            adapter,
            grammar: None,
            events,
        };
        let jobs = vec![job];
        inbox.send(Arrival { jobs, admitted }).expect("it listens");
        received
    }

    fn greedy(prompt_tokens: u32, max_tokens: u32) -> GenerateRequest {
        GenerateRequest::greedy("tiny", (0..prompt_tokens).collect(), max_tokens)
    }

    /// The tokens so far, and whether an error came.
    fn told(events: &mut Events) -> (Vec<u32>, bool) {
        let (mut tokens, mut failed) = (Vec::new(), false);
        while let Ok(event) = events.try_recv() {
            match event {
                Ok(TokenEvent::Token { id, .. }) => tokens.push(id),
                Ok(_) => {}
                Err(_) => failed = true,
            }
        }
        (tokens, failed)
    }

    /// Not "soon": the first step after a client has gone has none of its tokens, and its blocks
    /// are free, whether it was decoding, in the middle of its prompt, or still waiting.
    #[test]
    fn a_cancelled_request_is_gone_within_one_step() {
        let (mut worker, inbox) = served_parts();
        let clients = [5, 100, 5].map(|prompt_tokens| ask(&inbox, greedy(prompt_tokens, 50)));
        worker.turn(None);
        let progress = (
            worker.scheduler.num_running(),
            worker.scheduler.num_waiting(),
        );
        assert_eq!(
            progress,
            (2, 1),
            "one decodes, one has half its prompt, one waits"
        );
        drop(clients);
        worker.turn(None);
        let (free, all) = worker.scheduler.block_usage();
        assert_eq!((free, worker.sequences.len()), (all, 0));
        assert_eq!(worker.status.get().kv_cache_usage, 0.0);
    }

    /// One request of a batch fails or panics in the forward pass, at its start or later: it alone
    /// gets an error, and the other's answer is what it would have been.
    #[test]
    fn a_poisoned_request_fails_alone() {
        let (mut worker, inbox) = served_parts();
        let mut events = ask(&inbox, greedy(9, 12));
        (0..12).for_each(|_| worker.turn(None));
        let expected = told(&mut events);
        assert_eq!((expected.0.len(), expected.1), (12, false));

        for (panics, after) in [(false, 0), (true, 0), (true, 3)] {
            let (mut worker, inbox) = served_parts();
            let mut good = ask(&inbox, greedy(9, 12));
            let poison = adapter_for_another_model().filter(|_| !panics);
            let mut bad = ask_adapter(&inbox, greedy(20, 12), poison);
            for turn in 0..40 {
                if panics && turn == after {
                    // As if a length were counted wrong somewhere: an index out of bounds.
                    let arrivals: Vec<Arrival> = worker.inbox.try_iter().collect();
                    arrivals
                        .into_iter()
                        .for_each(|arrival| worker.admit(arrival));
                    worker
                        .sequences
                        .get_mut(&1)
                        .expect("admitted")
                        .tokens
                        .clear();
                }
                worker.turn(None);
            }
            assert_eq!(told(&mut good), expected, "panics {panics} after {after}");
            let (tokens, failed) = told(&mut bad);
            assert!(failed && tokens.len() == after, "{tokens:?}");
            let (free, all) = worker.scheduler.block_usage();
            assert_eq!((free, worker.sequences.len()), (all, 0));
        }
    }

    /// What no request's own failure explains ends them all, and the next ones are served.
    #[test]
    fn the_engine_starts_over_when_nothing_else_helps() {
        let (mut worker, inbox) = served_parts();
        let mut lost = ask(&inbox, greedy(9, 12));
        worker.turn(None);
        // The scheduler's books are wrong: a block was freed under a running sequence.
        worker.scheduler.finish(0);
        worker
            .scheduler
            .admit(0, &[1, 2], 4, None)
            .expect("there is room");
        worker.start_over(&Failure {
            cause: "injected".into(),
            panicked: true,
        });
        assert!(told(&mut lost).1, "it is told");
        let mut next = ask(&inbox, greedy(9, 12));
        (0..12).for_each(|_| worker.turn(None));
        assert_eq!(told(&mut next).0.len(), 12);
    }
}
