//! A run's figures as JSON lines in a file, while it runs.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::append::AppendFile;
use super::entry::{Entry, Key};
use crate::observer::{Observer, StepStats};
use crate::{Error, EvalRecord, Result, TrainReport};

/// Writes `{"step": …, "time": …, "loss": …}` to a file, one line for each step, evaluation and
/// end of a run, by the names of transformers' logs.
///
/// A run that goes on after a kill goes on in the same file: a line torn by the kill is dropped,
/// and lines of steps that are done again give way to the new ones. A disk that fails for a while
/// costs nothing but memory.
///
/// ```
/// use updraft_train::metrics::JsonLines;
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("metrics.jsonl");
/// let sink = JsonLines::open(&path)?; // trainer.with_observer(sink)
/// # drop(sink);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct JsonLines {
    log: LogFile,
    now: fn() -> SystemTime,
}

impl JsonLines {
    /// Opens or begins the file.
    ///
    /// # Errors
    /// [`Error::MetricsFile`] if it cannot be read or written.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Ok(Self {
            log: LogFile::open(path.as_ref())?,
            now: SystemTime::now,
        })
    }

    fn write(&mut self, entry: &Entry) {
        if self.log.last.is_some_and(|last| entry.key() <= last) {
            self.log.cut_back(entry.key());
        }
        self.log.append(entry);
    }
}

impl Observer for JsonLines {
    fn on_step(&mut self, stats: &StepStats<'_>) {
        self.write(&Entry::of_step(stats, (self.now)()));
    }

    fn on_evaluation(&mut self, eval: &EvalRecord) {
        self.write(&Entry::of_evaluation(eval, (self.now)()));
    }

    fn on_end(&mut self, report: &TrainReport) {
        self.write(&Entry::of_end(report, (self.now)()));
    }
}

/// A file of entries.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    file: AppendFile,
    last: Option<Key>,
}

impl LogFile {
    /// Opens or begins a log; a torn last line is dropped.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let failed = |source| Error::MetricsFile {
            path: path.to_owned(),
            source,
        };
        let (mut len, mut last) = (0, None);
        scan(path, |end, entry| {
            (len, last) = (end, Some(entry.key()));
            true
        })
        .map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            file: AppendFile::open(path, len).map_err(failed)?,
            last,
        })
    }

    /// Bytes of whole lines.
    #[cfg(any(feature = "mlflow", feature = "wandb"))]
    pub(super) fn len(&self) -> u64 {
        self.file.len()
    }

    /// The newest entry.
    #[cfg(any(feature = "mlflow", feature = "wandb"))]
    pub(super) fn last(&self) -> Option<Key> {
        self.last
    }

    pub(super) fn append(&mut self, entry: &Entry) {
        self.file.append(&entry.line());
        self.last = Some(entry.key());
    }

    /// Drops this entry and all behind it.
    fn cut_back(&mut self, key: Key) {
        let mut len = 0;
        let kept = scan(&self.path, |end, entry| {
            let keep = entry.key() < key;
            len = if keep { end } else { len };
            keep
        });
        match kept {
            Ok(()) => self.file.cut(len),
            Err(error) => {
                let file = self.path.display();
                tracing::warn!(%file, %error, "steps that are done again stand twice in the log");
            }
        }
    }
}

/// Calls `each` with every whole entry and the offset of its end, until it says no or something
/// that is no entry comes.
fn scan(path: &Path, mut each: impl FnMut(u64, Entry) -> bool) -> io::Result<()> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => BufReader::new(file?),
    };
    let (mut end, mut line) = (0, Vec::new());
    loop {
        line.clear();
        end += file.read_until(b'\n', &mut line)? as u64;
        let entry = serde_json::from_slice(&line).ok();
        let whole = entry.filter(|_| line.ends_with(b"\n"));
        if !whole.is_some_and(|entry| each(end, entry)) {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{records, report};

    fn run(path: &Path, steps: std::ops::RangeInclusive<u64>, rate: f64) {
        let mut sink = JsonLines::open(path).expect("a log");
        sink.now = || std::time::UNIX_EPOCH;
        for record in &records(*steps.end())[*steps.start() as usize - 1..] {
            sink.on_step(&StepStats {
                record,
                total_steps: 10,
                tokens_per_second: rate,
            });
            if record.step.is_multiple_of(4) {
                sink.on_evaluation(&EvalRecord {
                    step: record.step,
                    epoch: record.epoch,
                    eval_loss: record.loss,
                    trained_tokens: 1,
                });
            }
        }
        if *steps.end() == 10 {
            sink.on_end(&report(10));
        }
    }

    #[test]
    fn a_killed_run_leaves_the_log_of_a_calm_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        run(&path("calm"), 1..=10, 1.0);
        let calm = std::fs::read_to_string(path("calm")).expect("there");
        assert_eq!(calm.lines().count(), 10 + 2 + 1);
        for killed_after in [3, 4, 8, 10] {
            let log = path(&killed_after.to_string());
            run(&log, 1..=killed_after, 2.0); // another speed, to be told apart
            let torn = std::fs::read(&log).expect("there");
            std::fs::write(&log, [&torn[..], b"{\"step\":"].concat()).expect("written");
            run(&log, 1..=10, 1.0);
            let log = std::fs::read_to_string(&log).expect("there");
            assert_eq!(log, calm, "killed after {killed_after}");
        }
    }

    #[test]
    fn steps_before_the_checkpoint_stay() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path().join("log");
        run(&log, 1..=6, 2.0);
        run(&log, 4..=10, 1.0);
        let log = std::fs::read_to_string(&log).expect("there");
        let rates = |rate: &str| {
            log.matches(&format!("\"tokens_per_second\":{rate}"))
                .count()
        };
        assert_eq!((rates("2.0"), rates("1.0")), (3, 7));
    }

    #[test]
    fn a_path_that_is_no_file_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let error = JsonLines::open(folder.path()).expect_err("a folder");
        assert!(matches!(error, Error::MetricsFile { .. }), "{error}");
    }
}
