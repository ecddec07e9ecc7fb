//! The handle on the thread that runs one request after the other.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::{StreamExt, stream};
use tokio::sync::mpsc;
use updraft_chat::Chat;

use super::load::{Loaded, load_chat, load_conventions, load_model};
use super::worker::{Job, Status, Worker};
use crate::engine::{
    Engine, EngineStats, GenerateRequest, ModelInfo, TokenStream, longest_token_bytes,
};
use crate::error::{Error, Result};
use crate::limits::check_request;

/// Requests that may wait; one more is refused.
const MAX_WAITING: usize = 64;

/// Runs a model that [`ModelEngine`](crate::ModelEngine) does not cover, one request at a time, in
/// f32; see [`CANDLE_ARCHITECTURES`](crate::CANDLE_ARCHITECTURES).
///
/// It neither batches nor pages, shares no prefixes, and knows no adapters, embeddings or
/// constrained answers; everything else is as any [`Engine`] does it. The log-probabilities of a
/// prompt are computed token by token.
#[derive(Debug)]
pub struct CandleEngine {
    info: ModelInfo,
    chat: Arc<Chat>,
    vocab_size: usize,
    inbox: mpsc::UnboundedSender<Job>,
    status: Arc<Status>,
}

impl CandleEngine {
    /// Loads a model folder as transformers writes it and starts serving it as `name`.
    ///
    /// # Errors
    /// [`Error::Read`] for a file that cannot be read, [`Error::Load`] for an architecture or
    /// setting that is not supported and for weights that do not belong to it.
    pub async fn load(name: impl Into<String>, folder: &Path) -> Result<Self> {
        let (name, folder) = (name.into(), folder.to_owned());
        let load = move || Self::with_chat(name, &folder, load_chat(&folder)?);
        match tokio::task::spawn_blocking(load).await {
            Ok(loaded) => loaded,
            Err(panic) => Err(Error::Step {
                source: panic.into(),
            }),
        }
    }

    /// As [`load`](Self::load), with a tokenizer and template of the caller's.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn with_chat(name: impl Into<String>, folder: &Path, chat: Chat) -> Result<Self> {
        let Loaded { model, settings } = load_model(folder)?;
        let status = Arc::new(Status::default());
        let (sampling, text_prefix) = load_conventions(folder)?;
        let (inbox, jobs) = mpsc::unbounded_channel();
        let root = folder.display().to_string();
        let worker = Worker::new(model, jobs, status.clone());
        std::thread::Builder::new()
            .name("updraft-candle".into())
            .spawn(|| worker.run())
            .map_err(|source| Error::Load {
                model: root.clone(),
                source: source.into(),
            })?;
        Ok(Self {
            info: ModelInfo {
                id: name.into(),
                root,
                parent: None,
                max_model_len: settings.max_len,
                sampling,
                text_prefix,
                longest_token_bytes: longest_token_bytes(&chat),
            },
            chat: Arc::new(chat),
            vocab_size: settings.vocab_size,
            inbox,
            status,
        })
    }
}

#[async_trait]
impl Engine for CandleEngine {
    fn models(&self) -> Vec<ModelInfo> {
        vec![self.info.clone()]
    }

    fn chat(&self, model: &str) -> Option<Arc<Chat>> {
        (model == self.info.id).then(|| self.chat.clone())
    }

    async fn generate(&self, request: GenerateRequest) -> Result<TokenStream> {
        if request.model != self.info.id {
            return Err(Error::ModelNotFound {
                model: request.model,
            });
        }
        check_request(&request, self.vocab_size, self.info.max_model_len)?;
        if request.constraint.is_some() {
            let message = "this model's engine cannot hold an answer to a form";
            return Err(Error::invalid("response_format", message));
        }
        if request.embed {
            let message = "this model's engine does not hand out hidden states";
            return Err(Error::invalid("model", message));
        }
        let (events, mut received) = mpsc::unbounded_channel();
        let waiting = self.status.wait(MAX_WAITING).ok_or(Error::Overloaded {
            retry_after: Duration::from_secs(1),
        })?;
        let job = Job {
            request,
            events,
            waiting,
        };
        self.inbox.send(job).map_err(|_| Error::Unavailable {
            reason: "the engine has stopped",
        })?;
        Ok(stream::poll_fn(move |context| received.poll_recv(context)).boxed())
    }

    fn stats(&self) -> Vec<EngineStats> {
        let (running, waiting) = self.status.counts();
        vec![EngineStats {
            alive: !self.inbox.is_closed(),
            running,
            waiting,
            max_num_seqs: 1,
            ..EngineStats::idle(&self.info.id)
        }]
    }
}
