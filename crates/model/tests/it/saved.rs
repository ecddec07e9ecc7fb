//! Modules that are trained whole: `modules_to_save`, and every weight there is.

use candle_core::{DType, Device, Tensor};
use updraft_model::{
    Activations, Adapter, Architecture, Batch, Combination, Decoder, Error, Gradients, LoraConfig,
    ModelConfig, Role, TargetModules, Threads, Weights, combine, merge, peft,
};

use crate::world::{World, documents, one_part, uneven_lora};

fn saving(names: &[&str], ensure_weight_tying: bool) -> LoraConfig {
    LoraConfig {
        modules_to_save: names.iter().map(|&name| name.to_owned()).collect(),
        ensure_weight_tying,
        ..uneven_lora()
    }
}

/// In mid-training: no number is the base's any more.
fn moved(world: &World, lora: &LoraConfig) -> Adapter {
    let mut adapter = world.adapter(lora, 3);
    let change = |values: &mut [f32]| {
        for (value, index) in values.iter_mut().zip(0u32..) {
            *value += ((index.wrapping_mul(2_654_435_761) >> 20) as f32 - 2048.0) / 65_536.0;
        }
    };
    adapter.update(change).expect("f32 on the CPU");
    adapter
}

fn names(adapter: &Adapter) -> Vec<&str> {
    let saved = |role: &'_ Role| matches!(role, Role::Saved(_));
    let parameters = adapter.parameters().iter();
    let saved = parameters.filter(|parameter| saved(&parameter.role));
    saved.map(|parameter| &parameter.name[..]).collect()
}

fn logits(decoder: &Decoder, adapter: Option<&Adapter>) -> Vec<f32> {
    let mut batch = Batch::packed([&[5, 6, 7, 90][..], &[8, 9]]);
    batch.logit_rows = vec![0, 3, 5];
    batch.adapters = vec![adapter.map(|_| 0); 2];
    let hidden = decoder.forward(&batch, adapter.as_slice(), None);
    let logits = hidden.and_then(|hidden| decoder.logits(&hidden)?.to_vec());
    logits.expect("logits")
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().and_then(|t| t.to_vec1()).expect("f32")
}

fn trained_logits(decoder: &Decoder, adapter: &Adapter) -> Vec<f32> {
    let decoder = decoder.with_saved_modules(adapter).expect("it fits");
    logits(&decoder, Some(adapter))
}

