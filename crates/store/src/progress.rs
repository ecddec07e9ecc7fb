//! Progress of a stage, as events that any front end can show.

use std::collections::BTreeMap;
use std::fmt::Debug;

use serde::{Deserialize, Serialize};

/// How far a stage is. Each event is complete in itself, so a late listener misses nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Which stage: `import`, `pretokenize`, `train`.
    pub stage: String,
    /// Units done so far, those of earlier tries included.
    pub done: u64,
    /// Units in all, if known.
    pub total: Option<u64>,
    /// What is counted: `rows`, `tokens`, `bytes`, `steps`.
    pub unit: String,
    /// Further figures: `loss`, `learning_rate`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
}

impl Progress {
    /// An event with no further figures.
    pub fn new(stage: &str, done: u64, total: Option<u64>, unit: &str) -> Self {
        Self {
            stage: stage.to_owned(),
            done,
            total,
            unit: unit.to_owned(),
            metrics: BTreeMap::new(),
        }
    }

    /// The same event with one more figure.
    #[must_use]
    pub fn with_metric(mut self, name: &str, value: f64) -> Self {
        self.metrics.insert(name.to_owned(), value);
        self
    }
}

/// Where progress goes: a bar, a log, a socket.
///
/// # Contract
/// `report` returns at once; it is called from the working thread. Within one stage `done`
/// never falls. No event is owed: a stage may report often, seldom or never.
pub trait ProgressSink: Debug + Send + Sync {
    /// Takes one event.
    fn report(&self, progress: &Progress);
}

impl<S: ProgressSink + ?Sized> ProgressSink for &S {
    fn report(&self, progress: &Progress) {
        (**self).report(progress);
    }
}

impl<S: ProgressSink + ?Sized> ProgressSink for std::sync::Arc<S> {
    fn report(&self, progress: &Progress) {
        (**self).report(progress);
    }
}

/// A stream of events: the receiver's end may be on another thread, or behind a socket.
impl ProgressSink for tokio::sync::mpsc::UnboundedSender<Progress> {
    fn report(&self, progress: &Progress) {
        // Nobody listens any more: nobody misses the event.
        let _ = self.send(progress.clone());
    }
}

/// Shows nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl ProgressSink for NoProgress {
    fn report(&self, _progress: &Progress) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_channel_is_a_stream_of_events() {
        let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
        for done in 0..3 {
            sender.report(&Progress::new("import", done, None, "rows"));
        }
        for done in 0..3 {
            assert_eq!(receiver.recv().await.expect("sent").done, done);
        }
        drop(receiver);
        sender.report(&Progress::new("import", 3, None, "rows"));
    }

    #[test]
    fn an_event_is_one_line_of_json_and_back() {
        let event = Progress::new("train", 3, Some(10), "steps").with_metric("loss", 1.5);
        let json = serde_json::to_string(&event).expect("json");
        assert_eq!(
            json,
            r#"{"stage":"train","done":3,"total":10,"unit":"steps","metrics":{"loss":1.5}}"#
        );
        assert_eq!(
            serde_json::from_str::<Progress>(&json).expect("back"),
            event
        );
    }
}
