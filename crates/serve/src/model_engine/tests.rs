//! The identities of serving, on tiny random models.

use std::sync::{Arc, mpsc};

use candle_core::Device;
use futures::future::join_all;
use futures::{StreamExt, TryStreamExt};
use updraft_chat::{ByteTokenizer, Chat, ChatTemplate, SpecialTokens};
use updraft_model::{
    Adapter, Architecture, Batch, Decoder, LoraConfig, ModelConfig, Threads, Weights,
};
use updraft_model::{KvPages, merge, tiny};

use super::registry::Generation;
use super::status::Status;
use super::worker::{Job, Worker};
use super::*;
use crate::engine::{Adapters, Engine, Existing, GenerateRequest, TokenEvent, TokenLogprobs};
use crate::error::{Error, Result};
use crate::sampling::{SamplingDefaults, SamplingParams};
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
    match run(&*engine, again).await.get(1) {
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

/// Every request as it is told to the client, without what of its prompt was cached.
fn answers(events: Vec<Vec<TokenEvent>>) -> Vec<Vec<TokenEvent>> {
    let plain = |event| match event {
        TokenEvent::Started { .. } => TokenEvent::Started { cached_tokens: 0 },
        TokenEvent::Finished { reason, mut usage } => {
            usage.cached_tokens = 0;
            TokenEvent::Finished { reason, usage }
        }
        other => other,
    };
    let plain = |events: Vec<TokenEvent>| events.into_iter().map(plain).collect();
    events.into_iter().map(plain).collect()
}

fn cached_tokens(events: &[TokenEvent]) -> u32 {
    match (events.first(), events.last()) {
        (Some(TokenEvent::Started { cached_tokens }), Some(TokenEvent::Finished { usage, .. })) => {
            assert_eq!(usage.cached_tokens, *cached_tokens);
            *cached_tokens
        }
        other => panic!("{other:?}"),
    }
}

/// Not only the tokens but every bit of their log-probabilities: cache off, cold, warm, warm in
/// company, and warm under a cache so small that it is always won back.
#[tokio::test]
async fn answers_do_not_depend_on_the_prefix_cache() {
    let adapters = [("a", adapter(1))];
    let engine = |options: &EngineOptions| {
        ModelEngine::new(served(&weights(), &adapters), options).expect("sound options")
    };
    let asked = |salt: Option<&str>| -> Vec<GenerateRequest> {
        let request = |index: u32| GenerateRequest {
            prompt_ids: (0..40 + index * 3).map(|at| at * 17 % 256).collect(),
            logprobs: Some(2),
            cache_salt: salt.map(str::to_owned),
            ..GenerateRequest::greedy(
                if index.is_multiple_of(2) { "tiny" } else { "a" },
                vec![1],
                20,
            )
        };
        (0..8).map(request).collect()
    };
    let off = EngineOptions {
        prefix_cache: false,
        ..small()
    };
    let uncached = engine(&off);
    let expected = one_by_one(&uncached, asked(None)).await;
    assert!(expected.iter().all(|events| cached_tokens(events) == 0));
    assert_eq!(uncached.stats()[0].prefix_cache_queries, 0);

    let tight = EngineOptions {
        max_model_len: Some(96),
        kv_cache_bytes: 9 * KvPages::bytes_per_block(&config(), 16, candle_core::DType::F32),
        ..small()
    };
    for options in [small(), tight] {
        let engine = engine(&options);
        for _ in 0..2 {
            let alone = one_by_one(&engine, asked(None)).await;
            assert_eq!(answers(alone), expected);
            let crowded = together(&engine, asked(None)).await;
            assert_eq!(answers(crowded), expected);
        }
        let stats = engine.stats().remove(0);
        assert!(
            stats.prefix_cache_hits > 0 && stats.prefix_cache_hits < stats.prefix_cache_queries
        );
    }

    // Base and adapter never share, and neither do salts.
    let engine = engine(&small());
    let cached = |events: Vec<Vec<TokenEvent>>| -> Vec<u32> {
        events.iter().map(|events| cached_tokens(events)).collect()
    };
    let cold = [0, 0, 32, 32, 32, 48, 48, 48];
    for salt in [None, Some("x"), Some("y")] {
        let events = one_by_one(&engine, asked(salt)).await;
        assert_eq!(cached(events.clone()), cold, "{salt:?}");
        assert_eq!(answers(events), expected);
    }
    let warm = one_by_one(&engine, asked(None)).await;
    assert_eq!(cached(warm), [32, 32, 32, 48, 48, 48, 48, 48]);
}

/// The name is given to another adapter, then to none, while a request runs: it ends as it began,
/// and nothing of its cache is used by whoever has the name next.
#[tokio::test]
async fn requests_keep_the_adapter_they_began_with() {
    let of = |seed| served(&weights(), &[("a", adapter(seed))]);
    let expected = |seed| async move {
        let engine = ModelEngine::new(of(seed), &small()).expect("sound options");
        one_by_one(&engine, requests("a")).await
    };
    let (first, second) = (expected(1).await, expected(2).await);
    let engine = ModelEngine::new(of(1), &small()).expect("sound options");
    assert_eq!(one_by_one(&engine, requests("a")).await, first);
    let mut under_way = Vec::new();
    for request in requests("a") {
        under_way.push(engine.generate(request).await.expect("a valid request"));
    }
    let again = ServedAdapter {
        name: "a".into(),
        root: "a".into(),
        adapter: adapter(2),
    };
    engine
        .registry
        .add(again, Existing::Replace)
        .expect("it may be replaced");
    // Cold, although the same prompts lie in the cache under the first generation.
    assert_eq!(one_by_one(&engine, requests("a")).await, second);
    engine.unload_adapter("a").expect("it was there");
    let gone = engine.generate(requests("a").remove(0)).await;
    assert!(matches!(gone, Err(Error::ModelNotFound { .. })));
    let ended = join_all(under_way.into_iter().map(TryStreamExt::try_collect)).await;
    let ended: Result<Vec<Vec<TokenEvent>>> = ended.into_iter().collect();
    assert_eq!(answers(ended.expect("no error")), answers(first));
}

/// Clients that ask and vanish: while they are admitted, in the queue, in the prompt, at any token.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_clients_that_vanish_leave_nothing() {
    let engine = engine(&EngineOptions {
        max_num_seqs: 8,
        block_size: 4,
        kv_cache_bytes: 60 * KvPages::bytes_per_block(&config(), 4, candle_core::DType::F32),
        ..small()
    });
    let client = |client: u64| {
        let engine = engine.clone();
        let draw = move |what, below: f64| (crate::rng::uniform(client, what) * below) as u32;
        async move {
            let prompt_ids = (0..1 + draw(1, 60.0)).map(|at| at * draw(2, 3.0) % 256);
            let request = GenerateRequest::greedy("tiny", prompt_ids.collect(), draw(3, 60.0));
            let admitted = engine.generate(request);
            let stream = if draw(4, 5.0) == 0 {
                tokio::time::timeout(std::time::Duration::ZERO, admitted).await
            } else {
                Ok(admitted.await)
            };
            match stream {
                Ok(Ok(stream)) => {
                    stream.take(draw(5, 20.0) as usize).count().await;
                }
                Ok(Err(error)) => assert!(matches!(error, Error::Overloaded { .. }), "{error}"),
                Err(_) => {}
            }
        }
    };
    futures::stream::iter((0..1000).map(client))
        .buffer_unordered(100)
        .count()
        .await;
    crate::conformance::until_idle(&engine).await;
    let fresh = GenerateRequest::greedy("tiny", (0..30).collect(), 20);
    assert!(
        run(&*engine, fresh).await.len() > 20,
        "it answers as before"
    );
}

