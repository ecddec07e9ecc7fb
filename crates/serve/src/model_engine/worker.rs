//! The engine's thread: admit, plan, compute, sample, tell.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use candle_core::{DType, Tensor};
use tokio::sync::{mpsc, oneshot};
use updraft_model::{Adapter, Batch, BlockTables, Decoder, KvPages};

use super::status::Status;
use crate::engine::{FinishReason, GenerateRequest, TokenEvent, TokenLogprobs, Usage};
use crate::error::{BoxError, Error, Result, one_line};
use crate::sampler::{self, Past};
use crate::scheduler::{Scheduler, SequenceId, Slice, Step};

/// Rows of logits computed at once: enough to use the hardware, little memory at any vocabulary.
const LOGIT_ROWS: usize = 32;

/// A request on its way to the thread.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) request: GenerateRequest,
    /// Which adapter, if not the base.
    pub(super) adapter: Option<usize>,
    pub(super) events: mpsc::UnboundedSender<Result<TokenEvent>>,
    /// Whether it got a place in the queue.
    pub(super) admitted: oneshot::Sender<Result<()>>,
}

/// Everything the thread owns.
#[derive(Debug)]
pub(super) struct Worker {
    decoder: Decoder,
    adapters: Vec<Arc<Adapter>>,
    kv: KvPages,
    scheduler: Scheduler,
    sequences: BTreeMap<SequenceId, Sequence>,
    next_id: SequenceId,
    inbox: Receiver<Job>,
    status: Arc<Status>,
}

/// One request under way.
#[derive(Debug)]
struct Sequence {
    request: GenerateRequest,
    adapter: Option<usize>,
    /// Prompt and completion.
    tokens: Vec<u32>,
    prompt_logprobs: Vec<Option<TokenLogprobs>>,
    events: mpsc::UnboundedSender<Result<TokenEvent>>,
}

/// What a row of logits is for.
#[derive(Debug, Clone, Copy)]
enum Row {
    /// The log-probability of the prompt's token at this position.
    Prompt(SequenceId, usize),
    /// The next token.
    Next(SequenceId),
}

impl Worker {
    pub(super) fn new(
        decoder: Decoder,
        adapters: Vec<Arc<Adapter>>,
        kv: KvPages,
        scheduler: Scheduler,
        inbox: Receiver<Job>,
        status: Arc<Status>,
    ) -> Self {
        let sequences = BTreeMap::new();
        Self {
            decoder,
            adapters,
            kv,
            scheduler,
            sequences,
            next_id: 0,
            inbox,
            status,
        }
    }

    /// Works until the engine is dropped and nothing is left to do.
    pub(super) fn run(mut self) {
        loop {
            if self.sequences.is_empty() {
                match self.inbox.recv() {
                    Ok(job) => self.admit(job),
                    Err(_) => break,
                }
            }
            self.turn();
        }
    }

    /// Forgets what has gone, admits what has come, and computes one step.
    fn turn(&mut self) {
        // In this order a client that drops one request and sends another finds its place free.
        let jobs: Vec<Job> = self.inbox.try_iter().collect();
        self.drop_cancelled();
        jobs.into_iter().for_each(|job| self.admit(job));
        self.step();
        self.status.publish(&self.scheduler);
    }

    fn admit(&mut self, job: Job) {
        if job.events.is_closed() {
            return;
        }
        let id = self.next_id;
        self.next_id += 1;
        let prompt_tokens = job.request.prompt_ids.len() as u32;
        let admitted = self
            .scheduler
            .admit(id, prompt_tokens, job.request.max_tokens);
        if admitted.is_ok() {
            let sequence = Sequence {
                tokens: job.request.prompt_ids.clone(),
                prompt_logprobs: Vec::new(),
                request: job.request,
                adapter: job.adapter,
                events: job.events,
            };
            self.sequences.insert(id, sequence);
        }
        self.status.publish(&self.scheduler);
        // Nobody listens if the client has just gone; the next sweep finds that out.
        let _ = job.admitted.send(admitted);
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
    }

