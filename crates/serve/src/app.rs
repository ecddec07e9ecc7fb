//! What every handler shares.

use std::hash::{BuildHasher, RandomState};
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use updraft_chat::Chat;

use crate::api::responses::kept::Kept;
use crate::auth::ApiKeys;
use crate::clock::Clock;
use crate::engine::{Engine, ModelInfo};
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::rng;

/// How the HTTP side behaves.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Who may ask; everybody by default.
    pub api_keys: ApiKeys,
    /// The largest request body; a longer one is a 413.
    pub max_body_bytes: usize,
    /// The bytes that all bodies being read and understood may take together; a request whose body
    /// does not fit beside the others is a 429. One of `max_body_bytes` always fits alone.
    pub max_bytes_in_flight: usize,
    /// The most completions of one request: its prompts times `n`.
    pub max_choices: usize,
    /// The longest a completion may take from its arrival; what is longer ends with an error, a
    /// 504 if nothing was sent yet.
    pub request_timeout: Option<Duration>,
    /// The longest a client may take to send a request's head, and again its body.
    pub read_timeout: Duration,
    /// The longest a client may take no byte of what is sent to it; then it is gone.
    pub write_timeout: Duration,
    /// The largest head of a request: method, path and headers; a larger one is a 431.
    pub max_header_bytes: usize,
    /// Whether clients may load and unload adapters, from any folder or store this process can
    /// read.
    pub runtime_adapters: bool,
    /// Responses kept for whoever asked for them, to be fetched and answered on; the oldest make
    /// room. 0 keeps none.
    pub max_kept_responses: usize,
    /// Web pages of these origins may ask; `*` is any.
    pub allowed_origins: Vec<String>,
    /// Serve HTTPS with this certificate; plain HTTP without.
    #[cfg(feature = "tls")]
    pub tls: Option<crate::tls::Tls>,
    /// How long requests under way may take to end once shutdown begins.
    pub drain_timeout: Duration,
    /// The time in answers.
    pub clock: Clock,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            api_keys: ApiKeys::default(),
            max_body_bytes: 32 << 20,
            max_bytes_in_flight: 256 << 20,
            max_choices: 128,
            request_timeout: None,
            read_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(60),
            max_header_bytes: 64 << 10,
            runtime_adapters: false,
            max_kept_responses: 256,
            allowed_origins: Vec::new(),
            #[cfg(feature = "tls")]
            tls: None,
            drain_timeout: Duration::from_secs(30),
            clock: Clock::system(),
        }
    }
}

/// Where the server is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Takes requests.
    Ready,
    /// Ends what it began, and refuses more.
    Draining,
    /// Ends everything now.
    Stopping,
}

/// The shared state; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct App(Arc<Shared>);

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) options: ServeOptions,
    pub(crate) metrics: Metrics,
    pub(crate) started: u64,
    pub(crate) kept: Kept,
    pub(crate) background: Background,
    /// A permit for each byte of a body.
    pub(crate) bodies: Arc<Semaphore>,
    /// A permit for each processor.
    encoders: Arc<Semaphore>,
    phase: watch::Sender<Phase>,
    ids: Ids,
}

impl Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl App {
    pub(crate) fn new(engine: Arc<dyn Engine>, options: ServeOptions) -> Self {
        let room = options.max_bytes_in_flight.max(options.max_body_bytes);
        let room = room.min(Semaphore::MAX_PERMITS);
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self(Arc::new(Shared {
            engine,
            started: options.clock.unix_seconds(),
            kept: Kept::new(options.max_kept_responses),
            options,
            metrics: Metrics::default(),
            background: Background::default(),
            bodies: Arc::new(Semaphore::new(room)),
            encoders: Arc::new(Semaphore::new(processors)),
            phase: watch::Sender::new(Phase::Ready),
            ids: Ids::default(),
        }))
    }
}

