//! Counters and histograms in Prometheus text, under the `vllm:` names dashboards know.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::engine::{EngineStats, FinishReason, Usage};

/// What the HTTP side counts. One set for the whole server.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    prompt_tokens: AtomicU64,
    generation_tokens: AtomicU64,
    stopped: AtomicU64,
    cut: AtomicU64,
    rejected: AtomicU64,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    e2e_latency: Histogram,
}

impl Metrics {
    pub(crate) fn first_token(&self, since_arrival: Duration) {
        self.time_to_first_token.observe(since_arrival);
    }

    pub(crate) fn next_token(&self, since_last: Duration) {
        self.inter_token_latency.observe(since_last);
    }

    pub(crate) fn finished(&self, reason: FinishReason, usage: Usage, since_arrival: Duration) {
        let count = match reason {
            FinishReason::Stop => &self.stopped,
            FinishReason::Length => &self.cut,
        };
        count.fetch_add(1, Ordering::Relaxed);
        self.prompt_tokens
            .fetch_add(u64::from(usage.prompt_tokens), Ordering::Relaxed);
        self.generation_tokens
            .fetch_add(u64::from(usage.completion_tokens), Ordering::Relaxed);
        self.e2e_latency.observe(since_arrival);
    }

    pub(crate) fn rejected(&self) {
        self.rejected.fetch_add(1, Ordering::Relaxed);
    }

    /// The exposition, version 0.0.4.
    pub(crate) fn render(&self, engines: &[EngineStats]) -> String {
        let mut out = String::new();
        let gauge =
            |out: &mut String, name: &str, help: &str, value: &dyn Fn(&EngineStats) -> f64| {
                header(out, name, help, "gauge");
                for engine in engines {
                    line(out, name, &engine_label(engine), value(engine));
                }
            };
        gauge(
            &mut out,
            "num_requests_running",
            "Requests in the batch.",
            &|e| e.running as f64,
        );
        gauge(
            &mut out,
            "num_requests_waiting",
            "Requests in the queue.",
            &|e| e.waiting as f64,
        );
        gauge(
            &mut out,
            "kv_cache_usage_perc",
            "Part of the KV cache in use, 0 to 1.",
            &|e| e.kv_cache_usage,
        );
        header(
            &mut out,
            "num_preemptions_total",
            "Sequences computed again.",
            "counter",
        );
        for engine in engines {
            let label = engine_label(engine);
            line(
                &mut out,
                "num_preemptions_total",
                &label,
                engine.preemptions as f64,
            );
        }
        let counters = [
            (
                "prompt_tokens_total",
                "Prompt tokens of finished requests.",
                &self.prompt_tokens,
            ),
            (
                "generation_tokens_total",
                "Tokens generated.",
                &self.generation_tokens,
            ),
            (
                "admission_rejections_total",
                "Requests refused by a full queue.",
                &self.rejected,
            ),
        ];
        for (name, help, count) in counters {
            header(&mut out, name, help, "counter");
            line(&mut out, name, "", count.load(Ordering::Relaxed) as f64);
        }
        let name = "request_success_total";
        header(&mut out, name, "Finished completions by reason.", "counter");
        for (reason, count) in [("stop", &self.stopped), ("length", &self.cut)] {
            let label = format!("finished_reason=\"{reason}\"");
            line(&mut out, name, &label, count.load(Ordering::Relaxed) as f64);
        }
        let first = "From arrival to the first token.";
        self.time_to_first_token
            .render(&mut out, "time_to_first_token_seconds", first);
        let next = "From one token to the next.";
        self.inter_token_latency
            .render(&mut out, "inter_token_latency_seconds", next);
        let whole = "From arrival to the end.";
        self.e2e_latency
            .render(&mut out, "e2e_request_latency_seconds", whole);
        out
    }
}

/// Upper bounds in milliseconds, wide enough for a tiny model and a loaded large one.
const BOUNDS_MS: [u64; 14] = [
    1, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 120_000,
];

#[derive(Debug, Default)]
struct Histogram {
    buckets: [AtomicU64; BOUNDS_MS.len()],
    count: AtomicU64,
    sum_micros: AtomicU64,
}

impl Histogram {
    fn observe(&self, value: Duration) {
        let micros = u64::try_from(value.as_micros()).unwrap_or(u64::MAX);
        if let Some(index) = BOUNDS_MS.iter().position(|bound| micros <= bound * 1000) {
            self.buckets[index].fetch_add(1, Ordering::Relaxed);
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        self.sum_micros.fetch_add(micros, Ordering::Relaxed);
    }

    fn render(&self, out: &mut String, name: &str, help: &str) {
        header(out, name, help, "histogram");
        let mut below = 0;
        for (bound, bucket) in BOUNDS_MS.iter().zip(&self.buckets) {
            below += bucket.load(Ordering::Relaxed);
            let label = format!("le=\"{}\"", *bound as f64 / 1000.0);
            line(out, &format!("{name}_bucket"), &label, below as f64);
        }
        let count = self.count.load(Ordering::Relaxed) as f64;
        line(out, &format!("{name}_bucket"), "le=\"+Inf\"", count);
        let sum = self.sum_micros.load(Ordering::Relaxed) as f64 / 1e6;
        line(out, &format!("{name}_sum"), "", sum);
        line(out, &format!("{name}_count"), "", count);
    }
}

fn header(out: &mut String, name: &str, help: &str, kind: &str) {
    let _ = write!(
        out,
        "# HELP vllm:{name} {help}\n# TYPE vllm:{name} {kind}\n"
    );
}

fn line(out: &mut String, name: &str, labels: &str, value: f64) {
    let labels = if labels.is_empty() {
        String::new()
    } else {
        format!("{{{labels}}}")
    };
    let _ = writeln!(out, "vllm:{name}{labels} {value}");
}

fn engine_label(engine: &EngineStats) -> String {
    let name = engine
        .model
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n");
    format!("model_name=\"{name}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_names_labels_and_cumulative_buckets() {
        let metrics = Metrics::default();
        metrics.first_token(Duration::from_millis(7));
        metrics.first_token(Duration::from_secs(600));
        let usage = Usage {
            prompt_tokens: 3,
            completion_tokens: 5,
        };
        metrics.finished(FinishReason::Stop, usage, Duration::from_millis(9));
        let engine = EngineStats {
            model: "a\"b".into(),
            alive: true,
            running: 2,
            waiting: 1,
            kv_cache_usage: 0.5,
            preemptions: 4,
        };
        let text = metrics.render(&[engine]);
        for expected in [
            "# TYPE vllm:num_requests_running gauge\n",
            "vllm:num_requests_running{model_name=\"a\\\"b\"} 2\n",
            "vllm:kv_cache_usage_perc{model_name=\"a\\\"b\"} 0.5\n",
            "vllm:prompt_tokens_total 3\n",
            "vllm:request_success_total{finished_reason=\"stop\"} 1\n",
            "vllm:time_to_first_token_seconds_bucket{le=\"0.005\"} 0\n",
            "vllm:time_to_first_token_seconds_bucket{le=\"0.01\"} 1\n",
            "vllm:time_to_first_token_seconds_bucket{le=\"+Inf\"} 2\n",
            "vllm:time_to_first_token_seconds_count 2\n",
        ] {
            assert!(text.contains(expected), "{expected:?} is not in\n{text}");
        }
    }
}
