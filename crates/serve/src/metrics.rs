//! What the HTTP side counts of each model's requests, under the `vllm:` names dashboards know.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::engine::{EngineStats, FinishReason, Usage};
use crate::exposition::Exposition;
use crate::histogram::Histogram;

/// What is counted, for each model by its name.
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
    seen: Mutex<Seen>,
}

/// What is seen of single requests.
#[derive(Debug, Clone)]
struct Seen {
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    time_per_output_token: Histogram,
    e2e_latency: Histogram,
    queue_time: Histogram,
    prefill_time: Histogram,
    decode_time: Histogram,
    inference_time: Histogram,
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
}

impl Default for Seen {
    fn default() -> Self {
        let (seconds, tokens) = (Histogram::of_seconds(), Histogram::of_tokens());
        Self {
            time_to_first_token: seconds.clone(),
            inter_token_latency: seconds.clone(),
            time_per_output_token: seconds.clone(),
            e2e_latency: seconds.clone(),
            queue_time: seconds.clone(),
            prefill_time: seconds.clone(),
            decode_time: seconds.clone(),
            inference_time: seconds,
            prompt_tokens: tokens.clone(),
            generation_tokens: tokens,
        }
    }
}

/// When things happened to one request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    pub(crate) arrived: Instant,
    /// It left the queue.
    pub(crate) started: Option<Instant>,
    pub(crate) first_token: Option<Instant>,
    pub(crate) last_token: Option<Instant>,
}

impl Times {
    pub(crate) fn since_arrival(&self) -> Duration {
        self.arrived.elapsed()
    }
}

impl ModelMetrics {
    /// It left the queue.
    pub(crate) fn started(&self, prompt_tokens: u32, times: &Times) {
        self.prompt_tokens
            .fetch_add(u64::from(prompt_tokens), Ordering::Relaxed);
        self.see(|seen| seen.queue_time.observe(times.since_arrival().as_secs_f64()));
    }

    pub(crate) fn first_token(&self, times: &Times) {
        self.see(|seen| {
            let arrival = times.since_arrival().as_secs_f64();
            seen.time_to_first_token.observe(arrival);
            if let Some(started) = times.started {
                seen.prefill_time.observe(started.elapsed().as_secs_f64());
            }
        });
    }

    pub(crate) fn next_token(&self, since_last: Duration) {
        self.see(|seen| seen.inter_token_latency.observe(since_last.as_secs_f64()));
    }

    /// Counted as they come, so that what was aborted counts too.
    pub(crate) fn generated(&self, tokens: u32) {
        self.generation_tokens
            .fetch_add(u64::from(tokens), Ordering::Relaxed);
    }

    pub(crate) fn finished(&self, reason: FinishReason, usage: Usage, times: &Times) {
        let count = match reason {
            FinishReason::Stop => &self.stopped,
            FinishReason::Length => &self.cut,
        };
        count.fetch_add(1, Ordering::Relaxed);
        self.see(|seen| {
            seen.e2e_latency
                .observe(times.since_arrival().as_secs_f64());
            seen.prompt_tokens.observe(f64::from(usage.prompt_tokens));
            seen.generation_tokens
                .observe(f64::from(usage.completion_tokens));
            if let Some(started) = times.started {
                seen.inference_time.observe(started.elapsed().as_secs_f64());
            }
            if let (Some(first), Some(last)) = (times.first_token, times.last_token) {
                let decode = (last - first).as_secs_f64();
                seen.decode_time.observe(decode);
                if usage.completion_tokens > 1 {
                    let each = decode / f64::from(usage.completion_tokens - 1);
                    seen.time_per_output_token.observe(each);
                }
            }
        });
    }