impl Shared {
    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// Ends once the server is this far in its life.
    pub(crate) fn entered(&self, least: Phase) -> impl Future<Output = ()> + Send + 'static {
        let mut phase = self.phase.subscribe();
        async move {
            // An error means that the server is gone, which is as good.
            let _ = phase.wait_for(|phase| *phase >= least).await;
        }
    }

    /// Refuses new work once the server drains.
    pub(crate) fn check_ready(&self) -> Result<()> {
        match self.phase() {
            Phase::Ready => Ok(()),
            Phase::Draining | Phase::Stopping => Err(Error::Unavailable {
                reason: "the server is shutting down",
            }),
        }
    }

    /// An identifier nobody else has, such as `chatcmpl-…`.
    pub(crate) fn id(&self, prefix: &str) -> String {
        let (high, low) = self.ids.next();
        format!("{prefix}{high:016x}{low:08x}")
    }

    /// A seed for a request that brings none.
    pub(crate) fn seed(&self) -> u64 {
        let (high, low) = self.ids.next();
        rng::mix(high ^ rng::mix(low))
    }

    /// Tokenizes, or does what else takes a processor for a while, on a thread that may. Not more
    /// of it runs at once than there are processors, and whoever goes while waiting costs nothing.
    pub(crate) async fn encode<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let place = self.encoders.clone().acquire_owned().await;
        let place = place.expect("this semaphore is never closed");
        let done = tokio::task::spawn_blocking(move || {
            let _held_until_done = place;
            work()
        });
        done.await.map_err(|panic| Error::Step {
            source: panic.into(),
        })?
    }

    /// The template and tokenizer of a model.
    pub(crate) fn chat(&self, model: &str) -> Result<Arc<Chat>> {
        self.engine.chat(model).ok_or_else(|| Error::ModelNotFound {
            model: model.to_owned(),
        })
    }

    /// What is known of a model.
    pub(crate) fn info(&self, model: &str) -> Result<ModelInfo> {
        let mut models = self.engine.models().into_iter();
        models
            .find(|info| info.id == model)
            .ok_or_else(|| Error::ModelNotFound {
                model: model.to_owned(),
            })
    }

    /// Bounds the completions of one request before any is begun.
    pub(crate) fn check_choices(&self, num_prompts: usize, num_choices: u32) -> Result<()> {
        let limit = self.options.max_choices;
        if num_prompts.saturating_mul(num_choices as usize) <= limit {
            return Ok(());
        }
        let message = format!("at most {limit} completions (prompts times n) are possible at once");
        Err(Error::invalid("n", message))
    }

    /// The requested model's id, or the first model's if none is named.
    pub(crate) fn model_or_default(&self, model: Option<String>) -> Result<String> {
        match model.filter(|model| !model.is_empty()) {
            Some(model) => Ok(model),
            None => match self.engine.models().into_iter().next() {
                Some(first) => Ok(first.id),
                None => Err(Error::Unavailable {
                    reason: "no model is loaded",
                }),
            },
        }
    }
}

/// Work that goes on by itself, counted.
#[derive(Debug, Default)]
pub(crate) struct Background(Arc<watch::Sender<usize>>);

/// Some of it, until this is dropped.
#[derive(Debug)]
pub(crate) struct Task(Arc<watch::Sender<usize>>);

impl Background {
    pub(crate) fn begin(&self) -> Task {
        self.0.send_modify(|count| *count += 1);
        Task(self.0.clone())
    }

    /// Waits until there is none.
    pub(crate) async fn ended(&self) {
        // An error would mean that the counter is gone, which this holds.
        let _ = self.0.subscribe().wait_for(|count| *count == 0).await;
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// A counter, and its image under a key drawn once per server from the operating system: nobody
/// can tell one id from another.
#[derive(Debug, Default)]
struct Ids {
    key: RandomState,
    next: AtomicU64,
}

impl Ids {
    fn next(&self) -> (u64, u64) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        (self.key.hash_one(number), number)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::EchoEngine;

    /// Whoever goes while others tokenize has cost nothing.
    #[tokio::test]
    async fn work_of_clients_that_went_is_not_done() {
        let engine = Arc::new(EchoEngine::new(["echo"]));
        let app = App::new(engine, ServeOptions::default());
        let places = app.encoders.available_permits();
        let (done, dones) = mpsc::channel();
        let mut held = Vec::new();
        let mut busy = Vec::new();
        for _ in 0..places {
            let (release, released) = mpsc::channel::<()>();
            held.push(release);
            let (app, done) = (app.clone(), done.clone());
            busy.push(tokio::spawn(async move {
                app.encode(move || {
                    let _ = released.recv();
                    done.send("held").map_err(|_| Error::Timeout)
                })
                .await
            }));
        }
        while app.encoders.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        for _ in 0..50 {
            let done = done.clone();
            let work = app.encode(move || done.send("gone").map_err(|_| Error::Timeout));
            assert!(
                futures::FutureExt::now_or_never(work).is_none(),
                "there is no place"
            );
        }
        drop(held);
        for task in busy {
            task.await.expect("no panic").expect("it is told");
        }
        let next = app.encode(|| Ok(7)).await;
        assert_eq!(next.expect("the places are free"), 7);
        drop(done);
        assert!(dones.iter().all(|what| what == "held"));
    }
}
