//! What must not change an answer: company, chunks, preemption, merging.

use super::*;

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
        kv_cache_bytes: Some(40 * KvPages::bytes_per_block(&config(), 4, candle_core::DType::F32)),
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

/// The same for the weights that servers really have: halves, and nine bits a number.
#[tokio::test]
async fn stored_weights_answer_alike_at_any_load_cut_and_prefix() {
    for quantization in [None, Some(Quantization::Q8_0)] {
        let engine = |options: &EngineOptions| {
            let (config, weights, device) = (config(), weights(), Device::Cpu);
            let threads = Threads::single();
            let decoder = match quantization {
                None => {
                    let dtype = candle_core::DType::BF16;
                    Decoder::load(&config, &weights, dtype, &device, &threads)
                }
                Some(kind) => Decoder::load_quantized(&config, &weights, kind, &device, &threads),
            };
            let model = ServedModel {
                decoder: decoder.expect("sound weights"),
                ..served(&weights, &[])
            };
            ModelEngine::new(model, options).expect("sound options")
        };
        let asked = || requests("tiny");
        let off = EngineOptions {
            prefix_cache: false,
            ..EngineOptions::default()
        };
        let alone = sharing::answers(one_by_one(&engine(&off), asked()).await);
        for max_num_batched_tokens in [16, 17, 512] {
            let options = EngineOptions {
                max_num_batched_tokens,
                block_size: 4,
                ..small()
            };
            let engine = engine(&options);
            let cold = sharing::answers(together(&engine, asked()).await);
            assert_eq!(
                cold, alone,
                "{quantization:?}, {max_num_batched_tokens} at once"
            );
            let warm = sharing::answers(together(&engine, asked()).await);
            assert_eq!(warm, alone, "{quantization:?}, from the cache");
            assert!(engine.stats()[0].prefix_cache_hits > 0);
        }
    }
}

/// Not of a few likely tokens but of the whole vocabulary, at every position.
#[test]
fn an_adapters_logits_are_its_merged_models() {
    let adapter = adapter(1);
    let base = weights();
    let merged = merge::merge(&base, &config(), &adapter).expect("it fits");
    let merged: Result<Vec<_>, _> = merged
        .map(|file| file.map(|(name, bytes)| (name, bytes.into())))
        .collect();
    let merged = Weights::from_files(merged.expect("f32 weights")).expect("sound files");
    let ids: Vec<u32> = (0..60).map(|at| at * 37 % 256).collect();
    let logits = |weights: &Weights, adapters: &[&Adapter]| -> Vec<f32> {
        let decoder = served(weights, &[]).decoder;
        let mut batch = Batch::packed([&ids[..]]);
        batch.logit_rows = (0..ids.len() as u32).collect();
        if !adapters.is_empty() {
            batch.adapters = vec![Some(0)];
        }
        let hidden = decoder.forward(&batch, adapters, None).expect("sound");
        let logits = decoder.logits(&hidden).expect("logits");
        logits.to_vec().expect("f32")
    };
    let (unmerged, merged) = (logits(&base, &[&adapter]), logits(&merged, &[]));
    assert_eq!(unmerged.len(), ids.len() * config().vocab_size);
    let difference = |a: &[f32], b: &[f32]| {
        let pairs = a.iter().zip(b).map(|(a, b)| (a - b).abs());
        pairs.fold(0.0, f32::max)
    };
    let apart = difference(&unmerged, &merged);
    assert!(apart < 1e-4, "{apart:e}");
    let plain = difference(&unmerged, &logits(&base, &[]));
    assert!(plain > 1e-2, "the adapter does something: {plain:e}");
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
            .and_then(|logits| logits.to_vec())
            .expect("logits")
    };
    for request in requests("tiny").into_iter().skip(3).step_by(5) {
        let mut ids = request.prompt_ids.clone();
        for event in run(&*engine(&small()), request).await {
            let TokenEvent::Token { id, logprobs } = event else {
                continue;
            };
            let expected = crate::sampler::token_logprobs(&last_logits(&ids), id, 2, &[]);
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
