//! The decoder on a GPU computes what it computes on the CPU: on the emulator where that is compiled, and on the first GPU
//! where there is one.

use candle_core::{DType, Device};
use updraft_model::{
    Activations, Adapter, Architecture, Batch, Decoder, Gpu, Gradients, LoraConfig, Part, Threads,
    tiny,
};

use crate::world::{World, documents, one_part, uneven_lora};

pub(crate) fn on_gpu(world: &World, dtype: DType, gpu: &Gpu) -> Decoder {
    let threads = Threads::single();
    Decoder::load_on_gpu(&world.config, &world.weights, dtype, gpu, &threads).expect("loads")
}

pub(crate) fn backward(
    decoder: &Decoder,
    adapter: &Adapter,
    parts: &[Part],
    activations: Activations,
) -> (f64, Vec<f64>) {
    let mut gradients = Gradients::zeros(adapter).expect("zeros");
    let denom = parts.iter().map(Part::num_labels).sum::<usize>() as f64;
    let loss = decoder
        .loss_and_backward(parts, adapter, denom, &mut gradients, activations)
        .expect("sound parts");
    (loss, gradients.to_vec().expect("readable"))
}

/// ‖actual − expected‖ / ‖expected‖
pub(crate) fn error(actual: &[f64], expected: &[f64]) -> f64 {
    let square = |x: f64| x * x;
    let size: f64 = expected.iter().map(|&e| square(e)).sum();
    let off: f64 = actual
        .iter()
        .zip(expected)
        .map(|(a, e)| square(a - e))
        .sum();
    (off / size).sqrt()
}

#[test]
fn loss_and_gradients_are_those_of_the_cpu() {
    for gpu in tiny::gpus() {
        for architecture in [
            Architecture::Llama,
            Architecture::Qwen2,
            Architecture::Qwen3,
        ] {
            let world = World::new_bf16(architecture); // weights that no type here rounds
            let adapter = world.adapter(&uneven_lora(), 4);
            let parts = [
                one_part(&documents(&[13, 5, 8], 1)),
                one_part(&documents(&[3], 2)),
            ];
            let reference = world.decoder(DType::F32, 1);
            let (loss, gradients) = backward(&reference, &adapter, &parts, Activations::Stored);
            // bf16 rounds eight times coarser than f16, and so do they.
            for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 5e-3), (DType::BF16, 5e-2)]
            {
                let decoder = on_gpu(&world, dtype, &gpu);
                let (own, own_gradients) =
                    backward(&decoder, &adapter, &parts, Activations::Stored);
                let what = format!("{architecture:?} in {dtype:?}");
                assert!(
                    (own / loss - 1.0).abs() < tolerance,
                    "{what}: {own}, {loss}"
                );
                let off = error(&own_gradients, &gradients);
                assert!(off < tolerance, "{what}: gradients off by {off:.1e}");
                let evaluated = decoder.loss(&parts, Some(&adapter)).expect("sound parts");
                assert!(
                    (evaluated / own - 1.0).abs() < 1e-6,
                    "{what}: {evaluated}, {own}"
                );
            }
        }
    }
}

#[test]
fn dropout_and_noise_are_those_of_the_cpu() {
    for gpu in tiny::gpus() {
        let world = World::new(Architecture::Qwen2);
        let lora = LoraConfig {
            lora_dropout: 0.3,
            ..uneven_lora()
        };
        let adapter = world.adapter(&lora, 4);
        let mut part = one_part(&documents(&[9, 6], 1));
        part.seeds = vec![11, 12];
        part.neftune_noise_alpha = 5.0;
        let parts = [part];
        let reference = world.decoder(DType::F32, 1);
        let (loss, gradients) = backward(&reference, &adapter, &parts, Activations::Stored);
        let decoder = on_gpu(&world, DType::F32, &gpu);
        let (own, own_gradients) = backward(&decoder, &adapter, &parts, Activations::Stored);
        assert!((own / loss - 1.0).abs() < 1e-5, "{own}, {loss}");
        assert!(error(&own_gradients, &gradients) < 1e-5);
    }
}