    fn step(&mut self) {
        let step = self.scheduler.schedule();
        if step.slices.is_empty() {
            return;
        }
        if let Err(error) = self.compute(&step) {
            let cause = one_line(error.as_ref());
            tracing::error!(cause, requests = step.slices.len(), "a forward pass failed");
            for slice in &step.slices {
                self.fail(slice.id, &cause);
            }
        }
    }

    fn compute(&mut self, step: &Step) -> Result<(), BoxError> {
        let (batch, rows) = self.batch(step);
        let adapters: Vec<&Adapter> = self.adapters.iter().map(Arc::as_ref).collect();
        let hidden = self
            .decoder
            .forward(&batch, &adapters, Some(&mut self.kv))?; // [N, C]
        self.scheduler.computed(step);
        for (index, rows) in rows.chunks(LOGIT_ROWS).enumerate() {
            let hidden = hidden.narrow(0, index * LOGIT_ROWS, rows.len())?;
            let logits: Tensor = self.decoder.logits(&hidden)?.to_dtype(DType::F32)?; // [N, V]
            let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
            let vocab_size = logits.len() / rows.len();
            for (&row, logits) in rows.iter().zip(logits.chunks_exact(vocab_size)) {
                self.use_row(row, logits);
            }
        }
        for slice in step.slices.iter().filter(|slice| slice.is_last) {
            self.finish_prompt_only(slice.id);
        }
        Ok(())
    }

    /// The slices as the decoder wants them, and what each row of logits is for.
    fn batch(&self, step: &Step) -> (Batch, Vec<Row>) {
        let mut batch = Batch::default();
        let mut rows = Vec::new();
        let mut tables = Vec::with_capacity(step.slices.len());
        for slice in &step.slices {
            let sequence = &self.sequences[&slice.id];
            let end = (slice.start + slice.len) as usize;
            let first = batch
                .push(&sequence.tokens[slice.start as usize..end], slice.start)
                .start;
            tables.push(self.scheduler.block_table(slice.id).to_vec());
            batch.adapters.push(sequence.adapter);
            for (position, row) in sequence.rows(slice) {
                batch.logit_rows.push(first + position - slice.start);
                rows.push(row);
            }
        }
        let block_size = self.kv.block_size();
        batch.kv = Some(BlockTables { block_size, tables });
        (batch, rows)
    }

    fn use_row(&mut self, row: Row, logits: &[f32]) {
        match row {
            Row::Prompt(id, position) => {
                if let Some(sequence) = self.sequences.get_mut(&id) {
                    sequence.note_prompt(position, logits);
                }
            }
            Row::Next(id) => self.choose(id, logits),
        }
    }

    fn choose(&mut self, id: SequenceId, logits: &[f32]) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        sequence.tell_prompt();
        let Some(token) = sampler::sample(logits, &sequence.request.sampling, sequence.past())
        else {
            return self.fail(id, "the model gave no finite logit");
        };
        let is_stop = sequence.request.stop_token_ids.contains(&token);
        let top = sequence.request.logprobs;
        let logprobs = top.map(|top| sampler::token_logprobs(logits, token, top));
        sequence.tokens.push(token);
        if is_stop {
            return self.finish(id, FinishReason::Stop);
        }
        sequence.tell(Ok(TokenEvent::Token {
            id: token,
            logprobs,
        }));
        if sequence.generated().len() == sequence.request.max_tokens as usize {
            return self.finish(id, FinishReason::Length);
        }
        self.scheduler.appended(id);
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
        if let Some(sequence) = self.sequences.get(&id) {
            sequence.tell(Ok(TokenEvent::Finished {
                reason,
                usage: sequence.usage(),
            }));
        }
        self.forget(id);
    }

    fn fail(&mut self, id: SequenceId, cause: &str) {
        if let Some(sequence) = self.sequences.get(&id) {
            sequence.tell(Err(Error::Step {
                source: cause.into(),
            }));
        }
        self.forget(id);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.status.stopped();
    }
}

