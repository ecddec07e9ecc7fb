//! The engine over a decoder on a GPU: the emulator where that is compiled, and the first GPU where there is one.

use candle_core::DType;
use updraft_model::Gpu;

use super::*;

fn served_on(gpu: &Gpu, dtype: DType, adapters: &[(&str, Arc<Adapter>)]) -> ServedModel {
    let threads = Threads::single();
    let decoder = Decoder::load_on_gpu(&config(), &weights(), dtype, gpu, &threads);
    ServedModel {
        decoder: decoder.expect("sound weights"),
        ..served(&weights(), adapters)
    }
}

fn a_gpu() -> Option<Gpu> {
    tiny::gpus().pop()
}

/// The promises of every engine.
#[cfg(feature = "cuda-emulator")]
mod base {
    use super::*;

    crate::conformance_tests!(Arc::new(
        ModelEngine::new(
            served_on(&Gpu::emulated(), DType::F32, &[("a", adapter(1))]),
            &small()
        )
        .expect("sound options")
    ));
}

async fn tokens(engine: &dyn Engine, request: GenerateRequest) -> Vec<u32> {
    let events = run(engine, request).await;
    let ids = events.iter().filter_map(|event| match event {
        TokenEvent::Token { id, .. } => Some(*id),
        _ => None,
    });
    ids.collect()
}

/// In f32 the greedy answers are the CPU's, and so are those of settings that leave one token.
#[tokio::test]
async fn gpu_answers_are_those_of_the_cpu() {
    let Some(gpu) = a_gpu() else { return };
    let adapters = [("a", adapter(1))];
    let there = ModelEngine::new(served_on(&gpu, DType::F32, &adapters), &small());
    let here = ModelEngine::new(served(&weights(), &adapters), &small());
    let (there, here) = (there.expect("sound"), here.expect("sound"));
    let banned = SamplingParams {
        logit_bias: (0..200).map(|id| (id, -100.0)).collect(),
        repetition_penalty: 1.5,
        frequency_penalty: 0.3,
        ..SamplingParams::greedy()
    };
    let likeliest = SamplingParams {
        top_k: 1,
        ..SamplingParams::seeded(3)
    };
    let only = SamplingParams {
        allowed_token_ids: vec![5, 6, 7].into(),
        ..SamplingParams::greedy()
    };
    for (index, sampling) in [SamplingParams::greedy(), banned, likeliest, only]
        .into_iter()
        .enumerate()
    {
        for model in ["tiny", "a"] {
            let request = GenerateRequest {
                sampling: sampling.clone(),
                ..GenerateRequest::greedy(model, (3..20).collect(), 12)
            };
            let expected = tokens(&here, request.clone()).await;
            assert_eq!(expected.len(), 12);
            let actual = tokens(&there, request).await;
            assert_eq!(actual, expected, "settings {index} of {model}");
        }
    }
}

/// Only what somebody asked for leaves the GPU: a token's id, unless log-probabilities are wanted.
#[cfg(feature = "cuda-emulator")] // which counts what is copied
#[tokio::test]
async fn gpu_logits_stay_there() {
    let gpu = Gpu::emulated();
    let engine = ModelEngine::new(served_on(&gpu, DType::F32, &[]), &small()).expect("sound");
    let plain = GenerateRequest {
        sampling: SamplingParams::seeded(5),
        ..GenerateRequest::greedy("tiny", vec![1, 2, 3], 10)
    };
    let downloaded = |gpu: &Gpu| gpu.emulated_traffic().downloaded;
    let before = downloaded(&gpu);
    assert_eq!(tokens(&engine, plain.clone()).await.len(), 10);
    assert_eq!(downloaded(&gpu) - before, 10 * 4);
    let asked = GenerateRequest {
        logprobs: Some(2),
        ..plain
    };
    let before = downloaded(&gpu);
    assert_eq!(tokens(&engine, asked).await.len(), 10);
    assert_eq!(
        downloaded(&gpu) - before,
        10 * 4 * config().vocab_size as u64
    );
}

/// Weights, pages and a full step fit what was planned for a GPU of a given size, and most of it is used.
#[cfg(feature = "cuda-emulator")] // which has as much memory as is wanted
#[tokio::test]
async fn gpu_memory_is_planned() {
    let limit = 2 << 20;
    let gpu = Gpu::emulated_with(limit);
    let options = EngineOptions {
        max_num_seqs: 40,
        max_num_batched_tokens: 80,
        ..EngineOptions::default()
    };
    let engine = ModelEngine::new(served_on(&gpu, DType::F32, &[]), &options).expect("it fits");
    let requests = (0..40).map(|seed| GenerateRequest {
        sampling: SamplingParams::seeded(seed),
        ..GenerateRequest::greedy("tiny", (0..60).map(|id| id * 3 % 250).collect(), 20)
    });
    let answers = join_all(requests.map(|request| tokens(&engine, request))).await;
    assert!(answers.iter().all(|tokens| tokens.len() == 20));
    let peak = gpu.peak_bytes().expect("counted");
    let share = peak as f64 / limit as f64;
    assert!((0.6..=1.0).contains(&share), "{share:.2} of the memory");
}