#[test]
fn two_runs_and_recomputed_activations_have_the_same_bits() {
    for gpu in tiny::gpus() {
        let world = World::new(Architecture::Qwen2);
        let adapter = world.adapter(&uneven_lora(), 4);
        let parts = [one_part(&documents(&[10, 7], 1))];
        for dtype in [DType::F32, DType::BF16] {
            let decoder = on_gpu(&world, dtype, &gpu);
            let stored = backward(&decoder, &adapter, &parts, Activations::Stored);
            let again = backward(&decoder, &adapter, &parts, Activations::Stored);
            assert_eq!(stored, again);
            let recomputed = backward(&decoder, &adapter, &parts, Activations::Recomputed);
            assert_eq!(stored, recomputed);
        }
    }
}

/// Loaded and trained on, a GPU holds no more than was estimated, and not much less.
#[cfg(feature = "cuda-emulator")] // which counts what is held
#[test]
fn a_step_takes_what_was_estimated() {
    use updraft_model::memory::{MemoryEstimate, MicroBatch, Processor, Working};
    for (architecture, dtype, activations) in [
        (Architecture::Qwen2, DType::BF16, Activations::Stored),
        (Architecture::Qwen2, DType::F32, Activations::Recomputed),
        (Architecture::Qwen3, DType::BF16, Activations::Recomputed),
    ] {
        let world = World::new(architecture);
        let adapter = world.adapter(&uneven_lora(), 4);
        let part = one_part(&documents(&[30, 20, 14], 1));
        let batch = MicroBatch {
            tokens: part.batch.num_tokens() as u64,
            trained_tokens: part.num_labels() as u64,
        };
        let gpu = Gpu::emulated();
        let decoder = on_gpu(&world, dtype, &gpu);
        backward(&decoder, &adapter, std::slice::from_ref(&part), activations);
        let work = Working {
            weights: dtype,
            activations,
            processor: Processor::Gpu,
            optimizer_moments: 0, // `train` steps, and measures it
            kept_adapters: 0,
        };
        let lora = adapter.config();
        let estimate = MemoryEstimate::new(&world.config, lora, batch, work);
        let held = decoder.gpu_memory().expect("on a GPU").peak_bytes;
        let share = held as f64 / estimate.total() as f64;
        let what = format!("{architecture:?} {dtype:?} {activations:?}");
        assert!(
            (0.75..=1.0).contains(&share),
            "{what}: {share:.3} of {estimate:?}"
        );
    }
}

/// The adapter goes to the GPU once for each change, its gradients come back once for each step; of a micro-batch go its
/// ids, positions, rows and labels, and the borders of its sequences, once, and back come its losses.
#[cfg(feature = "cuda-emulator")] // which counts what is copied
#[test]
fn nothing_is_copied_twice() {
    let world = World::new(Architecture::Qwen2);
    let mut adapter = world.adapter(&uneven_lora(), 4);
    let mut parts = [
        one_part(&documents(&[10, 7], 1)),
        one_part(&documents(&[12], 2)),
    ];
    (parts[0].seeds, parts[1].seeds) = (vec![1, 2], vec![3]);
    let gpu = Gpu::emulated();
    let decoder = on_gpu(&world, DType::BF16, &gpu);
    let step = |adapter: &Adapter, micro_batches: usize| {
        let before = gpu.emulated_traffic();
        let mut gradients = Gradients::zeros(adapter).expect("zeros");
        for _ in 0..micro_batches {
            decoder
                .loss_and_backward(&parts, adapter, 1.0, &mut gradients, Activations::Stored)
                .expect("sound parts");
        }
        gradients.with(|_| ()).expect("readable");
        let after = gpu.emulated_traffic();
        let up = after.uploaded - before.uploaded;
        (up as usize, (after.downloaded - before.downloaded) as usize)
    };
    let sum = |of: fn(&Part) -> usize| parts.iter().map(of).sum::<usize>();
    let (tokens, labels) = (sum(|part| part.batch.num_tokens()), sum(Part::num_labels));
    let tiles = 3; // a sequence of up to 64 tokens is one
    let batch_up = 4 * (2 * tokens + 2 * labels + 2 * 3 * tiles); // in two orders
    let bytes = 4 * adapter.num_parameters();
    // Where something is dropped, a key for each row, whatever the number of layers and maps.
    let dropping = world.adapter(
        &LoraConfig {
            lora_dropout: 0.5,
            ..uneven_lora()
        },
        4,
    );
    assert_eq!(
        step(&dropping, 2),
        (bytes + 2 * (batch_up + 8 * tokens), bytes + 2 * 4 * labels)
    );
    for _ in 0..2 {
        assert_eq!(
            step(&adapter, 3),
            (bytes + 3 * batch_up, bytes + 3 * 4 * labels)
        );
        assert_eq!(step(&adapter, 1), (batch_up, bytes + 4 * labels));
        adapter.update(|values| values[0] += 1.0).expect("f32");
    }
}

