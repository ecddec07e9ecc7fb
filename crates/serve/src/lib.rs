//! An OpenAI-compatible server that batches continuously.
//!
//! [`router`] puts OpenAI's API and a chat page over any [`Engine`];
//! [`ModelEngine`] is the engine that runs a model folder, or `done/<model>/<dataset>` from a
//! store, with LoRA adapters beside it. Requests share every forward pass under one token budget,
//! keys and values lie in pages, and a client that disconnects frees its pages within one step.
//!
//! What it is not: a trainer (`updraft-train`), a load balancer (`updraft-provision`'s gateway),
//! or a runner for every architecture: `updraft-model` says which it knows.
//!
//! ```
//! use std::sync::Arc;
//! use updraft_serve::{ApiKeys, EchoEngine, ServeOptions, router};
//!
//! // Any engine will do; this one says back what it is told.
//! let engine = Arc::new(EchoEngine::new(["echo"]));
//! let options = ServeOptions { api_keys: ApiKeys::new(["token-abc123"]), ..Default::default() };
//! let app: axum::Router = router(engine, options);
//! // `app` is an ordinary axum router: nest it, layer it, or let `updraft_serve::serve` run it.
//! # drop(app);
//! ```
//!
//! # The parts
//! - [`Engine`], the one trait: token ids in, a stream of them out. [`EchoEngine`] is its fake,
//!   [`Engines`] puts several under one roof.
//! - [`Scheduler`], a pure state machine over [`BlockAllocator`]: which tokens of which sequences
//!   the next forward pass computes.
//! - [`sample`], a pure function: logits, [`SamplingParams`] and the past to a token.
//! - [`router`] and [`serve`]: HTTP, keys, errors in OpenAI's form, graceful shutdown.
//!
//! # Compatibility
//! Departures from OpenAI and vLLM:
//! - The chunk that carries `finish_reason` has an empty delta, as OpenAI's; vLLM puts the last
//!   token there.
//! - `error.code` is a string or null, never a number.
//! - A full queue is a 429 with `Retry-After`, not a 503.
//! - Log-probabilities are of the model's own distribution, before penalties and temperature.
//! - With `echo`, the prompt's first token has the log-probability 0, not null: typed clients
//!   refuse null.
//! - Lists are bounded: 1,024 stop token ids, bad words and biases, 20 named log-probabilities, 4 stop
//!   strings of 1,024 bytes (`/completion` takes 16); more is a 400.
//! - `include_stop_str_in_output` keeps stop strings; the text of a stop token is never told.
//! - A stop string counts if it ends after `min_tokens`, wherever it begins, as vLLM's: the text then
//!   ends where it begins.
//! - Bodies are bounded by what they grow to: fields that are kept as they come hold 262,144 values,
//!   an answer that is told whole 8,388,608 log-probabilities, `/detokenize` takes 262,144 tokens, and a
//!   text that is tokenized has 4 MiB, or eight bytes for each token of a longer context.
//! - `text_offset` counts characters of the text: tokens that hold parts of one share its place.
//! - On a GPU a seed draws from the same distribution, but may fall on another token than on the CPU, and bits may
//!   depend on the batch.
//! - Who closes their side of a connection has gone, and what they asked for is cancelled.
//! - A completion that takes longer than `request_timeout` is a 504 with `x-should-retry: false`.
//! - Responses are kept in memory, as many as `max_kept_responses`, for the key that asked for them.
//! - Embeddings come as floats unless base64 is asked for, as OpenAI's; its Python client asks. A
//!   server that sent base64 unasked would break clients that read its reference.
//! - Embeddings are the last token's hidden state after the final norm, of length 1.
//! - `/tokenize` and `/detokenize` need a key where `/v1` does.
//! - What would change the answer but is not supported (`tools`, `guided_json` and its kind, GBNF
//!   grammars, `chat_template`) is a 400; fields nobody knows, and `priority`, are ignored.
//! - `/completion` answers as llama.cpp's, but for its progress events, `post_sampling_probs` and
//!   `n_cmpl`; samplers that OpenAI and vLLM do not have (`mirostat`, `typical_p` and their kind), and
//!   `lora` by number, are a 400 where they are turned on, and the order of `samplers` is ignored.
//!
//! # Features
//! | feature | adds |
//! | --- | --- |
//! | `cuda` | [`EngineOptions::compute`]: serving on NVIDIA GPUs |
//! | `cuda-emulator` | the same on kernels compiled for the CPU, to test it |
//! | `candle-transformers` | `CandleEngine`: Gemma, Phi-3 and others, one request at a time |
//! | `constrained` | [`Constraint`]s: answers that follow a JSON schema, through llguidance |
//! | `tls` | [`Tls`]: HTTPS, through rustls with ring |
//! | `conformance` | [`conformance_tests!`]: the suite every [`Engine`] passes |

mod constraint;
mod engine;
mod error;
mod limits;

#[cfg(feature = "candle-transformers")]
mod candle_engine;
mod conventions;
mod echo;
mod engines;
mod model_engine;

mod blocks;
mod prefix;
mod scheduler;

mod rng;
mod sampler;
mod sampling;

mod api;
mod app;
mod auth;
mod clock;
mod connections;
mod cors;
mod exposition;
mod generate;
mod histogram;
mod metrics;
mod outflow;
mod page;
mod peer;
mod router;
mod shutdown;
#[cfg(feature = "tls")]
mod tls;

#[cfg(any(test, feature = "conformance"))]
pub mod conformance;

pub use app::ServeOptions;
pub use auth::ApiKeys;
pub use blocks::BlockAllocator;
#[cfg(feature = "candle-transformers")]
pub use candle_engine::{CANDLE_ARCHITECTURES, CandleEngine};
pub use clock::Clock;
pub use constraint::Constraint;
pub use echo::EchoEngine;
pub use engine::{
    Adapters, Engine, EngineStats, Existing, FinishReason, GenerateRequest, ModelInfo, TokenEvent,
    TokenLogprobs, TokenStream, Usage,
};
pub use engines::Engines;
pub use error::{BoxError, Error, Result};
pub use histogram::Histogram;
pub use limits::check_request;
pub use model_engine::{
    AdapterSource, EngineOptions, ModelEngine, ModelSource, ServedAdapter, ServedModel,
};
pub use prefix::{BlockHash, PrefixRoot};
pub use rng::uniform;
pub use router::router;
pub use sampler::{Past, Seen, sample, token_logprobs};
pub use sampling::{SamplingDefaults, SamplingParams};
pub use scheduler::{Counts, Newcomer, Scheduler, SchedulerConfig, SequenceId, Slice, Step};
pub use shutdown::{listen, serve};
#[cfg(feature = "tls")]
pub use tls::Tls;

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
