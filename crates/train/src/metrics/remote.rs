//! A run's figures at a tracking server, which may be slow, down or gone.

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use super::RunInfo;
use super::entry::Entry;
use super::json_lines::LogFile;
use crate::observer::{Observer, StepStats};
use crate::{Error, EvalRecord, Result, TrainReport};

mod http;
#[cfg(feature = "mlflow")]
mod mlflow;
mod secret;
mod sender;
mod state;
#[cfg(feature = "wandb")]
mod wandb;

#[cfg(feature = "mlflow")]
pub use mlflow::MlflowConfig;
pub use secret::Secret;
#[cfg(feature = "wandb")]
pub use wandb::WandbConfig;

use sender::{Pace, Service, Shared};
use state::{Identity, SentFile};

/// Records a run in a file and sends the file's lines to a tracking server from a thread of its own.
///
/// A server that is slow or down costs the training nothing: lines wait in the file, which is
/// JSON lines as [`JsonLines`](super::JsonLines) writes them, and `<file>.sent` says how far the
/// server has them. A process that opens the same file, because a killed run goes on or only to
/// hand in what was left, sends the rest to the same run; nothing arrives twice. One file belongs
/// to one run of one server: where it is another run's, because settings or data have changed, the
/// new run gets one beside it, `<file>.<run>.jsonl`, and is another run at the server too.
///
/// Dropping it waits a few seconds for what is on its way, [`flush`](Self::flush) for longer.
#[derive(Debug)]
pub struct RemoteLog {
    log: LogFile,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    now: fn() -> SystemTime,
}

impl RemoteLog {
    /// Sends to an MLflow tracking server.
    ///
    /// # Errors
    /// [`Error::MetricsFile`] if the file cannot be read or written, [`Error::ForeignMetrics`] if it
    /// belongs to another server, [`Error::Config`] for an address that is none.
    #[cfg(feature = "mlflow")]
    pub fn mlflow(config: &MlflowConfig, run: RunInfo, path: impl AsRef<Path>) -> Result<Self> {
        let key = run.key();
        let service = mlflow::Mlflow::new(config, run.params)?;
        Self::open(service, run.name, key, path.as_ref(), Pace::default())
    }

    /// Sends to Weights & Biases.
    ///
    /// # Errors
    /// As [`mlflow`](Self::mlflow).
    #[cfg(feature = "wandb")]
    pub fn wandb(config: &WandbConfig, run: RunInfo, path: impl AsRef<Path>) -> Result<Self> {
        let key = run.key();
        let service = wandb::Wandb::new(config, run.params)?;
        Self::open(service, run.name, key, path.as_ref(), Pace::default())
    }

    fn open<S: Service>(
        service: S,
        name: String,
        key: String,
        path: &Path,
        pace: Pace,
    ) -> Result<Self> {
        let identity = Identity::new(service.target(), name, key);
        let path = state::log_of(path, &identity)?;
        let log = LogFile::open(&path)?;
        let sent = SentFile::open(&path, identity, log.len())?;
        let shared = Arc::new(Shared::new(log.len(), sent.bytes()));
        let thread = sender::spawn(service, path, sent, Arc::clone(&shared), pace);
        let thread = thread.map_err(|error| Error::Thread(error.into()))?;
        Ok(Self {
            log,
            shared,
            thread: Some(thread),
            now: SystemTime::now,
        })
    }

    /// Waits until the server has everything recorded so far, at most this long; says whether it has.
    pub fn flush(&self, at_most: Duration) -> bool {
        self.shared.wait_sent(at_most)
    }

    fn record(&mut self, entry: &Entry) {
        // A run that goes on repeats the steps behind its checkpoint, to the bit.
        if self.log.last().is_none_or(|last| entry.key() > last) {
            self.log.append(entry);
            self.shared.wrote(self.log.len());
        }
    }
}

impl Observer for RemoteLog {
    fn on_step(&mut self, stats: &StepStats<'_>) {
        self.record(&Entry::of_step(stats, (self.now)()));
    }

    fn on_evaluation(&mut self, eval: &EvalRecord) {
        self.record(&Entry::of_evaluation(eval, (self.now)()));
    }

    fn on_end(&mut self, report: &TrainReport) {
        self.record(&Entry::of_end(report, (self.now)()));
    }
}

impl Drop for RemoteLog {
    fn drop(&mut self) {
        self.shared.close();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that sends metrics panicked");
        }
    }
}

#[cfg(all(test, feature = "mlflow", feature = "wandb"))]
mod tests;