/// What an optimizer changes on a GPU stays there until somebody looks; what is changed here wins over it.
#[cfg(feature = "cuda-emulator")] // which counts what is copied
#[test]
fn values_that_change_on_a_gpu_are_current_for_whoever_looks() {
    let world = World::new(Architecture::Qwen2);
    let mut adapter = world.adapter(&uneven_lora(), 4);
    let mut reference = world.adapter(&uneven_lora(), 4);
    let part = [one_part(&documents(&[10, 7], 1))];
    let (gpu, other) = (Gpu::emulated(), Gpu::emulated());
    let double = |adapter: &mut Adapter, gpu: &Gpu| {
        adapter
            .update_on_gpu(gpu, |mut values| {
                let doubled = gpu.download(values.as_view()).expect("finished");
                let doubled: Vec<f32> = doubled.iter().map(|value| 2.0 * value).collect();
                let doubled = gpu.upload(&doubled).expect("memory");
                gpu.copy(doubled.view(), &values.reborrow())
                    .expect("launched");
            })
            .expect("on a GPU");
    };
    let double_here = |adapter: &mut Adapter| {
        adapter
            .update(|values| values.iter_mut().for_each(|value| *value *= 2.0))
            .expect("f32");
    };
    let values = |adapter: &Adapter| adapter.values().expect("readable");
    let downloaded = || gpu.emulated_traffic().downloaded;
    for dtype in [DType::F32, DType::BF16] {
        let decoder = on_gpu(&world, dtype, &gpu);
        let loss = |adapter: &Adapter| decoder.loss(&part, Some(adapter)).expect("a loss");
        // Where it stands, a decoder on the GPU reads it: nothing but losses comes back.
        double(&mut adapter, &gpu);
        double_here(&mut reference);
        let before = downloaded();
        let there = loss(&adapter);
        let losses = 4 * part[0].num_labels() as u64;
        assert_eq!(downloaded() - before, losses);
        assert_eq!(there.to_bits(), loss(&reference).to_bits());
        // And again, once it has read it.
        double(&mut adapter, &gpu);
        double_here(&mut reference);
        assert_ne!(there.to_bits(), loss(&reference).to_bits());
        assert_eq!(loss(&adapter).to_bits(), loss(&reference).to_bits());
        // It comes once.
        let bytes = 4 * adapter.num_parameters() as u64;
        let before = downloaded();
        assert_eq!(values(&adapter), values(&reference));
        assert_eq!(
            adapter.with(|values| values[0]).expect("f32"),
            values(&reference)[0]
        );
        assert_eq!(downloaded() - before, bytes);
        // Changed here, there, on another GPU, and here again.
        double_here(&mut adapter);
        double_here(&mut reference);
        assert_eq!(loss(&adapter).to_bits(), loss(&reference).to_bits());
        double(&mut adapter, &gpu);
        double(&mut adapter, &other);
        double(&mut adapter, &gpu);
        double_here(&mut adapter);
        (0..4).for_each(|_| double_here(&mut reference));
        assert_eq!(values(&adapter), values(&reference));
        // A copy is of the newest values, and stays.
        double(&mut adapter, &gpu);
        let copy = adapter.to_dtype(DType::F32).expect("a copy");
        double(&mut adapter, &gpu);
        double_here(&mut reference);
        assert_eq!(values(&copy), values(&reference));
        double_here(&mut reference);
        assert_eq!(values(&adapter), values(&reference));
        // Small again, so that bf16 has something to tell apart.
        for adapter in [&mut adapter, &mut reference] {
            adapter
                .update(|values| values.iter_mut().for_each(|value| *value /= 256.0))
                .expect("f32");
        }
    }
}

