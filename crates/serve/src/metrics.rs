//! Counters and histograms in Prometheus text, under the `vllm:` names dashboards know.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::engine::{EngineStats, FinishReason, Usage};

/// What the HTTP side counts, for each model by its name.
#[derive(Debug, Default)]
pub(crate) struct Metrics(Mutex<BTreeMap<String, Arc<ModelMetrics>>>);

/// What is counted of the requests to one model.
#[derive(Debug, Default)]
pub(crate) struct ModelMetrics {
    prompt_tokens: AtomicU64,
    generation_tokens: AtomicU64,
    stopped: AtomicU64,
    cut: AtomicU64,
    aborted: AtomicU64,
    rejected: AtomicU64,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    e2e_latency: Histogram,
    queue_time: Histogram,
}

impl ModelMetrics {
    pub(crate) fn started(&self, since_arrival: Duration) {
        self.queue_time.observe(since_arrival);
    }

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

    /// It ended before its completion did: the client went, or something failed.
    pub(crate) fn aborted(&self) {
        self.aborted.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn rejected(&self) {
        self.rejected.fetch_add(1, Ordering::Relaxed);
    }
}

impl Metrics {
    /// The counts of a model; its name must be one that is served, or there is no end of them.
    pub(crate) fn of(&self, model: &str) -> Arc<ModelMetrics> {
        let mut models = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        models.entry(model.to_owned()).or_default().clone()
    }

    /// The exposition, version 0.0.4.
    pub(crate) fn render(&self, engines: &[EngineStats]) -> String {
        let mut out = String::new();
        for (name, kind, help, value) in ENGINE_METRICS {
            header(&mut out, name, help, kind);
            for engine in engines {
                line(&mut out, name, &model_label(&engine.model), value(engine));
            }
        }
        let models = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let models: Vec<(String, Arc<ModelMetrics>)> = models
            .into_iter()
            .map(|(name, counts)| (model_label(&name), counts))
            .collect();
        for (name, help, count) in COUNTERS {
            header(&mut out, name, help, "counter");
            for (label, counts) in &models {
                let value = count(counts).load(Ordering::Relaxed) as f64;
                line(&mut out, name, label, value);
            }
        }
        let name = "request_success_total";
        header(&mut out, name, "Ended completions by reason.", "counter");
        for (label, counts) in &models {
            for (reason, count) in [
                ("stop", &counts.stopped),
                ("length", &counts.cut),
                ("abort", &counts.aborted),
            ] {
                let label = format!("{label},finished_reason=\"{reason}\"");
                line(&mut out, name, &label, count.load(Ordering::Relaxed) as f64);
            }
        }
        for (name, help, histogram) in HISTOGRAMS {
            header(&mut out, name, help, "histogram");
            for (label, counts) in &models {
                histogram(counts).render(&mut out, name, label);
            }
        }
        out
    }
}

type EngineMetric = (
    &'static str,
    &'static str,
    &'static str,
    fn(&EngineStats) -> f64,
);

const ENGINE_METRICS: [EngineMetric; 6] = [
    (
        "num_requests_running",
        "gauge",
        "Requests in the batch.",
        |engine| engine.running as f64,
    ),
    (
        "num_requests_waiting",
        "gauge",
        "Requests in the queue.",
        |engine| engine.waiting as f64,
    ),
    (
        "kv_cache_usage_perc",
        "gauge",
        "Part of the KV cache in use, 0 to 1.",
        |engine| engine.kv_cache_usage,
    ),
    (
        "num_preemptions_total",
        "counter",
        "Sequences computed again.",
        |engine| engine.preemptions as f64,
    ),
    (
        "prefix_cache_queries_total",
        "counter",
        "Prompt tokens looked for in the prefix cache.",
        |engine| engine.prefix_cache_queries as f64,
    ),
    (
        "prefix_cache_hits_total",
        "counter",
        "Prompt tokens found in the prefix cache.",
        |engine| engine.prefix_cache_hits as f64,
    ),
];

type Counter = (&'static str, &'static str, fn(&ModelMetrics) -> &AtomicU64);

const COUNTERS: [Counter; 3] = [
    (
        "prompt_tokens_total",
        "Prompt tokens of finished requests.",
        |counts| &counts.prompt_tokens,
    ),
    ("generation_tokens_total", "Tokens generated.", |counts| {
        &counts.generation_tokens
    }),
    (
        "admission_rejections_total",
        "Requests refused by a full queue.",
        |counts| &counts.rejected,
    ),
];

type TimeHistogram = (&'static str, &'static str, fn(&ModelMetrics) -> &Histogram);

const HISTOGRAMS: [TimeHistogram; 4] = [
    (
        "time_to_first_token_seconds",
        "From arrival to the first token.",
        |counts| &counts.time_to_first_token,
    ),
    (
        "inter_token_latency_seconds",
        "From one token to the next.",
        |counts| &counts.inter_token_latency,
    ),
    (
        "e2e_request_latency_seconds",
        "From arrival to the end.",
        |counts| &counts.e2e_latency,
    ),
    (
        "request_queue_time_seconds",
        "From arrival to the first computation.",
        |counts| &counts.queue_time,
    ),
];

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