#[cfg(feature = "constrained")]
mod constrained {
    use serde_json::{Value, json};
    use updraft_chat::TokenizerExt;

    use super::*;
    use crate::Constraint;

    fn asking(constraint: Constraint, seed: u64) -> GenerateRequest {
        GenerateRequest {
            sampling: SamplingParams::seeded(seed),
            stop_token_ids: vec![256],
            constraint: Some(constraint),
            ..GenerateRequest::greedy("tiny", (0..20).collect(), 200)
        }
    }

    async fn answer(engine: &dyn Engine, request: GenerateRequest) -> (String, bool) {
        let events = run(engine, request).await;
        let ids: Vec<u32> = events
            .iter()
            .filter_map(|event| match event {
                TokenEvent::Token { id, .. } => Some(*id),
                _ => None,
            })
            .collect();
        let reason = crate::FinishReason::Stop;
        let ended =
            matches!(events.last(), Some(TokenEvent::Finished { reason: r, .. }) if *r == reason);
        (chat().tokenizer().decode(&ids), ended)
    }

    /// A random model, which alone writes noise, writes what the schema says.
    #[tokio::test]
    async fn answers_follow_their_schema() {
        let engine = engine(&small());
        let schema = json!({
            "type": "object", "required": ["n", "ok"], "additionalProperties": false,
            "properties": {"n": {"$ref": "#/$defs/n"}, "ok": {"enum": ["yes", "no"]}},
            "$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        });
        for seed in 0..5 {
            let constraint = Constraint::json_schema(schema.clone()).expect("small");
            let (text, ended) = answer(&*engine, asking(constraint, seed)).await;
            let value: Value = serde_json::from_str(&text).expect(&text);
            assert!(ended, "{text}");
            assert!(value["n"].as_u64().is_some_and(|n| n < 100), "{text}");
            assert!(
                ["yes", "no"].map(Value::from).contains(&value["ok"]),
                "{text}"
            );
            assert_eq!(value.as_object().map(serde_json::Map::len), Some(2));
        }
        let (text, ended) = answer(&*engine, asking(Constraint::JsonObject, 1)).await;
        assert!(text.starts_with('{'));
        assert!(
            !ended || serde_json::from_str::<Value>(&text).is_ok(),
            "{text}"
        );
    }

    #[tokio::test]
    async fn schemas_that_cannot_be_used_are_refused() {
        let engine = engine(&small());
        for schema in [
            json!({"type": "nonsense"}),
            json!({"type": "string", "pattern": "("}),
            json!({"$ref": "http://169.254.169.254/"}),
            json!({"type": 5}),
        ] {
            let constraint = Constraint::json_schema(schema.clone()).expect("small");
            let refused = engine.generate(asking(constraint, 0)).await;
            assert!(
                matches!(refused, Err(Error::InvalidRequest { .. })),
                "{schema}"
            );
        }
        // A billion repetitions cost no more than the tokens that were asked for.
        let huge = json!({"type": "string", "pattern": "^((a{1000}){1000}){1000}$"});
        let constraint = Constraint::json_schema(huge).expect("small");
        let request = GenerateRequest {
            max_tokens: 20,
            ..asking(constraint, 0)
        };
        let (text, ended) = answer(&*engine, request).await;
        assert_eq!((text.as_str(), ended), ("\"aaaaaaaaaaaaaaaaaaa", false));
        crate::conformance::until_idle(&engine).await;
    }
}
