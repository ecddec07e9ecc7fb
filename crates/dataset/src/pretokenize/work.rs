//! Where a stage's time goes, summed over all threads.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The parts of the work.
#[derive(Debug, Default)]
pub(super) struct Work {
    /// Decoding Parquet and JSON.
    pub(super) read: Spent,
    /// Rendering and encoding.
    pub(super) tokenize: Spent,
    /// Encoding Parquet.
    pub(super) write: Spent,
}

impl Work {
    /// Tells whoever listens; the manifest holds no timings.
    pub(super) fn report(&self) {
        tracing::debug!(
            read_seconds = self.read.seconds(),
            tokenize_seconds = self.tokenize.seconds(),
            write_seconds = self.write.seconds(),
            "pretokenized"
        );
    }
}

/// Time spent on one part.
#[derive(Debug, Default)]
pub(super) struct Spent(AtomicU64);

impl Spent {
    pub(super) fn time<T>(&self, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let done = work();
        self.add(started.elapsed());
        done
    }

    pub(super) fn add(&self, more: Duration) {
        let nanos = u64::try_from(more.as_nanos()).unwrap_or(u64::MAX);
        self.0.fetch_add(nanos, Ordering::Relaxed);
    }

    fn seconds(&self) -> f64 {
        Duration::from_nanos(self.0.load(Ordering::Relaxed)).as_secs_f64()
    }
}
