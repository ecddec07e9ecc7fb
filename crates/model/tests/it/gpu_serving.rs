//! Pages on a GPU: what they give is what a whole pass gives, and what the CPU gives; on the emulator where that is
//! compiled, and on the first GPU where there is one.

use candle_core::DType;
use updraft_model::{Adapter, Architecture, Batch, Decoder, Gpu, LoraConfig, Threads, tiny};

use crate::serving::{BLOCK_SIZE, run, step};
use crate::world::{World, documents};

const DTYPES: [(DType, f32); 3] = [(DType::F32, 1e-5), (DType::F16, 1e-2), (DType::BF16, 1e-1)];

fn on_gpu(world: &World, dtype: DType, gpu: &Gpu) -> Decoder {
    let threads = Threads::single();
    Decoder::load_on_gpu(&world.config, &world.weights, dtype, gpu, &threads).expect("loads")
}

/// The largest difference of two lists of logits.
fn furthest(actual: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    assert_eq!(actual.len(), expected.len());
    let pairs = actual.iter().flatten().zip(expected.iter().flatten());
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, |most, apart| {
        if apart.is_nan() {
            f32::INFINITY
        } else {
            most.max(apart)
        }
    })
}

fn full_pass(decoder: &Decoder, ids: &[u32], adapter: Option<&Adapter>) -> Vec<Vec<f32>> {
    let mut batch = Batch::packed([ids]);
    batch.logit_rows = (0..ids.len() as u32).collect();
    batch.adapters = vec![adapter.map(|_| 0)];
    let hidden = decoder.forward(&batch, adapter.as_slice(), None);
    let logits = hidden.and_then(|hidden| decoder.logits(&hidden)?.to_tensor());
    logits
        .and_then(|logits| Ok(logits.to_vec2()?))
        .expect("logits")
}

#[test]
fn gpu_cached_decoding_equals_a_full_pass() {
    for gpu in tiny::gpus() {
        for architecture in [
            Architecture::Llama,
            Architecture::Qwen2,
            Architecture::Qwen3,
        ] {
            let world = World::new_bf16(architecture);
            let adapter = world.adapter(&LoraConfig::default(), 2);
            let ids = &documents(&[23], 8)[0].0;
            let reference = full_pass(&world.decoder(DType::F32, 1), ids, Some(&adapter));
            for (dtype, tolerance) in DTYPES {
                let decoder = on_gpu(&world, dtype, &gpu);
                let mut pages = decoder.new_pages(64, BLOCK_SIZE).expect("64 pages");
                let chunk =
                    |start: usize, end: usize| step(&[(0, &ids[start..end], start, Some(0))]);
                let mut cached = run(&decoder, &[&adapter], &mut pages, &chunk(0, 10));
                cached.extend(run(&decoder, &[&adapter], &mut pages, &chunk(10, 17)));
                for position in 17..ids.len() {
                    let batch = chunk(position, position + 1);
                    cached.extend(run(&decoder, &[&adapter], &mut pages, &batch));
                }
                let what = format!("{architecture:?} in {dtype:?}");
                let apart = furthest(&cached, &full_pass(&decoder, ids, Some(&adapter)));
                assert!(apart < tolerance, "{what}: {apart:e} from the whole pass");
                let apart = furthest(&cached, &reference);
                assert!(apart < tolerance, "{what}: {apart:e} from the CPU");
            }
        }
    }
}

/// A prompt, one in the middle of its prompt and one that decodes, each with another adapter or none, in one batch.
#[test]
fn gpu_batches_mix_prompts_tokens_and_adapters() {
    for gpu in tiny::gpus() {
        let world = World::new_bf16(Architecture::Qwen2);
        let adapters = [
            world.adapter(&LoraConfig::default(), 2),
            world.adapter(&LoraConfig::default(), 3),
        ];
        let adapters = [&adapters[0], &adapters[1]];
        let documents = documents(&[19, 11, 30], 8);
        let ids: Vec<&[u32]> = documents.iter().map(|(ids, _)| &ids[..]).collect();
        let batches = [
            step(&[(1, &ids[1][..10], 0, None), (2, &ids[2][..8], 0, Some(0))]),
            step(&[
                (0, ids[0], 0, Some(1)),
                (1, &ids[1][10..], 10, None),
                (2, &ids[2][8..], 8, Some(0)),
            ]),
        ];
        let both = |decoder: &Decoder| {
            let mut pages = decoder.new_pages(64, BLOCK_SIZE).expect("64 pages");
            batches
                .each_ref()
                .map(|batch| run(decoder, &adapters, &mut pages, batch))
        };
        let expected = both(&world.decoder(DType::F32, 1));
        for (dtype, tolerance) in DTYPES {
            let decoder = on_gpu(&world, dtype, &gpu);
            let actual = both(&decoder);
            for (actual, expected) in actual.iter().zip(&expected) {
                let apart = furthest(actual, expected);
                assert!(apart < tolerance, "{dtype:?}: {apart:e}");
            }
            assert_eq!(actual, both(&decoder), "{dtype:?}: the same bits again");
        }
    }
}

/// A step of decoding copies ids, positions, rows and places up, and the logits that are looked at down.
#[cfg(feature = "cuda-emulator")] // which counts what is copied
#[test]
fn gpu_decoding_leaves_hidden_states_where_they_are() {
    let world = World::new(Architecture::Llama);
    let gpu = Gpu::emulated();
    let decoder = on_gpu(&world, DType::BF16, &gpu);
    let mut pages = decoder.new_pages(64, BLOCK_SIZE).expect("64 pages");
    let batch = step(&[(0, &[5, 6, 7], 0, None)]);
    let before = gpu.emulated_traffic();
    let hidden = decoder
        .forward(&batch, &[], Some(&mut pages))
        .expect("sound");
    let last = hidden.rows(2..3).expect("three rows");
    let logits = decoder.logits(&last).expect("logits");
    assert_eq!(gpu.emulated_traffic().downloaded, before.downloaded);
    assert_eq!(logits.to_vec().expect("f32").len(), world.config.vocab_size);
    let after = gpu.emulated_traffic();
    let row_bytes = 4 * world.config.vocab_size as u64;
    assert_eq!(after.downloaded - before.downloaded, row_bytes);
    assert!(after.uploaded - before.uploaded < 200, "{after:?}");
}
