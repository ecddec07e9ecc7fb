//! The identities of serving, on tiny random models.

use std::sync::{Arc, mpsc};

use candle_core::Device;
use futures::TryStreamExt;
use futures::future::join_all;
use updraft_chat::{ByteTokenizer, Chat, ChatTemplate, SpecialTokens};
use updraft_model::{
    Adapter, Architecture, Batch, Decoder, LoraConfig, ModelConfig, Threads, Weights,
};
use updraft_model::{KvPages, merge, tiny};

use super::status::Status;
use super::worker::{Job, Worker};
use super::*;
use crate::engine::{Engine, GenerateRequest, TokenEvent, TokenLogprobs};
use crate::error::{Error, Result};
use crate::sampling::SamplingParams;
use crate::scheduler::{Scheduler, SchedulerConfig};

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
pub(super) fn served_parts() -> (Worker, mpsc::Sender<Job>) {
    let model = served(&weights(), &[]);
    let scheduler = Scheduler::new(SchedulerConfig {
        max_num_seqs: 2,
        max_num_batched_tokens: 64,
        num_blocks: 32,
        block_size: 16,
        max_queued_requests: 8,
        max_queued_tokens: 1000,
    });
    let kv = KvPages::new(&config(), 32, 16, candle_core::DType::F32, &Device::Cpu);
    let (inbox, jobs) = mpsc::channel();
    let (kv, scheduler) = (kv.expect("memory"), scheduler.expect("sound settings"));
    let worker = Worker::new(
        model.decoder,
        Vec::new(),
        kv,
        scheduler,
        jobs,
        Arc::new(Status::new("tiny")),
    );
    (worker, inbox)
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

/// Not only the tokens but every bit of their log-probabilities.
#[tokio::test]
async fn answers_do_not_depend_on_company_or_chunks() {
    let alone = one_by_one(&*engine(&EngineOptions::default()), requests("tiny")).await;
    for max_num_batched_tokens in [16, 17, 40, 512] {
        let options = EngineOptions {
            max_num_batched_tokens,
            ..small()
        };
        let crowded = together(&*engine(&options), requests("tiny")).await;
        assert_eq!(alone, crowded, "{max_num_batched_tokens} tokens at once");
    }
    let seeded = |request| GenerateRequest {
        sampling: SamplingParams::seeded(5),
        ..request
    };
    let requests: Vec<_> = requests("tiny").into_iter().map(seeded).collect();
    let alone = one_by_one(&*engine(&small()), requests.clone()).await;
    assert_eq!(alone, together(&*engine(&small()), requests).await);
}

#[tokio::test]
async fn answers_survive_preemption() {
    let options = EngineOptions {
        max_model_len: Some(72),
        block_size: 4,
        // Room for about two of the sixteen at full length.
        kv_cache_bytes: 40 * KvPages::bytes_per_block(&config(), 4, candle_core::DType::F32),
        ..small()
    };
    let crowded = engine(&options);
    let mut asked = requests("tiny");
    asked
        .iter_mut()
        .for_each(|request| request.prompt_logprobs = Some(1));
    let alone = one_by_one(&*engine(&small()), asked.clone()).await;
    assert_eq!(alone, together(&*crowded, asked).await);
    assert!(
        crowded.stats()[0].preemptions > 0,
        "the test would prove nothing"
    );
    crate::conformance::until_idle(&crowded).await;
}

/// Cached, batched decoding against one whole forward pass per token without any cache.
#[tokio::test]
async fn cached_decode_equals_full_forward() {
    let decoder = served(&weights(), &[]).decoder;
    let last_logits = |ids: &[u32]| -> Vec<f32> {
        let mut batch = Batch::packed([ids]);
        batch.logit_rows = vec![ids.len() as u32 - 1];
        let hidden = decoder.forward(&batch, &[], None).expect("a sound batch");
        decoder
            .logits(&hidden)
            .and_then(|logits| Ok(logits.flatten_all()?.to_vec1()?))
            .expect("logits")
    };
    for request in requests("tiny").into_iter().skip(3).step_by(5) {
        let mut ids = request.prompt_ids.clone();
        for event in run(&*engine(&small()), request).await {
            let TokenEvent::Token { id, logprobs } = event else {
                continue;
            };
            let expected = crate::sampler::token_logprobs(&last_logits(&ids), id, 2);
            assert!(
                close(&logprobs.expect("asked for"), &expected),
                "{expected:?}"
            );
            assert_eq!(expected.top[0].0, id, "greedy");
            ids.push(id);
        }
    }
}

fn close(a: &TokenLogprobs, b: &TokenLogprobs) -> bool {
    let near = |a: f32, b: f32| (a - b).abs() < 1e-4;
    near(a.logprob, b.logprob) && a.top.iter().zip(&b.top).all(|(a, b)| near(a.1, b.1))
}

#[tokio::test]
async fn prompt_logprobs_are_those_of_decoding() {
    let engine = engine(&EngineOptions {
        max_num_batched_tokens: 16,
        ..small()
    });
    let request = GenerateRequest {
        logprobs: Some(1),
        ..GenerateRequest::greedy("tiny", (40..60).collect(), 12)
    };
    let mut whole = request.prompt_ids.clone();
    let mut expected = Vec::new();
    for event in run(&*engine, request).await {
        if let TokenEvent::Token { id, logprobs } = event {
            whole.push(id);
            expected.push(logprobs);
        }
    }
    let again = GenerateRequest {
        prompt_logprobs: Some(1),
        ..GenerateRequest::greedy("tiny", whole, 0)
    };
    match run(&*engine, again).await.first() {
        Some(TokenEvent::Prompt(logprobs)) => assert_eq!(logprobs[20..], expected),
        other => panic!("{other:?}"),
    }
}

/// Three models in one batch: the base and two adapters, each as if it were alone, and each
/// adapter as if it were merged.
#[tokio::test]
async fn an_adapter_answers_as_its_merged_model() {
    let adapters = [("a", adapter(1)), ("b", adapter(2))];
    let model = served(&weights(), &adapters);
    let mixed = ModelEngine::new(model, &small()).expect("sound options");
    let asked = |name| requests(name).into_iter().take(5);
    let all = asked("tiny").chain(asked("a")).chain(asked("b")).collect();
    let answers = together(&mixed, all).await;

    let (base, adapted) = answers.split_at(5);
    let plain = one_by_one(&*engine(&small()), asked("tiny").collect()).await;
    assert_eq!(base, plain, "adapters in the batch do not touch the base");
    for ((_, adapter), answers) in adapters.iter().zip(adapted.chunks(5)) {
        assert_ne!(answers, base, "the adapter does something");
        let base = weights();
        let files = merge::merge(&base, &config(), adapter).expect("it fits");
        let files: Result<Vec<_>, _> = files
            .map(|file| file.map(|(name, bytes)| (name, bytes.into())))
            .collect();
        let merged = Weights::from_files(files.expect("f32 weights")).expect("sound files");
        let merged = ModelEngine::new(served(&merged, &[]), &small()).expect("sound options");
        for (answer, expected) in answers
            .iter()
            .zip(one_by_one(&merged, asked("tiny").collect()).await)
        {
            assert_eq!(answer.len(), expected.len());
            for (event, expected) in answer.iter().zip(&expected) {
                match (event, expected) {
                    (
                        TokenEvent::Token {
                            id,
                            logprobs: Some(logprobs),
                        },
                        TokenEvent::Token {
                            id: expected_id,
                            logprobs: Some(expected),
                        },
                    ) => assert!(
                        id == expected_id && close(logprobs, expected),
                        "{logprobs:?} {expected:?}"
                    ),
                    (event, expected) => assert_eq!(event, expected),
                }
            }
        }
    }
}

#[tokio::test]
async fn a_full_queue_refuses_and_recovers() {
    let options = EngineOptions {
        max_num_seqs: 1,
        max_queued_requests: 2,
        ..small()
    };
    let engine = engine(&options);
    let long = || GenerateRequest::greedy("tiny", vec![1; 9], 200);
    let mut streams = Vec::new();
    let refused = loop {
        match engine.generate(long()).await {
            Ok(stream) => streams.push(stream),
            Err(error) => break error,
        }
        assert!(
            streams.len() < 10,
            "one runs and two wait, a few may have ended"
        );
    };
    assert!(matches!(refused, Error::Overloaded { .. }));
    drop(streams);
    run(&*engine, long()).await;
}

#[tokio::test]
async fn options_that_cannot_work_are_refused() {
    let block = KvPages::bytes_per_block(&config(), 16, candle_core::DType::F32);
    for (options, word) in [
        (
            EngineOptions {
                max_model_len: Some(257),
                ..small()
            },
            "max_model_len",
        ),
        (
            EngineOptions {
                max_model_len: Some(64),
                kv_cache_bytes: 3 * block,
                ..small()
            },
            "kv_cache_bytes",
        ),
        (
            EngineOptions {
                kv_cache_bytes: 1,
                ..small()
            },
            "kv_cache_bytes",
        ),
        (
            EngineOptions {
                max_model_len: Some(0),
                ..small()
            },
            "max_model_len must be at least 1",
        ),
        (
            EngineOptions {
                block_size: 0,
                ..small()
            },
            "block_size",
        ),
        (
            EngineOptions {
                max_num_seqs: 0,
                ..small()
            },
            "max_num_seqs",
        ),
        (
            EngineOptions {
                max_num_batched_tokens: 15,
                ..small()
            },
            "max_num_batched_tokens",
        ),
    ] {
        let error = ModelEngine::new(served(&weights(), &[]), &options).expect_err(word);
        assert!(error.to_string().contains(word), "{error}");
    }
    // What is not asked for adapts to the memory there is.
    let tight = EngineOptions {
        kv_cache_bytes: 3 * block,
        ..small()
    };
    assert_eq!(engine(&tight).models()[0].max_model_len, 48);
}
