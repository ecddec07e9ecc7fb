//! A dataset's reader as the trainer's source of examples.

use std::sync::Arc;

use futures::StreamExt;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use updraft_dataset::Reader;
use updraft_train::{Error, ExamplePlan, ExampleSource, ExampleStream};

/// Examples read ahead of the trainer, whatever their length.
const PREFETCHED_EXAMPLES: usize = 1024;

/// Hands the rows of a pretokenized dataset to the trainer.
///
/// Reading is asynchronous and training is not: a task on `runtime` reads ahead into a bounded
/// channel, and the trainer's thread takes from it. The order is the reader's.
#[derive(Debug)]
pub struct DatasetSource {
    reader: Arc<Reader>,
    plan: ExamplePlan,
    runtime: Handle,
}

impl DatasetSource {
    /// Reads `reader` on `runtime`.
    pub fn new(reader: Reader, runtime: Handle) -> Self {
        let plan = ExamplePlan {
            id: reader.id().to_owned(),
            lengths: reader.lengths().to_vec(),
            trained_tokens: reader.trained_tokens().to_vec(),
        };
        Self {
            reader: Arc::new(reader),
            plan,
            runtime,
        }
    }
}

impl ExampleSource for DatasetSource {
    fn plan(&self) -> &ExamplePlan {
        &self.plan
    }

    fn row(&self, epoch: u64, index: u64) -> u64 {
        self.reader.row(epoch, index)
    }

    fn open(&self, epoch: u64, index: u64) -> updraft_train::Result<ExampleStream<'_>> {
        let (sender, mut receiver) = mpsc::channel(PREFETCHED_EXAMPLES);
        let reader = self.reader.clone();
        self.runtime.spawn(async move {
            let mut rows = reader.read(epoch, index);
            while let Some(row) = rows.next().await {
                let row = row.map_err(Error::source);
                // A trainer that has all it wants drops the receiver.
                if sender.send(row).await.is_err() {
                    return;
                }
            }
        });
        Ok(Box::new(std::iter::from_fn(move || {
            receiver.blocking_recv()
        })))
    }
}
