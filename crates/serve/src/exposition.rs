//! Prometheus' text format, every name beginning with `vllm:`.

use std::fmt::Write;

use crate::histogram::Histogram;

/// A text that grows by headers and samples.
#[derive(Debug, Default)]
pub(crate) struct Exposition(String);

impl Exposition {
    pub(crate) fn header(&mut self, name: &str, help: &str, kind: &str) {
        let _ = write!(
            self.0,
            "# HELP vllm:{name} {help}\n# TYPE vllm:{name} {kind}\n"
        );
    }

    /// `labels` without their braces.
    pub(crate) fn line(&mut self, name: &str, labels: &str, value: f64) {
        let _ = writeln!(self.0, "vllm:{name}{{{labels}}} {value}");
    }

    pub(crate) fn histogram(&mut self, name: &str, labels: &str, seen: &Histogram) {
        let bucket = format!("{name}_bucket");
        for (bound, below) in seen.cumulative() {
            self.line(&bucket, &format!("{labels},le=\"{bound}\""), below as f64);
        }
        let count = seen.count() as f64;
        self.line(&bucket, &format!("{labels},le=\"+Inf\""), count);
        self.line(&format!("{name}_sum"), labels, seen.sum());
        self.line(&format!("{name}_count"), labels, count);
    }

    pub(crate) fn text(self) -> String {
        self.0
    }
}