/// Gradients go to a GPU and come back as they are, whatever was added up before.
#[test]
fn gradients_move_between_host_and_gpu() {
    for gpu in tiny::gpus() {
        let world = World::new(Architecture::Qwen2);
        let adapter = world.adapter(&uneven_lora(), 4);
        let mut gradients = Gradients::zeros(&adapter).expect("zeros");
        let count = |gradients: &mut Gradients| {
            gradients
                .update_on_gpu(&gpu, |sums| gpu.download(sums.as_view()).expect("finished"))
                .expect("on the GPU")
        };
        assert!(count(&mut gradients).iter().all(|&sum| sum == 0.0));
        gradients
            .update(|values| {
                values
                    .iter_mut()
                    .zip(1u16..)
                    .for_each(|(v, i)| *v = i.into());
            })
            .expect("f32");
        let expected = gradients.with(<[f32]>::to_vec).expect("f32");
        assert_eq!(count(&mut gradients), expected);
        assert_eq!(count(&mut gradients), expected);
        assert_eq!(gradients.with(<[f32]>::to_vec).expect("f32"), expected);
        assert_eq!(count(&mut gradients), expected);
        gradients.zero().expect("zeros");
        assert!(count(&mut gradients).iter().all(|&sum| sum == 0.0));
        gradients.zero().expect("zeros");
        assert!(
            gradients
                .with(|all| all.iter().all(|&sum| sum == 0.0))
                .expect("f32")
        );
    }
}

#[test]
fn a_micro_batch_is_one_part_whatever_the_threads() {
    for gpu in tiny::gpus() {
        let world = World::new(Architecture::Qwen2);
        let (config, weights) = (&world.config, &world.weights);
        let threads = Threads::new(3).expect("threads");
        let there = Decoder::load_on_gpu(config, weights, DType::F32, &gpu, &threads);
        assert_eq!(there.expect("loads").num_parts(), 1);
        assert_eq!(world.decoder(DType::F32, 3).num_parts(), 3);
    }
}

#[test]
fn logits_are_those_of_the_cpu() {
    for gpu in tiny::gpus() {
        let world = World::new(Architecture::Llama);
        let adapter = world.adapter(&uneven_lora(), 4);
        let ids: Vec<u32> = (0..11).map(|i| i * 7 % 96).collect();
        let mut batch = Batch::packed([&ids[..]]);
        batch.adapters = vec![Some(0)];
        batch.logit_rows = vec![10, 3];
        let logits = |decoder: &Decoder| -> Vec<f64> {
            let hidden = decoder.forward(&batch, &[&adapter], None).expect("sound");
            let logits = decoder.logits(&hidden).and_then(|logits| logits.to_vec());
            logits.expect("logits").into_iter().map(f64::from).collect()
        };
        let expected = logits(&world.decoder(DType::F32, 1));
        assert!(error(&logits(&on_gpu(&world, DType::F32, &gpu)), &expected) < 1e-5);
        assert!(error(&logits(&on_gpu(&world, DType::BF16, &gpu)), &expected) < 2e-2);
    }
}

#[test]
fn what_needs_the_host_says_so() {
    for gpu in tiny::gpus() {
        let config = tiny::config(Architecture::Qwen2);
        let weights = tiny::weights(&config, 7);
        let threads = Threads::single();
        let decoder =
            Decoder::load_on_gpu(&config, &weights, DType::F32, &gpu, &threads).expect("loads");
        let whole = LoraConfig {
            modules_to_save: vec!["embed_tokens".to_owned()],
            ..LoraConfig::default()
        };
        let adapter = Adapter::init_over(&whole, &config, &weights, 1, &Device::Cpu).expect("fits");
        let refused = decoder
            .with_saved_modules(&adapter)
            .expect_err("whole modules");
        assert!(refused.to_string().contains("on the CPU"), "{refused}");
        let f64 = Decoder::load_on_gpu(&config, &weights, DType::F64, &gpu, &threads);
        assert!(f64.expect_err("no f64").to_string().contains("BF16"));
    }
}
