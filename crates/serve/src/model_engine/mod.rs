//! The engine behind a real server: one decoder and its adapters on a thread of their own.

mod load;
mod source;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;

use async_trait::async_trait;
use futures::{StreamExt, stream};
use tokio::sync::{mpsc as events, oneshot};
use updraft_chat::Chat;
use updraft_model::{Adapter, Decoder, KvPages};

use crate::engine::{
    Engine, EngineStats, GenerateRequest, ModelInfo, TokenEvent, TokenStream, check_request,
};
use crate::error::{Error, Result};
use crate::scheduler::{Scheduler, SchedulerConfig};
use worker::{Job, Worker};

pub use load::AdapterSource;
pub use source::ModelSource;

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

/// A model ready to be served.
#[derive(Debug)]
pub struct ServedModel {
    /// The id in requests.
    pub name: String,
    /// Where it came from.
    pub root: String,
    /// The weights.
    pub decoder: Decoder,
    /// The template and tokenizer.
    pub chat: Chat,
    /// The adapters over it.
    pub adapters: Vec<ServedAdapter>,
}

/// A LoRA adapter ready to be served.
#[derive(Debug)]
pub struct ServedAdapter {
    /// The id in requests.
    pub name: String,
    /// Where it came from.
    pub root: String,
    /// The low-rank update.
    pub adapter: Arc<Adapter>,
}

/// What an engine may spend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineOptions {
    /// The longest prompt and completion together. `None`: what the model was made for, or what
    /// the cache holds if that is less.
    pub max_model_len: Option<u32>,
    /// Memory for keys and values: more holds more and longer requests at once.
    pub kv_cache_bytes: u64,
    /// Tokens per block of it.
    pub block_size: u32,
    /// As [`SchedulerConfig::max_num_seqs`].
    pub max_num_seqs: usize,
    /// As [`SchedulerConfig::max_num_batched_tokens`].
    pub max_num_batched_tokens: u32,
    /// As [`SchedulerConfig::max_queued_requests`].
    pub max_queued_requests: usize,
    /// As [`SchedulerConfig::max_queued_tokens`].
    pub max_queued_tokens: u64,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            max_model_len: None,
            kv_cache_bytes: 512 << 20,
            block_size: 16,
            max_num_seqs: 64,
            max_num_batched_tokens: 512,
            max_queued_requests: 256,
            max_queued_tokens: 1 << 18,
        }
    }
}

impl ModelEngine {
    /// Starts the engine's thread.
    ///
    /// # Errors
    /// [`Error::Options`] if the options contradict each other or the model, [`Error::Load`] if
    /// the cache cannot be had.
    pub fn new(model: ServedModel, options: &EngineOptions) -> Result<Self> {
        let config = model.decoder.config().clone();
        let dtype = model.decoder.dtype();
        let (max_model_len, num_blocks) = plan_cache(&model, options)?;
        let scheduler = Scheduler::new(SchedulerConfig {
            max_num_seqs: options.max_num_seqs,
            max_num_batched_tokens: options.max_num_batched_tokens,
            num_blocks,
            block_size: options.block_size,
            max_queued_requests: options.max_queued_requests,
            max_queued_tokens: options.max_queued_tokens,
        })?;
        let refuse = |source: updraft_model::Error| Error::Load {
            model: model.root.clone(),
            source: source.into(),
        };
        for served in &model.adapters {
            served
                .adapter
                .check(&config)
                .map_err(|source| Error::Load {
                    model: served.root.clone(),
                    source: source.into(),
                })?;
        }
        let device = candle_core::Device::Cpu;
        let (num_pages, page_size) = (num_blocks as usize, options.block_size as usize);
        let kv = KvPages::new(&config, num_pages, page_size, dtype, &device).map_err(refuse)?;

        let adapters = model
            .adapters
            .iter()
            .map(|served| served.adapter.clone())
            .collect();
        let status = Arc::new(Status::default());
        let (inbox, jobs) = mpsc::channel();
        let models = model_infos(&model, max_model_len);
        let worker = Worker::new(model.decoder, adapters, kv, scheduler, jobs, status.clone());
        std::thread::Builder::new()
            .name("updraft-engine".into())
            .spawn(|| worker.run())
            .map_err(|source| Error::Load {
                model: model.root,
                source: source.into(),
            })?;
        Ok(Self {
            models,
            chat: Arc::new(model.chat),
            vocab_size: config.vocab_size,
            max_model_len,
            inbox,
            status,
        })
    }
}

