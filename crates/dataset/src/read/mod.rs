//! Reading a model-ready dataset: in an order that survives anything, with bounded memory.

mod blocks;
mod order;

use std::sync::{Arc, Mutex, PoisonError};

use futures::stream::{self, BoxStream};
use futures::{StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use updraft_chat::Example;
use updraft_store::{FinishedStage, StageKey};

use crate::Result;
use blocks::Shards;
use order::{Order, Window};

/// Windows read ahead of the one being consumed.
const WINDOWS_AHEAD: usize = 1;
/// Blocks fetched at a time.
const BLOCKS_IN_FLIGHT: usize = 8;

/// How to read.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReaderOptions {
    /// Another seed, another order.
    pub seed: u64,
    /// Shuffled anew in every epoch, or as stored.
    pub shuffle: Shuffle,
}

/// The order of the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shuffle {
    /// As they are stored.
    Off,
    /// Row groups in random order; rows mixed within windows of at most this many tokens. More
    /// tokens: better mixed, more memory (about 16 bytes for each).
    Windows {
        /// Tokens of a window.
        tokens: u64,
    },
}

impl Default for ReaderOptions {
    fn default() -> Self {
        Self {
            seed: 0,
            shuffle: Shuffle::Windows { tokens: 8 << 20 },
        }
    }
}

/// Tokens of a window that is read as stored.
const UNSHUFFLED_TOKENS: u64 = 1 << 20;

/// A finished pretokenize stage, opened for reading.
///
/// The order is a pure function of `(seed, epoch, index)`, and a reader has no state: a place in
/// it is an epoch and an index, from which any process can go on. Workers share by taking every
/// `count`-th index ([`Worker`](crate::Worker)).
#[derive(Debug)]
pub struct Reader {
    shards: Arc<Shards>,
    options: ReaderOptions,
    id: String,
    /// The order last used: consecutive questions ask for the same epoch.
    order: Mutex<Option<(u64, Arc<Order>)>>,
}

impl Reader {
    /// Opens a stage; reads the manifest and the sizes of all rows, but no tokens.
    ///
    /// # Errors
    /// [`Error::Corrupt`](crate::Error::Corrupt) if a shard is not what the manifest says, and the store's errors.
    pub async fn open(stage: &FinishedStage, options: ReaderOptions) -> Result<Self> {
        let shards = Arc::new(Shards::open(stage).await?);
        let id = format!("{}-{}", stage.key(), StageKey::of(&options)?.key16());
        Ok(Self {
            shards,
            options,
            id,
            order: Mutex::new(None),
        })
    }

    /// What decides the order and the rows: the stage's key and the options. A place recorded
    /// under one id means nothing under another.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The number of rows of an epoch.
    pub fn num_rows(&self) -> u64 {
        self.shards.lengths.len() as u64
    }

    /// The tokens of each row, as stored.
    pub fn lengths(&self) -> &[u32] {
        &self.shards.lengths
    }

    /// The tokens of each row that the loss counts, as stored.
    pub fn trained_tokens(&self) -> &[u32] {
        &self.shards.trained_tokens
    }

    /// The row (an index into [`lengths`](Self::lengths)) at place `index` of an epoch's order.
    ///
    /// # Panics
    /// If `index` is not below [`num_rows`](Self::num_rows).
    pub fn row(&self, epoch: u64, index: u64) -> u64 {
        assert!(
            index < self.num_rows(),
            "index {index} of {} rows",
            self.num_rows()
        );
        self.order(epoch).row(&self.shards.blocks, index)
    }

    /// Streams the epoch's examples from place `index` on, reading one window ahead. From the
    /// end on, there is none.
    ///
    /// Must be called within a tokio runtime. Dropping the stream stops the reading.
    pub fn read(&self, epoch: u64, index: u64) -> BoxStream<'static, Result<Example>> {
        if index >= self.num_rows() {
            return stream::empty().boxed();
        }
        let order = self.order(epoch);
        let (first, skip) = order.window_of(index);
        let (sender, receiver) = mpsc::channel(WINDOWS_AHEAD);
        let shards = Arc::clone(&self.shards);
        let reading = AbortOnDrop(tokio::spawn(async move {
            for (number, window) in order.windows.iter().enumerate().skip(first) {
                let from = if number == first { skip } else { 0 };
                let examples = read_window(&shards, window, from).await;
                let failed = examples.is_err();
                if sender.send(examples).await.is_err() || failed {
                    return;
                }
            }
        }));
        stream::unfold((receiver, reading), |(mut receiver, reading)| async move {
            receiver
                .recv()
                .await
                .map(|window| (window, (receiver, reading)))
        })
        .map_ok(|window| stream::iter(window.into_iter().map(Ok)))
        .try_flatten()
        .boxed()
    }

    fn order(&self, epoch: u64) -> Arc<Order> {
        let mut last = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((of, order)) if *of == epoch => Arc::clone(order),
            _ => {
                let order = Arc::new(match self.options.shuffle {
                    Shuffle::Off => Order::new(&self.shards.blocks, UNSHUFFLED_TOKENS, None, epoch),
                    Shuffle::Windows { tokens } => {
                        Order::new(&self.shards.blocks, tokens, Some(self.options.seed), epoch)
                    }
                });
                *last = Some((epoch, Arc::clone(&order)));
                order
            }
        }
    }
}

/// The examples of a window in their order, from a place within it on.
async fn read_window(shards: &Shards, window: &Window, from: u64) -> Result<Vec<Example>> {
    let blocks = stream::iter(window.blocks.clone()).map(|(_, block)| shards.read(block));
    let mut blocks: Vec<Vec<Example>> = blocks.buffered(BLOCKS_IN_FLIGHT).try_collect().await?;
    let take = |place| {
        let (block, row) = window.locate(place);
        std::mem::take(&mut blocks[block][row as usize])
    };
    Ok((from..window.rows).map(take).collect())
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
