//! The handle on an engine's thread.

use std::sync::{Arc, mpsc};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use tokio::sync::{mpsc as events, oneshot};
use updraft_chat::Chat;
use updraft_model::ModelConfig;

use super::grammar::Grammars;
use super::load::{AdapterSource, load_adapter};
use super::options::{CachePlan, EngineOptions};
use super::registry::Registry;
use super::served::ServedModel;
use super::status::Status;
use super::worker::{Arrival, Job, Worker};
use crate::engine::{
    Adapters, Engine, EngineStats, Existing, GenerateRequest, ModelInfo, TokenEvent, TokenStream,
    longest_token_bytes,
};
use crate::error::{Error, Result};
use crate::limits::check_request;
use crate::scheduler::Scheduler;

/// Batches requests to one decoder, with any number of LoRA adapters over it.
///
/// Requests to the base and to different adapters share each forward pass. On the CPU greedy and
/// seeded answers depend neither on the company in the batch, nor on how a prompt was cut, nor on
/// what of it was in the cache; on a GPU they may differ by rounding.
///
/// The thread ends when the engine is dropped and the requests under way are done.
#[derive(Debug)]
pub struct ModelEngine {
    pub(super) registry: Registry,
    config: ModelConfig,
    grammars: Grammars,
    chat: Arc<Chat>,
    max_model_len: u32,
    inbox: mpsc::Sender<Arrival>,
    status: Arc<Status>,
}

impl ModelEngine {
    /// Starts the engine's thread.
    ///
    /// # Errors
    /// [`Error::Options`] if the options contradict each other or the model, [`Error::Load`] if
    /// an adapter is for another model or the cache cannot be had.
    pub fn new(model: ServedModel, options: &EngineOptions) -> Result<Self> {
        model.validate()?;
        let config = model.decoder.config().clone();
        let adapters = model.adapters.iter();
        let adapter_numbers = adapters.map(|served| served.adapter.num_parameters() as u64);
        let adapter_numbers = adapter_numbers.sum();
        let CachePlan {
            max_model_len,
            num_blocks,
        } = options.plan_cache(&model.decoder, adapter_numbers)?;
        let scheduler = Scheduler::new(options.scheduler(num_blocks))?;
        let failed = |source| Error::Load {
            model: model.root.clone(),
            source,
        };
        let status = Arc::new(Status::new(&model.name));
        let (inbox, jobs) = mpsc::channel();
        let base = ModelInfo {
            id: model.name,
            root: model.root.clone(),
            parent: None,
            max_model_len,
            sampling: model.sampling,
            text_prefix: model.text_prefix,
            longest_token_bytes: longest_token_bytes(&model.chat),
        };
        let registry = Registry::new(base, model.adapters);
        let worker = Worker::new(model.decoder, scheduler, options, jobs, status.clone());
        let worker = worker.map_err(|source| failed(source.into()))?;
        std::thread::Builder::new()
            .name("updraft-engine".into())
            .spawn(|| worker.run())
            .map_err(|source| failed(source.into()))?;
        let grammars = Grammars::new(&model.chat, config.vocab_size);
        Ok(Self {
            registry,
            grammars,
            config,
            chat: Arc::new(model.chat),
            max_model_len,
            inbox,
            status,
        })
    }
}

const STOPPED: Error = Error::Unavailable {
    reason: "the engine has stopped",
};

/// What comes until the end or an error.
fn stream_of(received: events::UnboundedReceiver<Result<TokenEvent>>) -> TokenStream {
    stream::unfold(Some(received), |received| async {
        let mut received = received?;
        match received.recv().await {
            Some(Ok(event @ TokenEvent::Finished { .. })) => Some((Ok(event), None)),
            Some(Ok(event)) => Some((Ok(event), Some(received))),
            Some(Err(error)) => Some((Err(error), None)),
            None => Some((Err(STOPPED), None)),
        }
    })
    .boxed()
}

#[async_trait]
impl Engine for ModelEngine {
    fn models(&self) -> Vec<ModelInfo> {
        self.registry.infos()
    }

    fn chat(&self, model: &str) -> Option<Arc<Chat>> {
        self.registry.find(model).ok().map(|_| self.chat.clone())
    }

    async fn generate(&self, request: GenerateRequest) -> Result<TokenStream> {
        let streams = self.generate_all(vec![request]).await?;
        streams.into_iter().next().ok_or(STOPPED)
    }

    async fn generate_all(&self, requests: Vec<GenerateRequest>) -> Result<Vec<TokenStream>> {
        let mut jobs: Vec<Job> = Vec::with_capacity(requests.len());
        let mut streams = Vec::with_capacity(requests.len());
        for request in requests {
            let adapter = self.registry.find(&request.model)?;
            check_request(&request, self.config.vocab_size, self.max_model_len)?;
            // Choices of one request have one form, which is compiled once.
            let last = jobs
                .last()
                .filter(|last| last.request.constraint == request.constraint);
            let grammar = match (&request.constraint, last.map(|last| last.grammar.clone())) {
                (None, _) => None,
                (Some(_), Some(grammar)) => grammar,
                (Some(asked), None) => Some(self.grammars.compile(asked.clone()).await?),
            };
            let (events, received) = events::unbounded_channel();
            jobs.push(Job {
                adapter,
                grammar,
                request,
                events,
            });
            streams.push(stream_of(received));
        }
        let (admitted, reply) = oneshot::channel();
        let arrival = Arrival { jobs, admitted };
        self.inbox.send(arrival).map_err(|_| STOPPED)?;
        reply.await.map_err(|_| STOPPED)??;
        Ok(streams)
    }

    fn stats(&self) -> Vec<EngineStats> {
        vec![self.status.get()]
    }

    fn adapters(&self) -> Option<&dyn Adapters> {
        Some(self)
    }
}

#[async_trait]
impl Adapters for ModelEngine {
    async fn load_adapter(&self, source: &AdapterSource, existing: Existing) -> Result<()> {
        self.registry.check(&source.name, existing)?;
        let served = load_adapter(source, &self.config).await?;
        served.check(&self.config)?;
        self.registry.add(served, existing)
    }

    fn unload_adapter(&self, name: &str) -> Result<()> {
        self.registry.remove(name)
    }
}
