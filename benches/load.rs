//! How long until the first token, between tokens, and how many tokens a second in all, when 1 to
//! 64 clients ask at once over HTTP?
//!
//! Without arguments the server runs in this process, over random weights (hidden 256, 6 layers,
//! f32, two threads); with a URL any OpenAI-compatible server is asked:
//!
//! ```sh
//! cargo bench --bench load
//! cargo bench --bench load -- http://127.0.0.1:8000/v1
//! python benches/peers/load.py http://127.0.0.1:8000/v1   # the same questions from openai-python
//! ```
//!
//! Each client asks one question after another, streamed: a prompt of about 100 tokens that no
//! other request has, and 64 tokens of answer. Times are medians and 99th percentiles in
//! milliseconds; throughput is completion tokens per second from the first request to the last end.

#![expect(clippy::print_stdout, reason = "a bench shows its numbers")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use futures::{StreamExt, future::try_join_all};
use serde_json::{Value, json};
use updraft::chat::{ByteTokenizer, Chat, ChatTemplate, SpecialTokens};
use updraft::model::{Decoder, ModelConfig, Threads, tiny};
use updraft::serve::{
    EngineOptions, ModelEngine, SamplingDefaults, ServeOptions, ServedModel, listen, serve,
};

const CONCURRENCY: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
const PROMPT_WORDS: usize = 20;
const MAX_TOKENS: usize = 64;

const CONFIG: &[u8] = br#"{
    "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 256, "intermediate_size": 1024,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 288,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 512,
    "tie_word_embeddings": true, "torch_dtype": "float32"
}"#;

#[tokio::main]
async fn main() -> Result<()> {
    // reqwest asks for a TLS provider even to speak plain HTTP; somebody may have installed one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let is_test = args.iter().any(|arg| arg == "--test");
    let url = match args.iter().find(|arg| arg.starts_with("http")) {
        Some(url) => url.trim_end_matches('/').to_owned(),
        None => in_process().await?,
    };
    let model = first_model(&url).await?;
    println!("{url}, {model}");
    println!(
        "{:>7} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "clients", "ttft p50", "ttft p99", "itl p50", "itl p99", "tokens/s"
    );
    let (levels, requests) = match is_test {
        true => (&CONCURRENCY[..2], 1),
        false => (&CONCURRENCY[..], 8),
    };
    for &clients in levels {
        let load = Load {
            url: &url,
            model: &model,
            clients,
            requests,
        };
        load.run().await?.print(clients);
    }
    Ok(())
}

/// A server over random weights, in this process.
async fn in_process() -> Result<String> {
    let config = ModelConfig::from_json(CONFIG)?;
    let (weights, threads) = (tiny::weights(&config, 7), Threads::new(2)?);
    let decoder = Decoder::load(&config, &weights, DType::F32, &Device::Cpu, &threads)?;
    let special_tokens = SpecialTokens::new([("eos_token", "<|end|>")]);
    let template = ChatTemplate::new("{{ messages[-1].content }}", special_tokens)?;
    let model = ServedModel {
        name: "random".into(),
        root: "random".into(),
        decoder,
        chat: Chat::new(template, Arc::new(ByteTokenizer::new(["<|end|>"]))),
        sampling: SamplingDefaults::default(),
        text_prefix: Vec::new(),
        adapters: Vec::new(),
    };
    let engine = ModelEngine::new(model, &EngineOptions::default())?;
    let listener = listen(([127, 0, 0, 1], 0).into()).await?;
    let url = format!("http://{}/v1", listener.local_addr()?);
    let options = ServeOptions::default();
    tokio::spawn(serve(
        listener,
        Arc::new(engine),
        options,
        std::future::pending(),
    ));
    Ok(url)
}

async fn first_model(url: &str) -> Result<String> {
    let models: Value = reqwest::get(format!("{url}/models")).await?.json().await?;
    let id = models["data"][0]["id"].as_str();
    Ok(id.context("the server lists no model")?.to_owned())
}

struct Load<'a> {
    url: &'a str,
    model: &'a str,
    clients: usize,
    /// Of each client, one after another.
    requests: usize,
}

impl Load<'_> {
    async fn run(&self) -> Result<Times> {
        // llama-server closes connections it has answered a hundred times on, in mid question.
        let http = reqwest::Client::builder()
            .pool_max_idle_per_host(0)
            .build()?;
        let begun = Instant::now();
        let clients = (0..self.clients).map(|client| {
            let http = &http;
            async move {
                let mut times = Times::default();
                for request in 0..self.requests {
                    self.ask(http, client * 1000 + request, &mut times).await?;
                }
                Ok::<_, anyhow::Error>(times)
            }
        });
        let mut all = Times::default();
        for times in try_join_all(clients).await? {
            all.first.extend(times.first);
            all.next.extend(times.next);
            all.tokens += times.tokens;
        }
        all.elapsed = begun.elapsed();
        Ok(all)
    }

    async fn ask(&self, http: &reqwest::Client, number: usize, times: &mut Times) -> Result<()> {
        let words = (0..PROMPT_WORDS).map(|at| format!("w{}", (number * 31 + at * 17) % 900));
        let body = json!({
            "model": self.model, "stream": true, "stream_options": {"include_usage": true},
            "messages": [{"role": "user", "content": words.collect::<Vec<_>>().join(" ")}],
            "max_tokens": MAX_TOKENS, "ignore_eos": true, "temperature": 0,
        });
        let asked = Instant::now();
        let url = format!("{}/chat/completions", self.url);
        let response = http.post(url).json(&body).send().await?;
        if !response.status().is_success() {
            bail!("{}: {}", response.status(), response.text().await?);
        }
        let (mut stream, mut rest) = (response.bytes_stream(), Vec::new());
        let mut last = None;
        while let Some(bytes) = stream.next().await {
            rest.extend_from_slice(&bytes?);
            while let Some(end) = rest.windows(2).position(|two| two == b"\n\n") {
                let frame: Vec<u8> = rest.drain(..end + 2).collect();
                let Some(data) = frame.strip_prefix(b"data: {") else {
                    continue; // A comment, or the end.
                };
                let chunk: Value = serde_json::from_slice(&[b"{", data].concat())?;
                if let Some(tokens) = chunk["usage"]["completion_tokens"].as_u64() {
                    times.tokens += tokens;
                }
                let text = chunk["choices"][0]["delta"]["content"].as_str();
                if text.is_some_and(|text| !text.is_empty()) {
                    let now = Instant::now();
                    match last.replace(now) {
                        None => times.first.push(now - asked),
                        Some(last) => times.next.push(now - last),
                    }
                }
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Times {
    first: Vec<Duration>,
    next: Vec<Duration>,
    tokens: u64,
    elapsed: Duration,
}

impl Times {
    fn print(mut self, clients: usize) {
        let [first, first_worst] = [0.5, 0.99].map(|part| quantile(&mut self.first, part));
        let [next, next_worst] = [0.5, 0.99].map(|part| quantile(&mut self.next, part));
        let rate = self.tokens as f64 / self.elapsed.as_secs_f64();
        println!(
            "{clients:>7} {first:>9.1} {first_worst:>9.1} {next:>9.1} {next_worst:>9.1} {rate:>9.0}"
        );
    }
}

/// In milliseconds.
fn quantile(times: &mut [Duration], part: f64) -> f64 {
    times.sort_unstable();
    let index = (times.len().saturating_sub(1) as f64 * part).round() as usize;
    times
        .get(index)
        .map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
}
