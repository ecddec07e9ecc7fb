//! The server as a client on a socket sees it.

mod adapters;
mod admission;
mod auth;
mod browser;
#[cfg(feature = "candle-transformers")]
mod candle;
mod chat;
mod client;
mod completions;
mod conventions;
mod extras;
mod hostile;
mod life;
mod llama_cpp;
mod load;
mod logs;
mod models;
mod responses;
mod slow;
#[cfg(feature = "tls")]
mod tls;
mod tokenize;