/// The context and the number of blocks that model and options allow.
fn plan_cache(model: &ServedModel, options: &EngineOptions) -> Result<(u32, u32)> {
    let config = model.decoder.config();
    if options.block_size == 0 {
        return Err(Error::Options("block_size must be at least 1".into()));
    }
    let made_for = u32::try_from(config.max_len()).unwrap_or(u32::MAX);
    let block_size = options.block_size as usize;
    let block_bytes = KvPages::bytes_per_block(config, block_size, model.decoder.dtype());
    let affordable = u32::try_from(options.kv_cache_bytes / block_bytes).unwrap_or(u32::MAX);
    let held = affordable.saturating_mul(options.block_size);
    let max_model_len = match options.max_model_len {
        Some(asked) if asked > made_for => {
            let message = format!("max_model_len {asked} is more than the model's {made_for}");
            return Err(Error::Options(message));
        }
        Some(asked) if asked > held => {
            let needed = u64::from(asked.div_ceil(options.block_size)) * block_bytes;
            return Err(Error::Options(format!(
                "max_model_len {asked} needs {needed} bytes of KV cache; raise kv_cache_bytes or \
                 lower max_model_len"
            )));
        }
        Some(asked) => asked,
        None => made_for.min(held),
    };
    if max_model_len == 0 {
        let message = format!("kv_cache_bytes must be at least {block_bytes}, one block");
        return Err(Error::Options(message));
    }
    // More than every sequence at full length would never be used.
    let whole = u64::from(max_model_len.div_ceil(options.block_size));
    let useful = whole.saturating_mul(options.max_num_seqs as u64);
    Ok((
        max_model_len,
        affordable.min(u32::try_from(useful).unwrap_or(u32::MAX)),
    ))
}

fn model_infos(model: &ServedModel, max_model_len: u32) -> Vec<ModelInfo> {
    let base = ModelInfo {
        id: model.name.clone(),
        root: model.root.clone(),
        parent: None,
        max_model_len,
    };
    let adapters = model.adapters.iter().map(|served| ModelInfo {
        id: served.name.clone(),
        root: served.root.clone(),
        parent: Some(model.name.clone()),
        max_model_len,
    });
    std::iter::once(base).chain(adapters).collect()
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
        vec![EngineStats {
            model: self.models[0].id.clone(),
            alive: self.status.alive.load(Ordering::Relaxed),
            running: self.status.running.load(Ordering::Relaxed),
            waiting: self.status.waiting.load(Ordering::Relaxed),
            kv_cache_usage: self.status.kv_cache_usage(),
            preemptions: self.status.preemptions.load(Ordering::Relaxed),
        }]
    }
}

/// What the thread tells about itself, after each step.
#[derive(Debug)]
struct Status {
    alive: AtomicBool,
    running: AtomicUsize,
    waiting: AtomicUsize,
    used_blocks: AtomicUsize,
    num_blocks: AtomicUsize,
    preemptions: AtomicU64,
}

impl Default for Status {
    fn default() -> Self {
        Self {
            alive: AtomicBool::new(true),
            running: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            used_blocks: AtomicUsize::new(0),
            num_blocks: AtomicUsize::new(1),
            preemptions: AtomicU64::new(0),
        }
    }
}

impl Status {
    fn publish(&self, scheduler: &Scheduler) {
        let (free, all) = scheduler.block_usage();
        self.running
            .store(scheduler.num_running(), Ordering::Relaxed);
        self.waiting
            .store(scheduler.num_waiting(), Ordering::Relaxed);
        self.used_blocks.store(all - free, Ordering::Relaxed);
        self.num_blocks.store(all, Ordering::Relaxed);
        self.preemptions
            .store(scheduler.preemptions(), Ordering::Relaxed);
    }

    fn kv_cache_usage(&self) -> f64 {
        let used = self.used_blocks.load(Ordering::Relaxed) as f64;
        used / self.num_blocks.load(Ordering::Relaxed) as f64
    }
}

#[cfg(test)]
mod tests;
