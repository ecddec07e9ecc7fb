//! The seam between HTTP and models: token ids in, a stream of token ids out.

use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;
use futures::future::try_join_all;
use futures::stream::BoxStream;
use updraft_chat::Chat;

use crate::constraint::Constraint;
use crate::error::{Error, Result};
use crate::histogram::Histogram;
use crate::model_engine::AdapterSource;
use crate::sampler::{Past, Seen};
use crate::sampling::{SamplingDefaults, SamplingParams};

/// Something that continues prompts.
///
/// # Contract
/// - [`models`](Engine::models) never changes its order while names stay, and its first entry
///   answers requests that name no model. Every model listed has a [`chat`](Engine::chat).
/// - [`generate`](Engine::generate) checks the request before it returns: an unknown model, an
///   empty prompt, a token outside the vocabulary, a prompt and completion beyond the context and
///   a full queue are errors there, not in the stream.
/// - A stream holds [`TokenEvent::Started`] at most once and first, [`TokenEvent::Prompt`] at most
///   once and before any token, [`TokenEvent::Embedding`] likewise, then tokens, then exactly one [`TokenEvent::Finished`] or one
///   error, then nothing.
/// - A stop token ends the stream and is counted in the usage, but is not sent.
/// - [`generate_all`](Engine::generate_all) gives each request the stream that it would get alone;
///   if one of them is refused, none of the others holds anything.
/// - **Dropping the stream cancels the request**: what it held is free within one step.
/// - The same request, greedy or seeded, gives the same tokens whatever else is running.
///
/// The suite is [`conformance_tests!`](crate::conformance_tests) behind feature `conformance`.
#[async_trait]
pub trait Engine: Debug + Send + Sync {
    /// The models and adapters a request may name.
    fn models(&self) -> Vec<ModelInfo>;

    /// The template and tokenizer of a model; `None` if the engine does not serve it.
    fn chat(&self, model: &str) -> Option<Arc<Chat>>;

    /// Admits a request and returns its tokens as they come.
    ///
    /// # Errors
    /// [`ModelNotFound`](crate::Error::ModelNotFound),
    /// [`InvalidRequest`](crate::Error::InvalidRequest),
    /// [`ContextLength`](crate::Error::ContextLength),
    /// [`Overloaded`](crate::Error::Overloaded) or
    /// [`Unavailable`](crate::Error::Unavailable); nothing was computed then.
    async fn generate(&self, request: GenerateRequest) -> Result<TokenStream>;

    /// Admits several requests at once: all of them or none. Their streams are in their order.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    async fn generate_all(&self, requests: Vec<GenerateRequest>) -> Result<Vec<TokenStream>> {
        // Whatever was admitted before one is refused is cancelled by being dropped.
        try_join_all(requests.into_iter().map(|request| self.generate(request))).await
    }

    /// What each decoder is doing now.
    fn stats(&self) -> Vec<EngineStats>;

    /// Loading and unloading adapters while serving, if the engine can.
    fn adapters(&self) -> Option<&dyn Adapters> {
        None
    }
}

/// What an [`Engine`] may be able to do besides: change its adapters while it serves.
///
/// # Contract
/// - Requests under way keep the adapter they began with, whatever happens to its name.
/// - What is loaded under a name is used from then on; nothing computed with what had the name
///   before is ever used again.
#[async_trait]
pub trait Adapters: Debug + Send + Sync {
    /// Loads an adapter and serves it from then on.
    ///
    /// # Errors
    /// [`InvalidRequest`](crate::Error::InvalidRequest) if the name is taken, by a base model or
    /// where `existing` is [`Existing::Keep`]; as [`ModelEngine::load`](crate::ModelEngine::load)
    /// if it cannot be loaded.
    async fn load_adapter(&self, source: &AdapterSource, existing: Existing) -> Result<()>;

    /// Serves an adapter no longer.
    ///
    /// # Errors
    /// [`ModelNotFound`](crate::Error::ModelNotFound) if no adapter has that name.
    fn unload_adapter(&self, name: &str) -> Result<()>;
}

