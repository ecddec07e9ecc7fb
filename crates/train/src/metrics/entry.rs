//! What a sink records: one moment of a run, by the names of transformers' logs.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value};

use crate::{EvalRecord, StepStats, TrainReport};

/// One moment of a run: `{"step": 3, "time": 1763836800.25, "loss": 1.5, …}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Optimizer steps done.
    pub(super) step: u64,
    /// Seconds since 1970.
    pub(super) time: f64,
    /// The figures, all finite.
    #[serde(flatten)]
    values: Map<String, Value>,
}

/// What an entry tells of; within a step they come in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Step,
    Evaluation,
    End,
}

/// Where an entry stands in its run: those of a run ascend.
pub(super) type Key = (u64, Kind);

impl Entry {
    pub(super) fn of_step(stats: &StepStats<'_>, now: SystemTime) -> Self {
        let record = stats.record;
        let values = [
            ("loss", record.loss),
            ("grad_norm", record.grad_norm),
            ("learning_rate", record.learning_rate),
            ("epoch", record.epoch),
            ("tokens_per_second", stats.tokens_per_second),
        ];
        Self::new(record.step, now, &values)
    }

    pub(super) fn of_evaluation(eval: &EvalRecord, now: SystemTime) -> Self {
        let values = [
            ("eval_loss", eval.eval_loss),
            ("eval_perplexity", eval.perplexity()),
        ];
        Self::new(eval.step, now, &values)
    }

    pub(super) fn of_end(report: &TrainReport, now: SystemTime) -> Self {
        let mut values = vec![
            ("train_runtime", report.train_runtime.as_secs_f64()),
            ("train_samples_per_second", report.train_samples_per_second),
            ("train_steps_per_second", report.train_steps_per_second),
            ("train_tokens_per_second", report.train_tokens_per_second),
            ("train_loss", report.train_loss),
            ("flops_per_second", report.flops_per_second),
        ];
        let fill = report.packing_fill_rate;
        values.extend(fill.map(|fill| ("packing_fill_rate", fill)));
        values.extend(report.mfu.map(|mfu| ("mfu", mfu)));
        for (name, bytes) in [
            ("peak_memory_bytes", report.peak_memory_bytes),
            ("peak_gpu_memory_bytes", report.peak_gpu_memory_bytes),
        ] {
            values.extend(bytes.map(|bytes| (name, bytes as f64)));
        }
        Self::new(report.steps, now, &values)
    }

    /// JSON has no NaN and no infinity; such figures are left out.
    fn new(step: u64, now: SystemTime, values: &[(&str, f64)]) -> Self {
        let finite = |&(name, value): &(&str, f64)| {
            Some((name.to_owned(), Value::Number(Number::from_f64(value)?)))
        };
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            step,
            // Milliseconds: what every service keeps.
            time: since.as_millis() as f64 / 1e3,
            values: values.iter().filter_map(finite).collect(),
        }
    }

    pub(super) fn key(&self) -> Key {
        let kind = if self.values.contains_key("train_runtime") {
            Kind::End
        } else if self.values.keys().any(|name| name.starts_with("eval_")) {
            Kind::Evaluation
        } else {
            Kind::Step
        };
        (self.step, kind)
    }

    /// The figures with their names.
    pub(super) fn values(&self) -> impl Iterator<Item = (&str, f64)> {
        self.values
            .iter()
            .filter_map(|(name, value)| Some((name.as_str(), value.as_f64()?)))
    }

    /// As a line of a log.
    pub(super) fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).expect("numbers and names serialize");
        line.push(b'\n');
        line
    }
}

/// The name under which TensorBoard and Weights & Biases show a figure:
/// `eval_loss` is `eval/loss`, everything else is `train/…`.
///
/// # Source
/// transformers 5, `integrations/integration_utils.py`, `rewrite_logs`.
pub(super) fn tag(name: &str) -> String {
    match name.strip_prefix("eval_") {
        Some(name) => format!("eval/{name}"),
        None => format!("train/{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::records;

    #[test]
    fn entries_ascend_read_back_and_leave_out_what_json_cannot_say() {
        let mut record = records(1)[0];
        record.grad_norm = f64::INFINITY;
        let stats = StepStats {
            record: &record,
            total_steps: 3,
            tokens_per_second: 12.5,
        };
        let now = UNIX_EPOCH + std::time::Duration::from_millis(1_500_000_000_250);
        let step = Entry::of_step(&stats, now);
        let eval = EvalRecord {
            step: 1,
            epoch: 0.1,
            eval_loss: 1000.0, // whose perplexity is infinite
            trained_tokens: 5,
        };
        let eval = Entry::of_evaluation(&eval, now);
        assert!(step.key() < eval.key());
        let line = String::from_utf8(eval.line()).expect("JSON");
        assert_eq!(
            line,
            "{\"step\":1,\"time\":1500000000.25,\"eval_loss\":1000.0}\n"
        );
        assert!(step.values().all(|(name, _)| name != "grad_norm"));
        let again: Entry = serde_json::from_slice(&step.line()).expect("our own line");
        assert_eq!(again, step);
    }

    #[test]
    fn tags_are_transformers() {
        assert_eq!(tag("loss"), "train/loss");
        assert_eq!(tag("eval_loss"), "eval/loss");
        assert_eq!(tag("train_runtime"), "train/train_runtime");
    }
}
