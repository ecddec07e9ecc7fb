//! The engine on tiny random models: the world the tests share, and the promises of every engine.

use std::sync::{Arc, mpsc};

use candle_core::Device;
use futures::future::join_all;
use futures::{StreamExt, TryStreamExt};
use updraft_chat::{ByteTokenizer, Chat, ChatTemplate, SpecialTokens};
use updraft_model::{
    Adapter, Architecture, Batch, Decoder, LoraConfig, ModelConfig, Quantization, Threads, Weights,
};
use updraft_model::{KvPages, merge, tiny};

use super::registry::Generation;
use super::status::Status;
use super::worker::{Arrival, Worker};
use super::*;
use crate::engine::{Adapters, Engine, Existing, GenerateRequest, TokenEvent, TokenLogprobs};
use crate::error::{Error, Result};
use crate::sampling::{SamplingDefaults, SamplingParams};
use crate::scheduler::{Scheduler, SchedulerConfig};

mod choices;
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
mod gpu;
mod identities;
mod limits;
#[cfg(feature = "constrained")]
mod schemas;
mod sharing;

/// A tiny model whose vocabulary has room for a byte tokenizer.
fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 288,
        ..tiny::config(Architecture::Qwen2)
    }
}

fn chat() -> Chat {
    let special_tokens = SpecialTokens::new([("eos_token", "<|end|>")]);
    let template = ChatTemplate::new("{{ messages[-1].content }}", special_tokens);
    Chat::new(
        template.expect("valid Jinja"),
        Arc::new(ByteTokenizer::new(["<|end|>"])),
    )
}

fn weights() -> Weights {
    tiny::weights(&config(), 7)
}

/// An adapter that changes something: a fresh one has `B = 0`.
fn adapter(seed: u64) -> Arc<Adapter> {
    let lora = LoraConfig {
        r: 4,
        lora_alpha: 8.0,
        ..LoraConfig::default()
    };
    let mut adapter = Adapter::init(&lora, &config(), seed, &Device::Cpu).expect("sound settings");
    adapter
        .update(|values| {
            for (index, value) in values.iter_mut().enumerate() {
                *value = (crate::rng::uniform(seed, index as u64) - 0.5) as f32 * 0.4;
            }
        })
        .expect("on the CPU");
    Arc::new(adapter)
}

fn served(weights: &Weights, adapters: &[(&str, Arc<Adapter>)]) -> ServedModel {
    let decoder = Decoder::load(
        &config(),
        weights,
        candle_core::DType::F32,
        &Device::Cpu,
        &Threads::single(),
    );
    let adapters = adapters.iter().map(|(name, adapter)| ServedAdapter {
        name: (*name).to_owned(),
        root: (*name).to_owned(),
        adapter: adapter.clone(),
    });
    ServedModel {
        name: "tiny".into(),
        root: "tiny".into(),
        decoder: decoder.expect("sound weights"),
        chat: chat(),
        sampling: SamplingDefaults::default(),
        text_prefix: Vec::new(),
        adapters: adapters.collect(),
    }
}

fn small() -> EngineOptions {
    EngineOptions {
        max_num_seqs: 16,
        max_num_batched_tokens: 64,
        ..EngineOptions::default()
    }
}

fn engine(options: &EngineOptions) -> Arc<dyn Engine> {
    Arc::new(ModelEngine::new(served(&weights(), &[]), options).expect("sound options"))
}

mod base {
    use super::*;

    crate::conformance_tests!(engine(&small()));
}

mod one_token_at_a_time {
    use super::*;

    crate::conformance_tests!(engine(&EngineOptions {
        max_num_seqs: 1,
        max_num_batched_tokens: 1,
        block_size: 1,
        ..EngineOptions::default()
    }));
}

mod with_adapters {
    use super::*;

    crate::conformance_tests!(Arc::new(
        ModelEngine::new(
            served(&weights(), &[("a", adapter(1)), ("b", adapter(2))]),
            &small()
        )
        .expect("sound options")
    ));
}

/// A worker that nobody runs, with room for two sequences and 64 tokens a step.
pub(super) fn served_parts() -> (Worker, mpsc::Sender<Arrival>) {
    let model = served(&weights(), &[]);
    let scheduler = Scheduler::new(SchedulerConfig {
        max_num_seqs: 2,
        max_num_batched_tokens: 64,
        num_blocks: 32,
        block_size: 16,
        max_queued_requests: 8,
        max_queued_tokens: 1000,
    });
    let (inbox, jobs) = mpsc::channel();
    let status = Arc::new(Status::new("tiny"));
    let scheduler = scheduler.expect("sound settings");
    let worker = Worker::new(model.decoder, scheduler, &small(), jobs, status).expect("memory");
    (worker, inbox)
}

/// An adapter that the tiny model refuses in its forward pass.
pub(super) fn adapter_for_another_model() -> Option<Generation> {
    let other = ModelConfig {
        hidden_size: 2 * config().hidden_size,
        ..config()
    };
    let adapter = Adapter::init(&LoraConfig::default(), &other, 1, &Device::Cpu);
    Some(Generation {
        number: 1,
        adapter: Arc::new(adapter.expect("sound settings")),
    })
}

/// Prompts of many lengths.
fn requests(model: &str) -> Vec<GenerateRequest> {
    let request = |index: u32| {
        let prompt_ids = (0..1 + index * 7 % 50)
            .map(|at| (index * 31 + at * 17) % 256)
            .collect();
        GenerateRequest {
            logprobs: Some(2),
            ..GenerateRequest::greedy(model, prompt_ids, 20)
        }
    };
    (0..16).map(request).collect()
}

async fn run(engine: &dyn Engine, request: GenerateRequest) -> Vec<TokenEvent> {
    let stream = engine.generate(request).await.expect("a valid request");
    stream.try_collect().await.expect("a sound model")
}

async fn one_by_one(engine: &dyn Engine, requests: Vec<GenerateRequest>) -> Vec<Vec<TokenEvent>> {
    let mut answers = Vec::new();
    for request in requests {
        answers.push(run(engine, request).await);
    }
    answers
}

async fn together(engine: &dyn Engine, requests: Vec<GenerateRequest>) -> Vec<Vec<TokenEvent>> {
    join_all(requests.into_iter().map(|request| run(engine, request))).await
}
