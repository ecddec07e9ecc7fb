//! The server as a client on a socket sees it.

mod auth;
mod chat;
mod client;
mod completions;
mod hostile;
mod life;
mod load;
mod models;
mod tokenize;
