//! Reading datasets and models from the Hugging Face Hub, or a server that speaks like it.
//!
//! A repository is first [resolved](HubClient::resolve) to a commit, whose files are then read
//! by range. The token goes to the configured endpoint and to no other host.
//!
//! ```no_run
//! # async fn example() -> updraft_store::Result<()> {
//! use futures::TryStreamExt;
//! use updraft_store::hub::{HubClient, RepoRef};
//!
//! let hub = HubClient::from_env()?;
//! let repo = hub.resolve(&RepoRef::dataset("mlabonne/FineTome-100k")?).await?;
//! for file in &repo.files {
//!     let bytes: Vec<bytes::Bytes> = hub.read(&repo, file, 0..file.size).try_collect().await?;
//! }
//! # Ok(()) }
//! ```

mod body;
mod cache;
mod client;
mod config;
mod content;
#[cfg(feature = "push")]
mod local_files;
#[cfg(feature = "push")]
mod push;
mod repo;
mod request;

pub use client::HubClient;
pub use config::{HubConfig, Token};
#[cfg(feature = "push")]
pub use push::PushOptions;
pub use repo::{RepoFile, RepoKind, RepoRef, ResolvedRepo};