#[test]
fn names_are_matched_as_peft_matches_them() {
    const EMBEDDING: &str = "base_model.model.model.embed_tokens.weight";
    const HEAD: &str = "base_model.model.lm_head.weight";
    let world = World::new(Architecture::Qwen2); // tied
    let saved = |lora: &LoraConfig| {
        let adapter = world.adapter(lora, 1);
        names(&adapter)
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(saved(&saving(&["lm_head"], false)), [HEAD]);
    assert_eq!(saved(&saving(&["model.embed_tokens"], false)), [EMBEDDING]);
    let both = saving(&["embed_tokens", "lm_head"], false);
    assert_eq!(saved(&both), [EMBEDDING, HEAD]);
    assert_eq!(saved(&saving(&["lm_head"], true)), [EMBEDDING]);
    let norms = saved(&saving(&["norm"], false)); // "input_layernorm" ends so too
    assert_eq!(norms.len(), 5, "{norms:?}");
    let full = world.adapter(&LoraConfig::full_fine_tuning(), 1);
    assert!(full.is_whole());
    assert_eq!(full.num_parameters() as u64, world.config.num_parameters());
}

#[test]
fn what_begins_as_the_base_changes_nothing_at_first() {
    for architecture in [Architecture::Qwen2, Architecture::Qwen3] {
        let world = World::new(architecture);
        let decoder = world.decoder(DType::F32, 1);
        let expected = logits(&decoder, None);
        for lora in [
            LoraConfig::full_fine_tuning(),
            LoraConfig {
                target_modules: TargetModules::Names(Vec::new()),
                ..saving(&["lm_head", "embed_tokens"], false)
            },
        ] {
            let adapter = world.adapter(&lora, 1);
            assert_eq!(trained_logits(&decoder, &adapter), expected);
        }
    }
}

#[test]
fn only_the_decoder_made_for_it_runs_it() {
    let world = World::new(Architecture::Llama);
    let (decoder, adapter) = (
        world.decoder(DType::F32, 1),
        moved(&world, &saving(&["lm_head"], false)),
    );
    let mut batch = Batch::packed([&[1, 2][..]]);
    batch.adapters = vec![Some(0)];
    let other = world.adapter(&saving(&["lm_head"], false), 1);
    let with_other = decoder.with_saved_modules(&other).expect("it fits");
    for decoder in [&decoder, &with_other] {
        let error = decoder
            .forward(&batch, &[&adapter], None)
            .expect_err("another head");
        assert!(error.to_string().contains("modules_to_save"), "{error}");
    }
    // It sees what training does to the adapter.
    let with = decoder.with_saved_modules(&adapter).expect("it fits");
    let before = logits(&with, Some(&adapter));
    let mut adapter = adapter;
    adapter
        .update(|values| values.iter_mut().for_each(|value| *value *= 1.5))
        .expect("f32 on the CPU");
    assert_ne!(logits(&with, Some(&adapter)), before);
}

#[test]
fn files_bring_back_the_bits_and_merging_the_logits() {
    let tied = World::new(Architecture::Qwen2);
    let untied = World::new(Architecture::Qwen3);
    for (world, lora, unties) in [
        (&tied, saving(&["lm_head"], false), true),
        (&tied, saving(&["embed_tokens"], false), true),
        (
            &tied,
            saving(&["embed_tokens", "lm_head", "norm"], false),
            true,
        ),
        (&tied, saving(&["embed_tokens"], true), false),
        (&tied, LoraConfig::full_fine_tuning(), false),
        (&untied, saving(&["lm_head", "q_norm"], false), false),
        (&untied, LoraConfig::full_fine_tuning(), false),
    ] {
        let adapter = moved(world, &lora);
        let files = peft::write_adapter(&adapter).expect("writes");
        let again = peft::read_adapter(&files.config_json, &files.safetensors, &world.config)
            .expect("our own files");
        assert_eq!(again.config(), adapter.config());
        assert_eq!(again.parameters(), adapter.parameters());
        assert_eq!(again.values().expect("f32"), adapter.values().expect("f32"));

        let decoder = world.decoder(DType::F32, 1);
        let expected = trained_logits(&decoder, &adapter);
        assert_eq!(trained_logits(&decoder, &again), expected);

        let files = merge::merge(&world.weights, &world.config, &adapter).expect("they fit");
        let files = files.map(|file| file.map(|(name, bytes)| (name, bytes.into())));
        let merged = Weights::from_files(files.collect::<Result<_, _>>().expect("files"));
        let merged = merged.expect("sound files");
        let json = updraft_model::tiny::config_json(world.config.architecture);
        let json = merge::config_json(&json, &world.config, &adapter).expect("an object");
        let config = ModelConfig::from_json(&json).expect("its configuration");
        assert_eq!(adapter.unties_head(&world.config), unties);
        assert_eq!(
            config.tie_word_embeddings,
            world.config.tie_word_embeddings && !unties
        );
        assert_eq!(
            merged.contains("lm_head.weight"),
            !config.tie_word_embeddings
        );
        for parameter in adapter.parameters() {
            let Role::Saved(name) = &parameter.role else {
                continue;
            };
            let values = flat(&merged.tensor(name).expect("it is there"));
            let own = &adapter.values().expect("f32")[parameter.range.clone()];
            assert_eq!(values, own, "{name}");
        }
        let threads = Threads::single();
        let merged = Decoder::load(&config, &merged, DType::F32, &Device::Cpu, &threads);
        let merged = logits(&merged.expect("loads"), None);
        let furthest = merged.iter().zip(&expected).map(|(a, b)| (a - b).abs());
        assert!(furthest.fold(0.0, f32::max) < 1e-4);
    }
}

#[test]
fn what_cannot_be_trained_whole_is_refused() {
    let world = World::new(Architecture::Qwen2);
    let refused = |lora: &LoraConfig| {
        let adapter = Adapter::init_over(lora, &world.config, &world.weights, 1, &Device::Cpu);
        adapter.expect_err("must be refused").to_string()
    };
    let message = refused(&saving(&["lm_haed"], false));
    assert!(
        message.contains("no module of the model ends with \"lm_haed\""),
        "{message}"
    );
    let message = refused(&saving(&["q_proj"], false));
    assert!(
        message.contains("q_proj is among the target_modules too"),
        "{message}"
    );
    let message = refused(&saving(&["k_proj"], false));
    assert!(message.contains("saving only some of"), "{message}");
    let without_weights = Adapter::init(&saving(&["norm"], false), &world.config, 1, &Device::Cpu);
    let message = without_weights.expect_err("no base").to_string();
    assert!(message.contains("init_over"), "{message}");

    let adapter = moved(&world, &saving(&["lm_head"], false));
    let sum = combine(&[(&adapter, 1.0)], Combination::Cat, &world.config);
    let message = sum.expect_err("no sum").to_string();
    assert!(message.contains("lm_head"), "{message}");

    let files = peft::write_adapter(&adapter).expect("writes");
    let mut larger = world.config.clone();
    larger.vocab_size += 8;
    let read = peft::read_adapter(&files.config_json, &files.safetensors, &larger);
    assert!(matches!(read, Err(Error::Shape { .. })), "{read:?}");
}

#[test]
fn a_tied_head_that_differs_from_its_embedding_is_refused() {
    let world = World::new(Architecture::Qwen2);
    let untied = moved(&world, &saving(&["embed_tokens", "lm_head"], false));
    let files = peft::write_adapter(&untied).expect("writes");
    let text = String::from_utf8(files.config_json).expect("UTF-8");
    let lie = text.replace(
        "\"ensure_weight_tying\": false",
        "\"ensure_weight_tying\": true",
    );
    assert_ne!(lie, text);
    let read = peft::read_adapter(lie.as_bytes(), &files.safetensors, &world.config);
    let message = read.expect_err("two tables").to_string();
    assert!(message.contains("ensure_weight_tying"), "{message}");
}

#[test]
fn whole_weights_train_in_bf16_and_side_by_side_too() {
    let world = World::new_bf16(Architecture::Qwen3);
    let parts: Vec<_> = documents(&[9, 1, 17, 12], 5)
        .chunks(2)
        .map(one_part)
        .collect();
    for lora in [LoraConfig::full_fine_tuning(), saving(&["lm_head"], false)] {
        let adapter = world.adapter(&lora, 3);
        let run = |dtype, threads, activations| {
            let decoder = world.decoder(dtype, threads);
            let mut gradients = Gradients::zeros(&adapter).expect("zeros");
            let loss = decoder
                .loss_and_backward(&parts, &adapter, 3.0, &mut gradients, activations)
                .expect("sound parts");
            assert!(
                (decoder.loss(&parts, Some(&adapter)).expect("sound parts") - loss).abs() < 1e-3
            );
            (loss, gradients.with(<[f32]>::to_vec).expect("f32"))
        };
        let (loss, gradients) = run(DType::F32, 1, Activations::Stored);
        let recomputed = run(DType::F32, 1, Activations::Recomputed);
        assert_eq!((loss, &gradients), (recomputed.0, &recomputed.1));
        let norm = |values: &[f32]| values.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 2e-2)] {
            let (other_loss, other) = run(dtype, 2, Activations::Stored);
            assert!(
                (other_loss / loss - 1.0).abs() < tolerance,
                "{other_loss}, {loss}"
            );
            let difference: Vec<f32> = other.iter().zip(&gradients).map(|(a, b)| a - b).collect();
            let error = norm(&difference) / norm(&gradients);
            assert!(error < tolerance, "{dtype:?}: {error:e}");
        }
    }
}
