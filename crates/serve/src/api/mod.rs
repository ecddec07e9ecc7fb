//! OpenAI's JSON, here and nowhere else.

pub(crate) mod adapters;
pub(crate) mod capped;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod constrain;
pub(crate) mod draws;
pub(crate) mod embeddings;
pub(crate) mod error;
pub(crate) mod fields;
pub(crate) mod json;
pub(crate) mod llama_cpp;
pub(crate) mod logprobs;
pub(crate) mod models;
pub(crate) mod openapi;
pub(crate) mod operation;
pub(crate) mod prompt;
pub(crate) mod responses;
mod schemas;
pub(crate) mod sse;
pub(crate) mod tokenize;
pub(crate) mod unsupported;
pub(crate) mod usage;
pub(crate) mod weighed;
