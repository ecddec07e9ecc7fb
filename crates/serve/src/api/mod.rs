//! OpenAI's JSON, here and nowhere else.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod error;
pub(crate) mod fields;
pub(crate) mod json;
pub(crate) mod logprobs;
pub(crate) mod models;
pub(crate) mod operation;
pub(crate) mod sse;
pub(crate) mod tokenize;
pub(crate) mod unsupported;
pub(crate) mod usage;
