//! From any conversations to committed Parquet shards and back, larger than memory.

mod assign;
#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
mod examples;
pub mod format;
mod import;
mod location;
mod pretokenize;
mod read;
mod record;
mod shard;
mod shuffle;
pub mod source;
mod tally;
mod tokenize;

pub use assign::Worker;
pub use error::{BoxError, Error, Result};
pub use format::{Format, Formats};
pub use import::{ImportOptions, import, import_with};
pub use pretokenize::{PretokenizeOptions, pretokenize};
pub use read::{Reader, ReaderOptions, Shuffle};
pub use record::{Preference, Record};
pub use shard::ShardPlan;
pub use shuffle::Permutation;
pub use source::{MemorySource, Source, SourceOptions, resolve_source};
pub use tally::MAX_LISTED_REJECTS;
pub use tokenize::Overflow;
