//! From any conversations to committed Parquet shards and back, larger than memory.
//!
//! A dataset takes two stages, each a folder of shards under a manifest in a
//! [`Store`](updraft_store::Store):
//!
//! 1. [`import`] streams a [`Source`] (files, folders, object stores, Hub datasets, memory)
//!    through a [`Format`] (ShareGPT, OpenAI, Alpaca, …) into `standardized/<dataset>/`.
//! 2. [`pretokenize`] turns that into one model's token ids and loss spans, in
//!    `model-ready/<model>/<dataset>/`.
//!
//! A [`Reader`] streams the result in an order that is a pure function of
//! `(seed, epoch, index)`, so a run that was interrupted goes on at the exact next row, with any
//! number of [`Worker`]s.
//!
//! ```
//! use futures::TryStreamExt as _;
//! use serde_json::json;
//! use updraft_chat::{ByteTokenizer, Chat, ChatTemplate};
//! use updraft_dataset::{
//!     ImportOptions, MemorySource, PretokenizeOptions, Reader, ReaderOptions, import, pretokenize,
//! };
//! use updraft_store::{CancelToken, NoProgress, Store};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (store, cancel) = (Store::memory(), CancelToken::new()); // or Store::open("s3://bucket")?
//!
//! // Usually resolve_source("train.jsonl" or "mlabonne/FineTome-100k", …).
//! let source = MemorySource::new("greetings", (0..100).map(|i| {
//!     json!({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": format!("Hello {i}")}]})
//! }))?;
//! let standardized =
//!     import(&store, "greetings", &source, &ImportOptions::default(), &NoProgress, &cancel).await?;
//! assert_eq!(standardized.counts()["rows"], 100);
//!
//! let template = ChatTemplate::new("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", Default::default())?;
//! let chat = Chat::new(template, std::sync::Arc::new(ByteTokenizer::new([])));
//! let options = PretokenizeOptions { max_seq_len: Some(2048), ..Default::default() };
//! let ready = pretokenize(
//!     &store, "bytes", "greetings", &standardized, &chat, &options, &NoProgress, &cancel,
//! ).await?;
//!
//! let reader = Reader::open(&ready, ReaderOptions { seed: 7, ..Default::default() }).await?;
//! let last_ten: Vec<_> = reader.read(0, 90).try_collect().await?; // epoch 0, from row 90 on
//! assert_eq!(last_ten.len(), 10);
//! # Ok(()) }
//! ```
//!
//! # What it is not
//!
//! It knows no tensors: packing examples into batches is `updraft-train`'s business. It renders
//! and tokenizes nothing itself: that is [`updraft_chat`]. It has no storage of its own: the
//! commit protocol is [`updraft_store`]'s.
//!
//! # Bad rows
//!
//! A row that cannot be used is a *reject*: counted, listed in the manifest with its file,
//! position and reason ([`rejects`] reads them all), and never an error until `max_reject_rate`
//! is exceeded. Malformed JSON, unknown roles, missing columns, rows over
//! [`source::MAX_ROW_BYTES`] and conversations whose content a template would drop are rejects.
//! Columns no format reads are ignored unless [`ImportOptions::keep_columns`] asks for them.
//!
//! # Memory
//!
//! Bounded, whatever the dataset's size: an import holds three shards of
//! [`ShardPlan::max_bytes`], a pretokenize two, a reader three windows of
//! [`Shuffle::Windows`] tokens.
//!
//! # Features
//!
//! | feature | adds |
//! |---|---|
//! | `hub` | Hugging Face Hub datasets as sources |
//! | `conformance` | the suites every [`Source`] and [`Format`] passes, for your own |

#[cfg(feature = "conformance")]
pub mod conformance;
mod error;

pub mod format;
mod record;
pub mod source;

mod import;
mod shard;
mod tally;

mod examples;
mod pretokenize;

mod assign;
mod location;
mod read;
mod shuffle;

pub use assign::Worker;
pub use error::{BoxError, Error, Result};
pub use format::{Format, Formats};
pub use import::{ImportOptions, copy_raw, import, import_with};
pub use pretokenize::{Overflow, PretokenizeOptions, pretokenize};
pub use read::{Reader, ReaderOptions, Shuffle};
pub use record::{Preference, Record};
pub use shard::ShardPlan;
pub use shuffle::Permutation;
pub use source::{MemorySource, Source, SourceOptions, resolve_source, resolve_source_with};
pub use tally::{MAX_LISTED_REJECTS, rejects};
