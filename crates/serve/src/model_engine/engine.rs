//! The handle on an engine's thread.

use std::sync::{Arc, mpsc};

use async_trait::async_trait;
use candle_core::Device;
use futures::{StreamExt, stream};
use tokio::sync::{mpsc as events, oneshot};
use updraft_chat::Chat;
use updraft_model::KvPages;

use super::options::{CachePlan, EngineOptions};
use super::served::ServedModel;
use super::status::Status;
use super::worker::{Job, Worker};
use crate::engine::{
    Engine, EngineStats, GenerateRequest, ModelInfo, TokenEvent, TokenStream, check_request,
};
use crate::error::{Error, Result};
use crate::scheduler::Scheduler;

/// Batches requests to one decoder, with any number of LoRA adapters over it.
///
/// Requests to the base and to different adapters share each forward pass. Greedy and seeded
/// answers depend neither on the company in the batch nor on how a prompt was cut.
///
/// The thread ends when the engine is dropped and the requests under way are done.
#[derive(Debug)]
pub struct ModelEngine {
    models: Vec<ModelInfo>,
    chat: Arc<Chat>,
    vocab_size: usize,
    max_model_len: u32,
    inbox: mpsc::Sender<Job>,
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
        let ServedModel { name, root, .. } = &model;
        let config = model.decoder.config();
        let (vocab_size, dtype) = (config.vocab_size, model.decoder.dtype());
        let CachePlan {
            max_model_len,
            num_blocks,
        } = options.plan_cache(config, dtype)?;
        let scheduler = Scheduler::new(options.scheduler(num_blocks))?;
        let (num_pages, page_size) = (num_blocks as usize, options.block_size as usize);
        let kv = KvPages::new(config, num_pages, page_size, dtype, &Device::Cpu);
        let kv = kv.map_err(|source| Error::Load {
            model: root.clone(),
            source: source.into(),
        })?;

        let status = Arc::new(Status::new(name));
        let models = model.infos(max_model_len);
        let adapters = model
            .adapters
            .into_iter()
            .map(|served| served.adapter)
            .collect();
        let (inbox, jobs) = mpsc::channel();
        let worker = Worker::new(model.decoder, adapters, kv, scheduler, jobs, status.clone());
        std::thread::Builder::new()
            .name("updraft-engine".into())
            .spawn(|| worker.run())
            .map_err(|source| Error::Load {
                model: model.root,
                source: source.into(),
            })?;
        let chat = Arc::new(model.chat);
        Ok(Self {
            models,
            chat,
            vocab_size,
            max_model_len,
            inbox,
            status,
        })
    }
}

#[async_trait]
impl Engine for ModelEngine {
    fn models(&self) -> Vec<ModelInfo> {
        self.models.clone()
    }

    fn chat(&self, model: &str) -> Option<Arc<Chat>> {
        self.models
            .iter()
            .any(|info| info.id == model)
            .then(|| self.chat.clone())
    }

    async fn generate(&self, request: GenerateRequest) -> Result<TokenStream> {
        const STOPPED: Error = Error::Unavailable {
            reason: "the engine has stopped",
        };
        let Some(index) = self.models.iter().position(|info| info.id == request.model) else {
            return Err(Error::ModelNotFound {
                model: request.model,
            });
        };
        check_request(&request, self.vocab_size, self.max_model_len)?;
        let (events, received) = events::unbounded_channel();
        let (admitted, reply) = oneshot::channel();
        // The base is the first model; adapters follow in their own order.
        let job = Job {
            adapter: index.checked_sub(1),
            request,
            events,
            admitted,
        };
        self.inbox.send(job).map_err(|_| STOPPED)?;
        reply.await.map_err(|_| STOPPED)??;
        Ok(stream::unfold(Some(received), |received| async {
            let mut received = received?;
            match received.recv().await {
                Some(Ok(event @ TokenEvent::Finished { .. })) => Some((Ok(event), None)),
                Some(Ok(event)) => Some((Ok(event), Some(received))),
                Some(Err(error)) => Some((Err(error), None)),
                None => Some((Err(STOPPED), None)),
            }
        })
        .boxed())
    }

    fn stats(&self) -> Vec<EngineStats> {
        vec![self.status.get()]
    }
}
