//! What the worker tells whoever launched it: one line per event.
//!
//! With `UPDRAFT_EVENTS=json` an event is a line of JSON behind a marker, which the launcher draws;
//! without, it is a line for a person, so that `pipeline train` reads well by itself.

use std::io::Write;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use updraft::store::{Progress, ProgressSink};

/// Begins a line that is an event; everything else is a log line.
const MARKER: &str = "@updraft ";

/// Between two lines about the same stage.
const PLAIN_INTERVAL: Duration = Duration::from_secs(2);

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    Progress(Progress),
    Finished(StageSummary),
}

/// One finished stage, for the closing table.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StageSummary {
    pub stage: String,
    pub seconds: f64,
    /// It was finished before; nothing was written.
    pub reused: bool,
    pub rows: Option<u64>,
    pub rejected: u64,
    pub tokens: Option<u64>,
    pub bytes_written: u64,
    /// Where it lies in the store.
    pub dir: String,
}

impl Event {
    /// The event in a line of the worker's output, if it is one.
    pub fn parse(line: &str) -> Option<Event> {
        serde_json::from_str(line.strip_prefix(MARKER)?).ok()
    }
}

/// The worker's side: prints events.
#[derive(Debug)]
pub struct Events {
    json: bool,
    silent: bool,
    last: Mutex<Option<(String, Instant)>>,
}

impl Events {
    pub fn from_env() -> Self {
        let json = std::env::var("UPDRAFT_EVENTS").is_ok_and(|value| value == "json");
        Self {
            json,
            silent: false,
            last: Mutex::new(None),
        }
    }

    /// Of a worker that does what another one tells of.
    pub fn silent() -> Self {
        Self {
            silent: true,
            ..Self::from_env()
        }
    }

    pub fn finished(&self, summary: StageSummary) {
        match (self.silent, self.json) {
            (true, _) => {}
            (false, true) => self.send(&Event::Finished(summary)),
            (false, false) => say(&finished_line(&summary)),
        }
    }

    fn send(&self, event: &Event) {
        if let Ok(json) = serde_json::to_string(event) {
            say(&format!("{MARKER}{json}"));
        }
    }

    /// Whether a line for a person is due: a stage's first, and one now and then.
    fn due(&self, stage: &str) -> bool {
        let Ok(mut last) = self.last.lock() else {
            return true;
        };
        let now = Instant::now();
        let due = last
            .as_ref()
            .is_none_or(|(name, at)| name != stage || now - *at >= PLAIN_INTERVAL);
        if due {
            *last = Some((stage.to_owned(), now));
        }
        due
    }
}

impl ProgressSink for Events {
    fn report(&self, progress: &Progress) {
        if self.silent {
            return;
        }
        if self.json {
            self.send(&Event::Progress(progress.clone()));
        } else if self.due(&progress.stage) {
            say(&progress_line(progress));
        }
    }
}

/// `train       40/120 steps  loss 1.234  …`
pub fn progress_line(progress: &Progress) -> String {
    let total = progress
        .total
        .map(|total| format!("/{total}"))
        .unwrap_or_default();
    let mut line = format!(
        "{:<12} {}{total} {}",
        progress.stage, progress.done, progress.unit
    );
    for (name, value) in &progress.metrics {
        line.push_str(&match name.as_str() {
            "tokens_per_second" => format!("  {value:.0} tokens/s"),
            "learning_rate" => format!("  lr {value:.2e}"),
            name => format!("  {name} {value:.4}"),
        });
    }
    line
}

pub fn finished_line(summary: &StageSummary) -> String {
    let what = if summary.reused {
        "finished before"
    } else {
        "finished"
    };
    format!("{:<12} {what}: {}", summary.stage, summary.dir)
}

/// Prints a line. A launcher that has gone away must not end the work.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
