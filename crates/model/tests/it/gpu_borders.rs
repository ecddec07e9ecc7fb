//! An adapter that is trained on a GPU stands in the borders of the weights: what that saves, and that it cannot be seen.

use candle_core::DType;
use updraft_model::{
    Activations, Adapter, Architecture, Decoder, LoraConfig, Part, TargetModules, tiny,
};
#[cfg(feature = "cuda-emulator")]
// which counts what is multiplied, and has as much memory as is wanted
use updraft_model::{Batch, Gpu, Gradients};

use crate::gpu::{backward, error, on_gpu};
use crate::world::{World, documents, one_part, uneven_lora};

fn lora(r: usize, modules: &[&str]) -> LoraConfig {
    let modules = modules.iter().map(|&module| module.to_owned());
    LoraConfig {
        r,
        target_modules: TargetModules::Names(modules.collect()),
        ..LoraConfig::default()
    }
}

fn parts() -> [Part; 1] {
    [one_part(&documents(&[7, 4], 1))]
}

fn stored(decoder: &Decoder, adapter: &Adapter) -> (f64, Vec<f64>) {
    backward(decoder, adapter, &parts(), Activations::Stored)
}

/// Single maps of a group, whole groups, ranks that are no multiple of eight or another one's, layers without.
#[test]
fn gpu_adapters_of_any_maps_and_ranks_have_the_cpus_gradients() {
    for gpu in tiny::gpus() {
        let world = World::new(Architecture::Qwen3);
        let (reference, decoder) = (
            world.decoder(DType::F32, 1),
            on_gpu(&world, DType::F32, &gpu),
        );
        let all = [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ];
        for lora in [
            lora(3, &["k_proj"]),
            lora(16, &all),
            lora(11, &["v_proj", "gate_proj", "layers.1.mlp.down_proj"]),
            uneven_lora(),
        ] {
            let adapter = world.adapter(&lora, 4);
            let (loss, gradients) = stored(&reference, &adapter);
            let (own, own_gradients) = stored(&decoder, &adapter);
            let off = error(&own_gradients, &gradients);
            assert!(off < 1e-5, "gradients off by {off:.1e} for {lora:?}");
            assert!((own / loss - 1.0).abs() < 1e-5, "{own}, {loss}");
        }
    }
}

#[test]
fn gpu_adapters_that_take_turns_have_the_bits_of_their_own_decoders() {
    for gpu in tiny::gpus() {
        for dtype in [DType::F32, DType::BF16] {
            let world = World::new(Architecture::Llama);
            let adapters = [
                world.adapter(&uneven_lora(), 1),
                world.adapter(&lora(20, &["q_proj", "k_proj", "o_proj", "up_proj"]), 2),
                world.adapter(&uneven_lora(), 3),
            ];
            let alone = adapters
                .iter()
                .map(|adapter| stored(&on_gpu(&world, dtype, &gpu), adapter));
            let alone: Vec<_> = alone.collect();
            let shared = on_gpu(&world, dtype, &gpu);
            for turn in [0, 1, 0, 2, 1, 2] {
                assert_eq!(stored(&shared, &adapters[turn]), alone[turn], "{turn}");
            }
        }
    }
}

/// Passes beside the weights among them, which other threads run.
#[test]
fn gpu_threads_share_a_decoder() {
    for gpu in tiny::gpus() {
        let world = World::new(Architecture::Llama);
        let adapters = [
            world.adapter(&uneven_lora(), 1),
            world.adapter(&lora(9, &["v_proj", "down_proj"]), 2),
        ];
        let decoder = on_gpu(&world, DType::F32, &gpu);
        let base = |decoder: &Decoder| decoder.loss(&parts(), None).expect("sound parts");
        let expected = adapters.each_ref().map(|adapter| stored(&decoder, adapter));
        let expected_base = base(&decoder);
        std::thread::scope(|scope| {
            for (adapter, expected) in adapters.iter().zip(&expected) {
                let decoder = &decoder;
                scope.spawn(move || {
                    for _ in 0..3 {
                        assert_eq!(stored(decoder, adapter), *expected);
                    }
                });
            }
            for _ in 0..6 {
                assert_eq!(base(&decoder), expected_base);
            }
        });
    }
}

#[test]
fn gpu_changed_values_are_seen() {
    for gpu in tiny::gpus() {
        let world = World::new(Architecture::Qwen2);
        let decoder = on_gpu(&world, DType::F32, &gpu);
        let mut adapter = world.adapter(&uneven_lora(), 4);
        let before = stored(&decoder, &adapter);
        adapter
            .update(|values| values.iter_mut().for_each(|value| *value *= 1.5))
            .expect("f32");
        let after = stored(&decoder, &adapter);
        assert_ne!(after, before);
        assert_eq!(after, stored(&on_gpu(&world, DType::F32, &gpu), &adapter));
    }
}

