//! An engine without a model, for tests and for building clients.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures::{StreamExt, stream};
use updraft_chat::{ByteTokenizer, Chat, ChatTemplate, SpecialTokens};

use crate::engine::{
    Engine, EngineStats, FinishReason, GenerateRequest, ModelInfo, TokenEvent, TokenLogprobs,
    TokenStream, Usage, longest_token_bytes,
};
use crate::error::{Error, Result};
use crate::limits::check_request;
use crate::sampling::SamplingDefaults;

/// Says back what it is told, byte by byte.
///
/// Its chat template is the messages' text and its tokens are bytes, so the answer to "hello" is
/// "hello". It knows no probabilities: every token is certain.
#[derive(Debug, Clone)]
pub struct EchoEngine {
    models: Vec<ModelInfo>,
    chat: Arc<Chat>,
    pace: Duration,
    max_running: usize,
    running: Arc<AtomicUsize>,
}

const MAX_MODEL_LEN: u32 = 4096;

impl EchoEngine {
    /// An engine under these names.
    ///
    /// # Panics
    /// If there is no name.
    #[must_use]
    pub fn new<N: Into<String>>(names: impl IntoIterator<Item = N>) -> Self {
        let chat = Arc::new(byte_chat());
        let info = |id: String| ModelInfo {
            root: id.clone(),
            id,
            parent: None,
            max_model_len: MAX_MODEL_LEN,
            sampling: SamplingDefaults::default(),
            text_prefix: Vec::new(),
            longest_token_bytes: longest_token_bytes(&chat),
        };
        let models: Vec<_> = names.into_iter().map(|name| info(name.into())).collect();
        assert!(!models.is_empty(), "an engine needs a name");
        Self {
            models,
            chat,
            pace: Duration::ZERO,
            max_running: usize::MAX,
            running: Arc::default(),
        }
    }

    /// Takes this long for each token.
    #[must_use]
    pub fn with_pace(self, pace: Duration) -> Self {
        Self { pace, ..self }
    }

    /// Refuses more than this many requests at once.
    #[must_use]
    pub fn with_max_running(self, max_running: usize) -> Self {
        Self {
            max_running,
            ..self
        }
    }

    /// Requests under way.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl Engine for EchoEngine {
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
        if self.chat(&request.model).is_none() {
            return Err(Error::ModelNotFound {
                model: request.model,
            });
        }
        check_request(
            &request,
            self.chat.tokenizer().vocabulary().len(),
            MAX_MODEL_LEN,
        )?;
        if request.constraint.is_some() {
            let message = "an echo has the form of its prompt";
            return Err(Error::invalid("response_format", message));
        }
        let place = Place::take(&self.running, self.max_running)?;
        let events = stream::iter(echo(&request)).map(Ok);
        let pace = self.pace;
        let paced = events.then(move |event| {
            let _held_until_dropped = &place;
            async move {
                if !pace.is_zero() {
                    tokio::time::sleep(pace).await;
                }
                event
            }
        });
        Ok(paced.boxed())
    }

    fn stats(&self) -> Vec<EngineStats> {
        vec![EngineStats {
            running: self.running(),
            max_num_seqs: self.max_running.min(64),
            ..EngineStats::idle(&self.models[0].id)
        }]
    }
}

/// One byte per token; the conversation's last text is the whole prompt.
fn byte_chat() -> Chat {
    let special_tokens = SpecialTokens::new([("eos_token", END)]);
    let template = ChatTemplate::new("{{ messages[-1].content }}", special_tokens);
    Chat::new(
        template.expect("valid Jinja"),
        Arc::new(ByteTokenizer::new([END])),
    )
}

const END: &str = "<|end|>";
/// The first id after the bytes.
const END_ID: u32 = 256;

/// The prompt, then the end token, over and over, until a stop token or `max_tokens`.
fn echo(request: &GenerateRequest) -> Vec<TokenEvent> {
    let stops: BTreeSet<u32> = request.stop_token_ids.iter().copied().collect();
    let certain = |id, top: Option<u32>| {
        top.map(|top| TokenLogprobs {
            logprob: 0.0,
            rank: 1,
            top: vec![(id, 0.0); top.min(1) as usize],
        })
    };
    let mut events = vec![TokenEvent::Started { cached_tokens: 0 }];
    if request.prompt_logprobs.is_some() {
        let rest = request.prompt_ids.iter().skip(1);
        let logprobs = rest.map(|&id| certain(id, request.prompt_logprobs));
        events.push(TokenEvent::Prompt(
            std::iter::once(None).chain(logprobs).collect(),
        ));
    }
    if request.embed {
        let mut counts = vec![0.0; END_ID as usize];
        for &id in &request.prompt_ids {
            if let Some(count) = counts.get_mut(id as usize) {
                *count += 1.0;
            }
        }
        events.push(TokenEvent::Embedding(counts));
    }
    let mut said = request.prompt_ids.iter().copied().chain([END_ID]).cycle();
    let mut usage = Usage {
        prompt_tokens: request.prompt_ids.len() as u32,
        cached_tokens: 0,
        completion_tokens: 0,
    };
    let reason = loop {
        if usage.completion_tokens == request.max_tokens {
            break FinishReason::Length;
        }
        let mut id = said.next().expect("a cycle that is not empty");
        if usage.completion_tokens < request.min_tokens && stops.contains(&id) {
            id = (0..END_ID).find(|id| !stops.contains(id)).unwrap_or(END_ID);
        }
        usage.completion_tokens += 1;
        if stops.contains(&id) {
            break FinishReason::Stop;
        }
        events.push(TokenEvent::Token {
            id,
            logprobs: certain(id, request.logprobs),
        });
    };
    events.push(TokenEvent::Finished { reason, usage });
    events
}

/// A place among those that run at once, given back when dropped.
#[derive(Debug)]
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(running: &Arc<AtomicUsize>, max_running: usize) -> Result<Self> {
        let taken = running.fetch_add(1, Ordering::SeqCst);
        let place = Self(running.clone()); // Gives the place back when it was one too many.
        match taken < max_running {
            true => Ok(place),
            false => Err(Error::Overloaded {
                retry_after: Duration::from_secs(1),
            }),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