/// What becomes of an adapter whose name is to be used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// It stays, and the new one is refused.
    Keep,
    /// The new one takes its place.
    Replace,
}

/// The events of one request; dropping it cancels the request.
pub type TokenStream = BoxStream<'static, Result<TokenEvent>>;

/// One name under which a client may ask.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    /// The name in requests; may contain slashes.
    pub id: String,
    /// Where the weights came from: a folder or a stage.
    pub root: String,
    /// The base model's id if this is an adapter.
    pub parent: Option<String>,
    /// The most tokens a prompt and its completion may have together.
    pub max_model_len: u32,
    /// What a request leaves out of its sampling settings.
    pub sampling: SamplingDefaults,
    /// Token ids before every plain text, such as a beginning-of-sequence token; chat templates
    /// write their own.
    pub text_prefix: Vec<u32>,
    /// Bytes of the vocabulary's longest token.
    pub longest_token_bytes: usize,
}

/// Bytes of a text that is tokenized at most, whatever the context: tokenizers take forty times as
/// much while they work.
const MAX_TEXT_BYTES: usize = 4 << 20;
/// The same for each token of a long context.
const MAX_BYTES_PER_TOKEN: usize = 8;

impl ModelInfo {
    /// Refuses a text of so many bytes that it cannot fit the context, whatever its tokens are.
    pub(crate) fn check_text(&self, bytes: usize) -> Result<()> {
        // Tokenizers that normalize make a third of a text at most, of Hangul's letters.
        let most_per_token = self.longest_token_bytes.saturating_mul(3).max(1);
        let least = u32::try_from(bytes / most_per_token).unwrap_or(u32::MAX);
        match least > self.max_model_len {
            true => Err(Error::ContextLength {
                prompt_tokens: least,
                max_tokens: 1,
                max_model_len: self.max_model_len,
            }),
            false => Ok(()),
        }
    }

    /// Refuses a text that would take too much to tokenize, be it to fit or to be cut.
    pub(crate) fn check_work(&self, param: &str, bytes: usize) -> Result<()> {
        let most = MAX_BYTES_PER_TOKEN.saturating_mul(self.max_model_len as usize);
        let most = most.max(MAX_TEXT_BYTES);
        match bytes > most {
            true => {
                let message =
                    format!("a text of {bytes} bytes is too long; at most {most} are read");
                Err(Error::invalid(param, message))
            }
            false => Ok(()),
        }
    }
}

/// Bytes of the longest token that a tokenizer knows.
pub(crate) fn longest_token_bytes(chat: &Chat) -> usize {
    let vocabulary = chat.tokenizer().vocabulary();
    let bytes = (0..)
        .take(vocabulary.len())
        .map(|id| vocabulary.bytes(id).map_or(0, <[u8]>::len));
    bytes.max().unwrap_or(0)
}

/// A prompt to continue.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateRequest {
    /// The id of a model or adapter.
    pub model: String,
    /// The prompt, already rendered and tokenized.
    pub prompt_ids: Vec<u32>,
    /// The most tokens to generate; 0 computes the prompt only.
    pub max_tokens: u32,
    /// How to choose each token.
    pub sampling: SamplingParams,
    /// Tokens that end the completion, the model's own end of turn among them.
    pub stop_token_ids: Arc<[u32]>,
    /// No stop token is chosen before this many tokens.
    pub min_tokens: u32,
    /// Report log-probabilities: of the chosen token, and of this many likeliest ones.
    pub logprobs: Option<u32>,
    /// The same for each prompt token given those before it.
    pub prompt_logprobs: Option<u32>,
    /// Report these tokens' log-probabilities instead of the likeliest ones'.
    pub logprob_ids: Arc<[u32]>,
    /// Token sequences that are never completed.
    pub bad_words: Arc<[Vec<u32>]>,
    /// Report the hidden state that follows the prompt.
    pub embed: bool,
    /// The form the answer must have.
    pub constraint: Option<Constraint>,
    /// Requests share computed prefixes only with those of the same salt.
    pub cache_salt: Option<String>,
}