/// Of each group one product more, of its rank; beside the weights it is one more for each map, which goes over all of the
/// group's output once more.
#[cfg(feature = "cuda-emulator")]
#[test]
fn gpu_a_group_is_two_products_each_way() {
    let world = World::new(Architecture::Qwen2);
    let (gpu, dtype) = (Gpu::emulated(), DType::BF16);
    let adapter = world.adapter(&LoraConfig::default(), 4);
    let decoder = on_gpu(&world, dtype, &gpu);
    let part = one_part(&documents(&[21, 11], 1));
    let tokens = part.batch.num_tokens();
    let counted = |run: &dyn Fn()| {
        let before = gpu.emulated_traffic();
        run();
        let after = gpu.emulated_traffic();
        let products = after.products - before.products;
        (products, after.product_bytes - before.product_bytes)
    };
    let loss = |adapter| {
        let parts = std::slice::from_ref(&part);
        counted(&|| assert!(decoder.loss(parts, adapter).is_ok()))
    };
    let forward = |rows: Vec<Option<usize>>| {
        let mut batch = Batch {
            adapters: rows,
            ..part.batch.clone()
        };
        batch.logit_rows.clear();
        counted(&|| assert!(decoder.forward(&batch, &[&adapter], None).is_ok()))
    };
    let (layers, groups, maps) = (2, 4, 7);
    let (bare, bordered) = (loss(None), loss(Some(&adapter)));
    assert_eq!(bordered.0, bare.0 + layers * groups);
    let (plain, beside) = (forward(vec![None; 2]), forward(vec![Some(0); 2]));
    assert_eq!(beside.0, plain.0 + layers * (groups + maps));

    // Qwen2's, 32 wide with 16 of k and of v, and 80 inside; ranks of 16 for each map.
    let dims = [(32, 64, 48), (32, 32, 16), (32, 160, 32), (80, 32, 16)];
    let product =
        |rows: usize, inner: usize, cols: usize| rows * inner + inner * cols + rows * cols;
    let more = dims.map(|(d_in, d_out, ranks)| {
        let low = product(tokens, d_in, ranks);
        low + product(tokens, d_in + ranks, d_out) - product(tokens, d_in, d_out)
    });
    let more = layers as usize * dtype.size_in_bytes() * more.iter().sum::<usize>();
    assert_eq!(bordered.1 - bare.1, more as u64);
    // Beside the weights the output is read and written once more; in borders the other maps' zeros are read.
    let saved = dims.map(|(_, d_out, ranks)| d_out * (2 * tokens - (ranks - 16)));
    let saved = layers as usize * dtype.size_in_bytes() * saved.iter().sum::<usize>();
    assert_eq!(beside.1 - plain.1, (more + saved) as u64);

    let mut gradients = Gradients::zeros(&adapter).expect("zeros");
    let mut step = |activations| {
        let parts = std::slice::from_ref(&part);
        let before = gpu.emulated_traffic().products;
        decoder
            .loss_and_backward(parts, &adapter, 1.0, &mut gradients, activations)
            .expect("sound parts");
        gpu.emulated_traffic().products - before
    };
    // Back through the head; of each group its two and the gradients of `A`, of each map that of its `B`.
    let back = 1 + layers * (3 * groups + maps);
    assert_eq!(step(Activations::Stored), bordered.0 + back);
    let again = layers * 2 * groups;
    assert_eq!(step(Activations::Recomputed), bordered.0 + back + again);
}

/// Wherever memory ends while borders are made, the decoder goes on with the adapter that stood there before, and with
/// that one when there is enough.
#[cfg(feature = "cuda-emulator")]
#[test]
fn gpu_borders_that_did_not_fit_are_made_when_they_do() {
    let world = World::new(Architecture::Qwen2);
    let (small, large) = (
        world.adapter(&lora(3, &["q_proj", "o_proj"]), 4),
        world.adapter(&LoraConfig::default(), 4),
    );
    let alone = |adapter| stored(&on_gpu(&world, DType::F32, &Gpu::emulated()), adapter);
    let expected = [&small, &large].map(alone);
    let all = 1 << 24;
    for spare in [20_000, 70_000, 120_000, 170_000] {
        let gpu = Gpu::emulated_with(all);
        let decoder = on_gpu(&world, DType::F32, &gpu);
        assert_eq!(stored(&decoder, &small), expected[0]);
        let mut others = Vec::new();
        while let Ok(other) = gpu.zeros::<u8>(1000) {
            others.push(other);
        }
        others.truncate(others.len() - spare / 1000);
        let mut gradients = Gradients::zeros(&large).expect("zeros");
        let activations = Activations::Stored;
        let refused = decoder
            .loss_and_backward(&parts(), &large, 1.0, &mut gradients, activations)
            .expect_err("too little memory");
        assert!(refused.to_string().contains("memory"), "{refused}");
        others.clear();
        assert_eq!(stored(&decoder, &small), expected[0], "{spare}");
        assert_eq!(stored(&decoder, &large), expected[1], "{spare}");
    }
}
