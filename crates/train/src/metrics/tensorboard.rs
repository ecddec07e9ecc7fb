//! A run's figures as TensorBoard event files.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::append::AppendFile;
use super::entry::{Entry, tag};
use crate::observer::{Observer, StepStats};
use crate::{Error, EvalRecord, Result, TrainReport};

mod event;

use event::{Event, What};

/// Writes event files that `tensorboard --logdir FOLDER` shows, with the tags of transformers:
/// `train/loss`, `train/learning_rate`, `train/grad_norm`, `train/epoch`, `eval/loss`, …
///
/// Each process begins a file of its own. Where a run goes on after a kill, its first record tells
/// TensorBoard to forget the steps that are done again.
///
/// ```
/// use updraft_train::metrics::TensorBoard;
/// # let folder = tempfile::tempdir()?;
/// let sink = TensorBoard::open(folder.path().join("runs/first"))?; // trainer.with_observer(sink)
/// # drop(sink);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct TensorBoard {
    file: AppendFile,
    now: fn() -> SystemTime,
    /// Whether an earlier process may have written steps that come again.
    continues: bool,
}

impl TensorBoard {
    /// Begins an event file in a folder of the run's own.
    ///
    /// # Errors
    /// [`Error::MetricsFile`] if the folder cannot be read or written.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        Self::open_at(folder.as_ref(), SystemTime::now)
    }

    fn open_at(folder: &Path, now: fn() -> SystemTime) -> Result<Self> {
        let failed = |path: PathBuf| move |source| Error::MetricsFile { path, source };
        let (path, continues) = next_file(folder, now()).map_err(failed(folder.to_owned()))?;
        let file = AppendFile::open(&path, 0).map_err(failed(path))?;
        let mut sink = Self {
            file,
            now,
            continues,
        };
        sink.write(0, What::Version);
        Ok(sink)
    }

    fn write(&mut self, step: u64, what: What) {
        let event = Event {
            wall_time: seconds((self.now)()),
            step,
            what,
        };
        self.file.append(&event.record());
    }

    fn scalars(&mut self, entry: &Entry) {
        if std::mem::take(&mut self.continues) {
            self.write(entry.step, What::Start);
        }
        let scalars = entry
            .values()
            .map(|(name, value)| (tag(name), value as f32));
        self.write(entry.step, What::Scalars(scalars.collect()));
    }
}

impl Observer for TensorBoard {
    fn on_step(&mut self, stats: &StepStats<'_>) {
        self.scalars(&Entry::of_step(stats, (self.now)()));
    }

    fn on_evaluation(&mut self, eval: &EvalRecord) {
        self.scalars(&Entry::of_evaluation(eval, (self.now)()));
    }

    fn on_end(&mut self, report: &TrainReport) {
        self.continues = false; // Nothing is done again by a run that only ends.
        self.scalars(&Entry::of_end(report, (self.now)()));
    }
}

fn seconds(time: SystemTime) -> f64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_secs_f64()
}

/// A name that sorts behind all event files of the folder, as TensorBoard reads them in this order;
/// and whether there are any.
fn next_file(folder: &Path, now: SystemTime) -> std::io::Result<(PathBuf, bool)> {
    const PREFIX: &str = "events.out.tfevents.";
    std::fs::create_dir_all(folder)?;
    let mut last = None;
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name();
        let time = name.to_str().and_then(|name| {
            let name = name.strip_prefix(PREFIX)?;
            name.split('.').next()?.parse::<u64>().ok()
        });
        last = last.max(time);
    }
    let time = (seconds(now) as u64).max(last.map_or(0, |last| last + 1));
    Ok((
        folder.join(format!("{PREFIX}{time:010}.updraft")),
        last.is_some(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{records, report};

    fn clock() -> SystemTime {
        UNIX_EPOCH + std::time::Duration::from_millis(1_763_836_800_500)
    }

    /// Two steps, an evaluation and the end of a run, with figures that f32 holds exactly.
    fn run(folder: &Path) {
        let mut sink = TensorBoard::open_at(folder, clock).expect("a folder");
        for mut record in records(2) {
            record.loss = 1.5;
            record.grad_norm = 0.25;
            record.learning_rate = 0.5;
            record.epoch = record.step as f64 / 2.0;
            sink.on_step(&StepStats {
                record: &record,
                total_steps: 2,
                tokens_per_second: 1024.0,
            });
        }
        sink.on_evaluation(&EvalRecord {
            step: 2,
            epoch: 1.0,
            eval_loss: 0.0,
            trained_tokens: 3,
        });
        sink.on_end(&report(2));
    }

    /// The bytes of a run, which tensorboard's own reader was shown when they were committed
    /// (`tests/fixtures/read_tensorboard.py`).
    #[test]
    fn the_bytes_are_those_that_tensorboard_read() {
        let folder = tempfile::tempdir().expect("a folder");
        run(folder.path());
        let written = std::fs::read(folder.path().join("events.out.tfevents.1763836800.updraft"));
        let golden = include_bytes!(
            "../../tests/fixtures/tensorboard/events.out.tfevents.1763836800.updraft"
        );
        assert!(written.expect("written") == golden);
    }

    #[test]
    fn a_run_that_goes_on_begins_a_later_file_and_says_where() {
        let folder = tempfile::tempdir().expect("a folder");
        run(folder.path());
        run(folder.path());
        let second = folder.path().join("events.out.tfevents.1763836801.updraft");
        let written = std::fs::read(second).expect("a second file");
        let start = Event {
            wall_time: seconds(clock()),
            step: 1,
            what: What::Start,
        }
        .record();
        let found = |bytes: &[u8]| {
            bytes
                .windows(start.len())
                .filter(|&window| window == start)
                .count()
        };
        assert_eq!(found(&written), 1);
        let first = folder.path().join("events.out.tfevents.1763836800.updraft");
        assert_eq!(found(&std::fs::read(first).expect("the first file")), 0);
    }
}