impl GenerateRequest {
    /// A greedy request without stop tokens.
    #[must_use]
    pub fn greedy(model: impl Into<String>, prompt_ids: Vec<u32>, max_tokens: u32) -> Self {
        Self {
            model: model.into(),
            prompt_ids,
            max_tokens,
            sampling: SamplingParams::greedy(),
            stop_token_ids: Arc::default(),
            min_tokens: 0,
            logprobs: None,
            prompt_logprobs: None,
            logprob_ids: Arc::default(),
            bad_words: Arc::default(),
            embed: false,
            constraint: None,
            cache_salt: None,
        }
    }

    /// What came before the next token, as choosing it needs to know.
    pub(crate) fn past<'a>(&'a self, seen: &'a Seen, generated: &'a [u32]) -> Past<'a> {
        let is_early = generated.len() < self.min_tokens as usize;
        Past {
            seen,
            generated,
            early_stops: if is_early { &self.stop_token_ids } else { &[] },
            bad_words: &self.bad_words,
        }
    }
}

/// What happens to a request, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenEvent {
    /// The request has left the queue.
    Started {
        /// Tokens of the prompt that were computed already, for a request before this one.
        cached_tokens: u32,
    },
    /// Log-probabilities of the prompt's tokens, if asked for; the first has none.
    Prompt(Vec<Option<TokenLogprobs>>),
    /// The final hidden state of the prompt's last token, if asked for. `[C]`
    Embedding(Vec<f32>),
    /// One more token.
    Token {
        /// Its id.
        id: u32,
        /// Its log-probability, if asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The completion is whole.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// What it cost.
        usage: Usage,
    },
}

/// Natural-log probabilities at one position, of the model's own distribution: before penalties,
/// bias and temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token at this position.
    pub logprob: f32,
    /// Its place among all tokens, the likeliest being 1.
    pub rank: u32,
    /// The likeliest tokens, best first, as many as asked for, or the tokens that were named.
    pub top: Vec<(u32, f32)>,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token, or a stop string.
    Stop,
    /// `max_tokens` were generated.
    Length,
}

impl FinishReason {
    /// OpenAI's word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// Tokens of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens in the prompt.
    pub prompt_tokens: u32,
    /// Those of them that were computed already, for a request before this one.
    pub cached_tokens: u32,
    /// Tokens generated, a final stop token among them.
    pub completion_tokens: u32,
}

/// One decoder at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineStats {
    /// The base model's id.
    pub model: String,
    /// `false` once its thread has ended; it will answer nothing any more.
    pub alive: bool,
    /// Requests in the batch.
    pub running: usize,
    /// Requests that wait for a place in it.
    pub waiting: usize,
    /// The part of the KV cache in use, 0 to 1.
    pub kv_cache_usage: f64,
    /// Sequences put back and computed again since start.
    pub preemptions: u64,
    /// Prompt tokens looked for in the prefix cache since start.
    pub prefix_cache_queries: u64,
    /// Those of them found there.
    pub prefix_cache_hits: u64,
    /// Requests that may be in the batch at once.
    pub max_num_seqs: usize,
    /// Tokens per block of the KV cache.
    pub block_size: u32,
    /// Blocks of it.
    pub num_blocks: usize,
    /// Whether prompts share computed prefixes.
    pub prefix_cache: bool,
    /// Adapters of the requests in the batch, by name.
    pub running_adapters: Vec<String>,
    /// Adapters of the requests that wait, by name.
    pub waiting_adapters: Vec<String>,
    /// Tokens of each forward pass since start.
    pub step_tokens: Histogram,
}

impl EngineStats {
    /// A living decoder that has done nothing yet.
    #[must_use]
    pub fn idle(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            alive: true,
            running: 0,
            waiting: 0,
            kv_cache_usage: 0.0,
            preemptions: 0,
            prefix_cache_queries: 0,
            prefix_cache_hits: 0,
            max_num_seqs: 0,
            block_size: 0,
            num_blocks: 0,
            prefix_cache: false,
            running_adapters: Vec::new(),
            waiting_adapters: Vec::new(),
            step_tokens: Histogram::of_tokens(),
        }
    }
}
