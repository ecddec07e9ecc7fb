//! The thread that runs one request after the other.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor};
use tokio::sync::mpsc;

use super::architecture::OneSequence;
use crate::engine::{FinishReason, GenerateRequest, TokenEvent, Usage};
use crate::error::{BoxError, Error, Result};
use crate::sampler::{self, Seen};

/// A request with where its events go.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) request: GenerateRequest,
    pub(super) events: mpsc::UnboundedSender<Result<TokenEvent>>,
    pub(super) waiting: Place,
}

/// How many requests run and wait.
#[derive(Debug, Default)]
pub(super) struct Status {
    running: Arc<AtomicUsize>,
    waiting: Arc<AtomicUsize>,
}

/// One of those counted, until it is dropped.
#[derive(Debug)]
pub(super) struct Place(Arc<AtomicUsize>);

impl Place {
    /// `None` if there are as many already.
    fn take(counter: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        let taken = counter.fetch_add(1, Ordering::SeqCst);
        let place = Self(counter.clone()); // Given back if it was one too many.
        (taken < most).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Status {
    /// A place among those that wait, if fewer than `most` do.
    pub(super) fn wait(&self, most: usize) -> Option<Place> {
        Place::take(&self.waiting, most)
    }

    fn begin(&self) -> Option<Place> {
        Place::take(&self.running, usize::MAX)
    }

    /// Running and waiting.
    pub(super) fn counts(&self) -> (usize, usize) {
        let count = |counter: &AtomicUsize| counter.load(Ordering::SeqCst);
        (count(&self.running), count(&self.waiting))
    }
}

pub(super) struct Worker {
    model: Box<dyn OneSequence>,
    queue: Queue,
    status: Arc<Status>,
}

impl Worker {
    pub(super) fn new(
        model: Box<dyn OneSequence>,
        jobs: mpsc::UnboundedReceiver<Job>,
        status: Arc<Status>,
    ) -> Self {
        Self {
            model,
            queue: Queue {
                jobs,
                waiting: VecDeque::new(),
            },
            status,
        }
    }

    /// Until the engine is dropped.
    pub(super) fn run(mut self) {
        while let Some(job) = self.queue.next() {
            let Job {
                request,
                events,
                waiting,
            } = job;
            let running = self.status.begin();
            drop(waiting);
            let model = &mut *self.model;
            let queue = &mut self.queue;
            let answer = || Answer::new(model, &request, &events).run(queue);
            // A panic is the request's; the next one begins with an empty cache.
            let answered = catch_unwind(AssertUnwindSafe(answer))
                .unwrap_or_else(|_| Err("the model panicked".into()));
            drop(running); // Whoever sees the end sees an idle engine.
            let last = match answered {
                Ok(Some(finished)) => Ok(finished),
                Ok(None) => continue, // Nobody listens any more.
                Err(source) => {
                    tracing::error!(source = &*source, "a forward pass failed");
                    Err(Error::Step { source })
                }
            };
            let _ = events.send(last);
        }
    }
}

/// Requests that wait for their turn, without those whose client has gone: they would keep others
/// out while a long answer is written.
struct Queue {
    jobs: mpsc::UnboundedReceiver<Job>,
    waiting: VecDeque<Job>,
}

impl Queue {
    /// The oldest whose client is still there; waits for one. `None` once the engine is dropped.
    fn next(&mut self) -> Option<Job> {
        loop {
            self.tidy();
            if let Some(job) = self.waiting.pop_front() {
                return Some(job);
            }
            self.waiting.push_back(self.jobs.blocking_recv()?);
        }
    }

    /// Takes in who has come, and lets go who has gone.
    fn tidy(&mut self) {
        while let Ok(job) = self.jobs.try_recv() {
            self.waiting.push_back(job);
        }
        self.waiting.retain(|job| !job.events.is_closed());
    }
}

/// One request at work.
struct Answer<'a> {
    model: &'a mut dyn OneSequence,
    request: &'a GenerateRequest,
    events: &'a mpsc::UnboundedSender<Result<TokenEvent>>,
    generated: Vec<u32>,
    sampled: Seen,
    /// Tokens the model has seen.
    seen: usize,
}

impl<'a> Answer<'a> {
    fn new(
        model: &'a mut dyn OneSequence,
        request: &'a GenerateRequest,
        events: &'a mpsc::UnboundedSender<Result<TokenEvent>>,
    ) -> Self {
        Self {
            model,
            request,
            events,
            generated: Vec::new(),
            sampled: Seen::new(&request.sampling, &request.prompt_ids),
            seen: 0,
        }
    }

    /// Its last event; none if nobody listens any more.
    fn run(mut self, queue: &mut Queue) -> Result<Option<TokenEvent>, BoxError> {
        self.model.clear();
        self.tell(TokenEvent::Started { cached_tokens: 0 });
        let request = self.request;
        let mut logits = match request.prompt_logprobs {
            Some(top) => self.prompt_with_logprobs(top)?,
            None if request.max_tokens == 0 => Vec::new(),
            None => self.forward(&request.prompt_ids)?,
        };
        while self.generated.len() < request.max_tokens as usize {
            if self.events.is_closed() {
                return Ok(None);
            }
            queue.tidy();
            let past = request.past(&self.sampled, &self.generated);
            let token = sampler::sample(&logits, &request.sampling, past);
            let token = token.ok_or("the model gave no finite logit")?;
            self.generated.push(token);
            self.sampled.push(token);
            if request.stop_token_ids.contains(&token) {
                return Ok(Some(self.finished(FinishReason::Stop)));
            }
            let (top, named) = (request.logprobs, &request.logprob_ids);
            self.tell(TokenEvent::Token {
                id: token,
                logprobs: top.map(|top| sampler::token_logprobs(&logits, token, top, named)),
            });
            if self.generated.len() < request.max_tokens as usize {
                logits = self.forward(&[token])?;
            }
        }
        Ok(Some(self.finished(FinishReason::Length)))
    }

    /// Feeds the prompt one token at a time, because the logits of the last are all there is.
    fn prompt_with_logprobs(&mut self, top: u32) -> Result<Vec<f32>, BoxError> {
        let (mut all, mut logits) = (vec![None], Vec::new());
        for (position, &id) in self.request.prompt_ids.iter().enumerate() {
            if position > 0 {
                all.push(Some(sampler::token_logprobs(&logits, id, top, &[])));
            }
            logits = self.forward(&[id])?;
        }
        self.tell(TokenEvent::Prompt(all));
        Ok(logits)
    }

    /// The logits after the last of these tokens, `[V]`.
    fn forward(&mut self, ids: &[u32]) -> Result<Vec<f32>, BoxError> {
        let input = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
        let logits = self.model.forward(&input, self.seen)?;
        self.seen += ids.len();
        Ok(logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }

    fn finished(&self, reason: FinishReason) -> TokenEvent {
        TokenEvent::Finished {
            reason,
            usage: Usage {
                prompt_tokens: self.request.prompt_ids.len() as u32,
                cached_tokens: 0,
                completion_tokens: self.generated.len() as u32,
            },
        }
    }

    /// Whether somebody listens is asked before the next token.
    fn tell(&self, event: TokenEvent) {
        let _ = self.events.send(Ok(event));
    }
}