impl Sequence {
    fn prompt_len(&self) -> usize {
        self.request.prompt_ids.len()
    }

    fn generated(&self) -> &[u32] {
        &self.tokens[self.prompt_len()..]
    }

    fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_len() as u32,
            completion_tokens: self.generated().len() as u32,
        }
    }

    fn past(&self) -> Past<'_> {
        let generated = self.generated();
        let early = generated.len() < self.request.min_tokens as usize;
        Past {
            prompt: &self.request.prompt_ids,
            generated,
            forbidden: if early {
                &self.request.stop_token_ids
            } else {
                &[]
            },
        }
    }

    /// The positions in a slice whose logits are wanted, and what for.
    fn rows(&self, slice: &Slice) -> impl Iterator<Item = (u32, Row)> {
        let id = slice.id;
        let last = slice.start + slice.len - 1;
        // The logits at a position are of the token after it. What was noted before a preemption
        // is not noted again.
        let known = (self.prompt_logprobs.len().max(1) - 1) as u32;
        let wanted = self.request.prompt_logprobs.is_some();
        let end = if wanted {
            (last + 1).min(self.prompt_len() as u32 - 1)
        } else {
            0
        };
        let prompt = slice.start.max(known)..end;
        let prompt = prompt.map(move |at| (at, Row::Prompt(id, at as usize + 1)));
        let next = slice.is_last && self.request.max_tokens > 0;
        prompt.chain(next.then_some((last, Row::Next(id))))
    }

    fn note_prompt(&mut self, position: usize, logits: &[f32]) {
        if self.prompt_logprobs.is_empty() {
            self.prompt_logprobs.push(None);
        }
        let top = self.request.prompt_logprobs.unwrap_or(0);
        let logprobs = sampler::token_logprobs(logits, self.tokens[position], top);
        self.prompt_logprobs.push(Some(logprobs));
    }

    /// Sends the prompt's log-probabilities before the first token.
    fn tell_prompt(&mut self) {
        if self.request.prompt_logprobs.take().is_some() {
            let mut logprobs = std::mem::take(&mut self.prompt_logprobs);
            if logprobs.is_empty() {
                logprobs.push(None); // A prompt of one token.
            }
            self.tell(Ok(TokenEvent::Prompt(logprobs)));
        }
    }

    /// A client that has gone is found by the next sweep.
    fn tell(&self, event: Result<TokenEvent>) {
        let _ = self.events.send(event);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::served_parts;
    use super::*;

    /// Not "soon": the first step after a client has gone has none of its tokens, and its blocks
    /// are free, whether it was decoding, in the middle of its prompt, or still waiting.
    #[test]
    fn a_cancelled_request_is_gone_within_one_step() {
        let (mut worker, inbox) = served_parts();
        let mut clients = Vec::new();
        let mut ask = |prompt_tokens: u32| {
            let (events, received) = mpsc::unbounded_channel();
            let (admitted, _) = oneshot::channel();
            let request = GenerateRequest::greedy("tiny", (0..prompt_tokens).collect(), 50);
            inbox
                .send(Job {
                    request,
                    adapter: None,
                    events,
                    admitted,
                })
                .expect("it listens");
            clients.push(received);
        };
        ask(5);
        ask(100);
        ask(5);
        worker.turn();
        let progress = (
            worker.scheduler.num_running(),
            worker.scheduler.num_waiting(),
        );
        assert_eq!(
            progress,
            (2, 1),
            "one decodes, one has half its prompt, one waits"
        );
        clients.clear();
        worker.turn();
        let (free, all) = worker.scheduler.block_usage();
        assert_eq!((free, worker.sequences.len()), (all, 0));
        assert_eq!(worker.status.get().kv_cache_usage, 0.0);
    }
}
