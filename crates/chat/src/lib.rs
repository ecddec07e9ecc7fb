//! Conversations to a model's own tokens, exactly as Hugging Face transformers
//! does it, and which of those tokens a fine-tuning trains.
//!
//! A [`Chat`] joins a model's [`ChatTemplate`] and its [`Tokenizer`]. It turns a
//! [`Conversation`] into a training [`Example`], with the [`Rejection`]'s reason
//! where that cannot be done soundly, or into a prompt to serve. [`Detokenizer`]
//! and [`StopMatcher`] go the other way, token by token.
//!
//! This crate does no I/O: it parses bytes that it is handed.
//!
//! ```
//! use std::sync::Arc;
//! use updraft_chat::{
//!     ByteTokenizer, Chat, ChatTemplate, Conversation, Message, RenderOptions, SpecialTokens,
//! };
//!
//! let template = ChatTemplate::new(
//!     "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}\
//!      {% if add_generation_prompt %}<|assistant|>{% endif %}",
//!     SpecialTokens::default(),
//! )?;
//! let tokenizer = ByteTokenizer::new(["<|user|>", "<|assistant|>", "<|end|>"]);
//! let chat = Chat::new(template, Arc::new(tokenizer));
//!
//! // To train: the answer and the end of its turn count, the question does not.
//! let mut messages = vec![Message::user("2+2?")];
//! let options = RenderOptions { add_generation_prompt: true, ..Default::default() };
//! let prompt = chat.prompt(&Conversation::new(messages.clone()), &options)?;
//! messages.push(Message::assistant("4"));
//! let example = chat.example(&Conversation::new(messages))?;
//! assert_eq!(example.input_ids[..prompt.len()], prompt);
//! assert_eq!(example.loss_spans.len(), 1);
//! assert_eq!(example.trained_tokens(), 2);
//!
//! // To stop: the template's own end of turn.
//! assert_eq!(chat.end_ids(), &example.input_ids[example.len() - 1..]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # COMPATIBILITY
//!
//! Renders are those of transformers 5, ids those of `tokenizers` 0.23. Where
//! they are not, it is told here:
//!
//! - templates: [`ChatTemplate`] lists the overrides and limits; a template that
//!   relies on something else announces it at load
//!   ([`ChatTemplate::divergences`]);
//! - Unicode tables: [`FastTokenizer`] normalizes by a newer Unicode;
//! - `strftime_now` exists only where the caller gives the time
//!   ([`RenderOptions::now`], [`Chat::with_now`]): no clock is read in here;
//! - `continue_final_message` continues the content, not the reasoning;
//! - [`EncodePolicy::Sanitized`] encodes the control tokens that a message
//!   spells as plain text and the rest of it as it stands, as transformers'
//!   `sanitize_control_tokens` does, and refuses a message of which it cannot
//!   tell where they went.
//!
//! Templates and tokenizer files may come from strangers: what makes an engine
//! panic, run on or fill the memory is an error here.
//!
//! # Features
//!
//! | feature | default | adds |
//! |---|---|---|
//! | `fast` | yes | [`FastTokenizer`], on the `tokenizers` 1.0 release candidate |
//! | `stable` | | `StableTokenizer`, on `tokenizers` 0.23 |
//! | `conformance` | | the suite that every [`Tokenizer`] passes |

mod byte_tokenizer;
mod chat;
#[cfg(feature = "conformance")]
pub mod conformance;
mod contain;
mod detokenize;
mod error;
mod example;
mod message;
mod sanitize;
mod span;
mod stop;
mod template;
mod tokenizer;

pub use byte_tokenizer::ByteTokenizer;
pub use chat::{Chat, ChatFiles};
pub use detokenize::Detokenizer;
pub use error::{BoxError, Error, Rejection, Result};
pub use example::{Example, IGNORE_INDEX};
pub use message::{
    Arguments, Content, Conversation, FunctionCall, Message, Part, Role, ToolCall, TrainDetail,
};
pub use span::{LossOptions, Rendered, SpanSource, TrainOnEos};
pub use stop::{StopMatcher, Stopped};
pub use template::{
    ChatTemplate, DivergenceKind, LocalTime, RenderOptions, SpecialTokens, TemplateDivergence,
    TemplateFiles,
};
#[cfg(feature = "fast")]
pub use tokenizer::FastTokenizer;
#[cfg(feature = "stable")]
pub use tokenizer::StableTokenizer;
#[cfg(any(feature = "fast", feature = "stable"))]
pub use tokenizer::load_tokenizer;
pub use tokenizer::{EncodePolicy, Tokenizer, TokenizerExt, Vocabulary};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