    /// It ended before its completion did: the client went, or something failed.
    pub(crate) fn aborted(&self) {
        self.aborted.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn rejected(&self) {
        self.rejected.fetch_add(1, Ordering::Relaxed);
    }

    fn see(&self, note: impl FnOnce(&mut Seen)) {
        note(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Metrics {
    /// The counts of a model; its name must be one that is served, or there is no end of them.
    pub(crate) fn of(&self, model: &str) -> Arc<ModelMetrics> {
        let mut models = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        models.entry(model.to_owned()).or_default().clone()
    }

    /// Tells nothing more of a model that is no longer served.
    pub(crate) fn forget(&self, model: &str) {
        let mut models = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        models.remove(model);
    }

    /// The exposition, version 0.0.4.
    pub(crate) fn render(&self, engines: &[EngineStats]) -> String {
        let mut out = Exposition::default();
        let models = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let models: Vec<(String, Arc<ModelMetrics>)> = models
            .into_iter()
            .map(|(name, counts)| {
                let engine = engines.iter().position(|engine| engine.model == name);
                (labels(&name, engine.unwrap_or(0)), counts)
            })
            .collect();
        engine_metrics(&mut out, engines);
        for (name, help, count) in COUNTERS {
            out.header(name, help, "counter");
            for (labels, counts) in &models {
                out.line(name, labels, count(counts).load(Ordering::Relaxed) as f64);
            }
        }
        let name = "request_success_total";
        out.header(name, "Ended completions by reason.", "counter");
        for (labels, counts) in &models {
            for (reason, count) in [
                ("stop", &counts.stopped),
                ("length", &counts.cut),
                ("abort", &counts.aborted),
            ] {
                let labels = format!("{labels},finished_reason=\"{reason}\"");
                out.line(name, &labels, count.load(Ordering::Relaxed) as f64);
            }
        }
        for (name, help, histogram) in HISTOGRAMS {
            out.header(name, help, "histogram");
            for (labels, counts) in &models {
                counts.see(|seen| out.histogram(name, labels, histogram(seen)));
            }
        }
        out.text()
    }
}

fn engine_metrics(out: &mut Exposition, engines: &[EngineStats]) {
    let numbered = || engines.iter().enumerate();
    for (name, kind, help, value) in ENGINE_METRICS {
        out.header(name, help, kind);
        for (index, engine) in numbered() {
            out.line(name, &labels(&engine.model, index), value(engine));
        }
    }
    let name = "iteration_tokens_total";
    out.header(name, "Tokens of one forward pass.", "histogram");
    for (index, engine) in numbered() {
        out.histogram(name, &labels(&engine.model, index), &engine.step_tokens);
    }
    let name = "cache_config_info";
    out.header(name, "The KV cache.", "gauge");
    for (index, engine) in numbered() {
        let (block_size, num_blocks) = (engine.block_size, engine.num_blocks);
        let more = format!(
            ",block_size=\"{block_size}\",num_cpu_blocks=\"{num_blocks}\",\
             enable_prefix_caching=\"{}\"",
            engine.prefix_cache
        );
        out.line(name, &(labels(&engine.model, index) + &more), 1.0);
    }
    let name = "lora_requests_info";
    out.header(name, "Adapters with requests now.", "gauge");
    for (index, engine) in numbered() {
        let names = |names: &[String]| escaped(&names.join(","));
        let more = format!(
            ",running_lora_adapters=\"{}\",waiting_lora_adapters=\"{}\"",
            names(&engine.running_adapters),
            names(&engine.waiting_adapters)
        );
        out.line(name, &(labels(&engine.model, index) + &more), 1.0);
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
        "Prompt tokens of requests that left the queue.",
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

type RequestHistogram = (&'static str, &'static str, fn(&Seen) -> &Histogram);

const HISTOGRAMS: [RequestHistogram; 10] = [
    (
        "time_to_first_token_seconds",
        "From arrival to the first token.",
        |seen| &seen.time_to_first_token,
    ),
    (
        "inter_token_latency_seconds",
        "From one token to the next.",
        |seen| &seen.inter_token_latency,
    ),
    (
        "request_time_per_output_token_seconds",
        "Of a request's tokens after its first, the mean.",
        |seen| &seen.time_per_output_token,
    ),
    (
        "e2e_request_latency_seconds",
        "From arrival to the end.",
        |seen| &seen.e2e_latency,
    ),
    (
        "request_queue_time_seconds",
        "From arrival to the first computation.",
        |seen| &seen.queue_time,
    ),
    (
        "request_prefill_time_seconds",
        "From the first computation to the first token.",
        |seen| &seen.prefill_time,
    ),
    (
        "request_decode_time_seconds",
        "From the first token to the last.",
        |seen| &seen.decode_time,
    ),
    (
        "request_inference_time_seconds",
        "From the first computation to the end.",
        |seen| &seen.inference_time,
    ),
    (
        "request_prompt_tokens",
        "Prompt tokens of a request.",
        |seen| &seen.prompt_tokens,
    ),
    (
        "request_generation_tokens",
        "Tokens generated for a request.",
        |seen| &seen.generation_tokens,
    ),
];

fn labels(model: &str, engine: usize) -> String {
    format!("model_name=\"{}\",engine=\"{engine}\"", escaped(model))
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(ago: Duration) -> Times {
        let arrived = Instant::now()
            .checked_sub(ago)
            .expect("the clock is old enough");
        Times {
            arrived,
            started: Some(arrived),
            first_token: Some(arrived),
            last_token: Some(arrived + Duration::from_millis(400)),
        }
    }

    #[test]
    fn the_text_has_names_labels_and_cumulative_buckets() {
        let metrics = Metrics::default();
        let counts = metrics.of("m");
        counts.started(3, &times(Duration::ZERO));
        counts.generated(5);
        counts.first_token(&times(Duration::from_millis(60)));
        counts.first_token(&times(Duration::from_secs(600)));
        counts.next_token(Duration::from_millis(7));
        let usage = Usage {
            prompt_tokens: 3,
            completion_tokens: 5,
            ..Usage::default()
        };
        counts.finished(FinishReason::Stop, usage, &times(Duration::from_secs(1)));
        metrics.of("m").aborted();
        let mut step_tokens = Histogram::of_tokens();
        step_tokens.observe(12.0);
        let engine = EngineStats {
            model: "a\"b".into(),
            running: 2,
            waiting: 1,
            kv_cache_usage: 0.5,
            preemptions: 4,
            prefix_cache_queries: 6,
            prefix_cache_hits: 5,
            block_size: 16,
            num_blocks: 32,
            prefix_cache: true,
            running_adapters: vec!["x".into(), "y".into()],
            step_tokens,
            ..EngineStats::idle("")
        };
        let text = metrics.render(&[engine]);
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        for sample in samples {
            assert!(sample.contains("{model_name=\""), "{sample}");
            assert!(sample.contains("\",engine=\"0\""), "{sample}");
        }
        let engine = "{model_name=\"a\\\"b\",engine=\"0\"";
        let model = "{model_name=\"m\",engine=\"0\"";
        for expected in [
            "# TYPE vllm:num_requests_running gauge\n".to_owned(),
            format!("vllm:num_requests_running{engine}}} 2\n"),
            format!("vllm:kv_cache_usage_perc{engine}}} 0.5\n"),
            format!("vllm:prefix_cache_queries_total{engine}}} 6\n"),
            format!("vllm:prefix_cache_hits_total{engine}}} 5\n"),
            format!("vllm:iteration_tokens_total_bucket{engine},le=\"8\"}} 0\n"),
            format!("vllm:iteration_tokens_total_bucket{engine},le=\"16\"}} 1\n"),
            format!(
                "vllm:cache_config_info{engine},block_size=\"16\",num_cpu_blocks=\"32\",enable_prefix_caching=\"true\"}} 1\n"
            ),
            format!(
                "vllm:lora_requests_info{engine},running_lora_adapters=\"x,y\",waiting_lora_adapters=\"\"}} 1\n"
            ),
            format!("vllm:prompt_tokens_total{model}}} 3\n"),
            format!("vllm:generation_tokens_total{model}}} 5\n"),
            format!("vllm:request_success_total{model},finished_reason=\"stop\"}} 1\n"),
            format!("vllm:request_success_total{model},finished_reason=\"abort\"}} 1\n"),
            format!("vllm:time_to_first_token_seconds_bucket{model},le=\"0.05\"}} 0\n"),
            format!("vllm:time_to_first_token_seconds_bucket{model},le=\"30\"}} 1\n"),
            format!("vllm:time_to_first_token_seconds_bucket{model},le=\"+Inf\"}} 2\n"),
            format!("vllm:time_to_first_token_seconds_count{model}}} 2\n"),
            format!("vllm:request_time_per_output_token_seconds_sum{model}}} 0.1\n"),
            format!("vllm:request_decode_time_seconds_sum{model}}} 0.4\n"),
            format!("vllm:request_prefill_time_seconds_count{model}}} 2\n"),
            format!("vllm:request_inference_time_seconds_count{model}}} 1\n"),
            format!("vllm:request_queue_time_seconds_count{model}}} 1\n"),
            format!("vllm:inter_token_latency_seconds_count{model}}} 1\n"),
            format!("vllm:request_prompt_tokens_sum{model}}} 3\n"),
            format!("vllm:request_generation_tokens_sum{model}}} 5\n"),
        ] {
            assert!(text.contains(&expected), "{expected:?} is not in\n{text}");
        }
    }
}