    fn render(&self, out: &mut String, name: &str, model: &str) {
        let mut below = 0;
        for (bound, bucket) in BOUNDS_MS.iter().zip(&self.buckets) {
            below += bucket.load(Ordering::Relaxed);
            let label = format!("{model},le=\"{}\"", *bound as f64 / 1000.0);
            line(out, &format!("{name}_bucket"), &label, below as f64);
        }
        let count = self.count.load(Ordering::Relaxed) as f64;
        let label = format!("{model},le=\"+Inf\"");
        line(out, &format!("{name}_bucket"), &label, count);
        let sum = self.sum_micros.load(Ordering::Relaxed) as f64 / 1e6;
        line(out, &format!("{name}_sum"), model, sum);
        line(out, &format!("{name}_count"), model, count);
    }
}

fn header(out: &mut String, name: &str, help: &str, kind: &str) {
    let _ = write!(
        out,
        "# HELP vllm:{name} {help}\n# TYPE vllm:{name} {kind}\n"
    );
}

fn line(out: &mut String, name: &str, labels: &str, value: f64) {
    let _ = writeln!(out, "vllm:{name}{{{labels}}} {value}");
}

fn model_label(model: &str) -> String {
    let name = model
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
        let counts = metrics.of("m");
        counts.first_token(Duration::from_millis(7));
        counts.first_token(Duration::from_secs(600));
        let usage = Usage {
            prompt_tokens: 3,
            completion_tokens: 5,
            ..Usage::default()
        };
        counts.finished(FinishReason::Stop, usage, Duration::from_millis(9));
        metrics.of("m").aborted();
        let engine = EngineStats {
            model: "a\"b".into(),
            alive: true,
            running: 2,
            waiting: 1,
            kv_cache_usage: 0.5,
            preemptions: 4,
            prefix_cache_queries: 6,
            prefix_cache_hits: 5,
        };
        let text = metrics.render(&[engine]);
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        for sample in samples {
            assert!(sample.contains("{model_name=\""), "{sample}");
        }
        for expected in [
            "# TYPE vllm:num_requests_running gauge\n",
            "vllm:num_requests_running{model_name=\"a\\\"b\"} 2\n",
            "vllm:kv_cache_usage_perc{model_name=\"a\\\"b\"} 0.5\n",
            "vllm:prefix_cache_queries_total{model_name=\"a\\\"b\"} 6\n",
            "vllm:prefix_cache_hits_total{model_name=\"a\\\"b\"} 5\n",
            "vllm:prompt_tokens_total{model_name=\"m\"} 3\n",
            "vllm:request_success_total{model_name=\"m\",finished_reason=\"stop\"} 1\n",
            "vllm:request_success_total{model_name=\"m\",finished_reason=\"abort\"} 1\n",
            "vllm:time_to_first_token_seconds_bucket{model_name=\"m\",le=\"0.005\"} 0\n",
            "vllm:time_to_first_token_seconds_bucket{model_name=\"m\",le=\"0.01\"} 1\n",
            "vllm:time_to_first_token_seconds_bucket{model_name=\"m\",le=\"+Inf\"} 2\n",
            "vllm:time_to_first_token_seconds_count{model_name=\"m\"} 2\n",
        ] {
            assert!(text.contains(expected), "{expected:?} is not in\n{text}");
        }
    }
}
