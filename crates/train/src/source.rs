//! Where examples come from: a plan known beforehand, then a resumable stream.

use std::fmt::Debug;

use updraft_chat::Example;

use crate::Result;

mod memory;

pub use memory::MemorySource;

/// What a source holds, known before the first example is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExamplePlan {
    /// Names the content and its order: two sources with one id yield the same
    /// examples in the same order. Checkpoints carry it.
    pub id: String,
    /// Tokens of each storage row.
    pub lengths: Vec<u32>,
    /// How many tokens of each storage row count towards the loss
    /// ([`Example::trained_tokens`]).
    pub trained_tokens: Vec<u32>,
}

/// A data set of token ids with loss spans, in an order that is a pure
/// function of the epoch.
///
/// # Contract
/// - `plan().lengths` and `plan().trained_tokens` are equally long and say
///   what the stream yields.
/// - Within an epoch `row` is a permutation of all storage rows: each row
///   exactly once. It depends on its arguments alone.
/// - `open(epoch, index)` yields the rows `row(epoch, index)`,
///   `row(epoch, index + 1)`, … to the epoch's end, so a stream opened at an
///   index equals the tail of the stream opened at zero.
///
/// - The stream's `next` comes back in bounded time: it is asked from a thread that a run waits for
///   when it ends or is cancelled, so what reads over a network has its own timeout.
///
/// The suite `conformance::example_source` (feature `conformance`) checks it.
pub trait ExampleSource: Debug + Send + Sync {
    /// Lengths and identity, without reading an example.
    fn plan(&self) -> &ExamplePlan;

    /// The storage row at `index` of `epoch`'s order.
    fn row(&self, epoch: u64, index: u64) -> u64;

    /// The examples of `epoch` from `index` on, in order.
    ///
    /// # Errors
    /// [`Error::Source`](crate::Error::Source), here or from the iterator,
    /// when the data cannot be read.
    fn open(&self, epoch: u64, index: u64) -> Result<ExampleStream<'_>>;
}

/// What [`ExampleSource::open`] returns.
pub type ExampleStream<'a> = Box<dyn Iterator<Item = Result<Example>> + Send + 'a>;
