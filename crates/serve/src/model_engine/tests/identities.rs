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
