//! Messages, chat templates, tokenizers and loss spans, exactly as transformers does them.

mod byte_tokenizer;
mod chat;
mod detokenize;
mod error;
mod example;
mod message;
mod span;
mod stop;
mod template;
mod tokenizer;

pub use byte_tokenizer::ByteTokenizer;
pub use chat::{Chat, ChatFiles};
pub use detokenize::Detokenizer;
pub use error::{BoxError, Error, Rejection, Result};
pub use example::{Example, IGNORE_INDEX};
pub use message::{Arguments, Content, Conversation, FunctionCall, Message, Part, Role, ToolCall};
pub use span::{Rendered, SpanSource};
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
