//! A plain folder with what a run leaves behind.

use candle_core::{DType, Device};
use updraft_model::{Architecture, Decoder, LoraConfig, ModelFiles, Weights, peft, tiny};
use updraft_store::CancelToken;
use updraft_train::{Error, FUSED, LORA_MODEL, Trainer, export, model_card};

use crate::world::{adapter, adapter_of, config, decoder, examples, lora, model, saving, source};

fn base(folder: &std::path::Path) -> ModelFiles {
    let write = |name: &str, bytes: Vec<u8>| std::fs::write(folder.join(name), bytes).expect(name);
    write("config.json", tiny::config_json(Architecture::Qwen2));
    write("tokenizer.json", b"{}".to_vec());
    write("model.safetensors", tiny::safetensors(&model(), 1));
    ModelFiles::from_dir(folder).expect("a model folder")
}

#[test]
fn both_folders_are_there_and_a_second_export_replaces_them() {
    let (base_folder, out) = (
        tempfile::tempdir().expect("one"),
        tempfile::tempdir().expect("one"),
    );
    let (base, source) = (base(base_folder.path()), source(26));
    let trained_on = decoder(1);
    let probe = &examples(1)[0];
    let merged = || std::fs::read(out.path().join(FUSED).join("model.safetensors")).expect("there");
    let fresh = adapter();
    let card = || model_card("the world", &lora(), &config(), &[]);
    export(out.path(), &base, decoder(1), &fresh, &card(), probe, &[]).expect("exported");
    // What a killed export leaves is in nobody's way.
    std::fs::create_dir_all(out.path().join(".new/fused/stale")).expect("a folder");
    let before = merged();

    let mut trainer = Trainer::new(&trained_on, adapter(), &source, config()).expect("a run");
    let report = trainer.run().expect("trained");
    assert!(report.flops_per_second > 0.0);
    let (trained, log) = trainer.into_parts();
    let card = model_card("the world", &lora(), &config(), &log);
    export(out.path(), &base, decoder(1), &trained, &card, probe, &[]).expect("exported again");
    assert_ne!(merged(), before);

    let names = |folder: &str| {
        let entries = std::fs::read_dir(out.path().join(folder)).expect("a folder");
        let name = |entry: std::io::Result<std::fs::DirEntry>| entry.expect("an entry").file_name();
        let mut names: Vec<_> = entries.map(name).collect();
        names.sort();
        names
    };
    assert_eq!(names(""), [FUSED, LORA_MODEL]);
    assert_eq!(
        names(FUSED),
        ["config.json", "model.safetensors", "tokenizer.json"]
    );
    let adapter_files = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ];
    assert_eq!(names(LORA_MODEL)[..3], adapter_files);
}

/// Trains with these settings and exports; the base model's folder and what was written.
fn exported(lora: &LoraConfig) -> (tempfile::TempDir, tempfile::TempDir) {
    let (base_folder, out) = (
        tempfile::tempdir().expect("one"),
        tempfile::tempdir().expect("one"),
    );
    let (base, trained_on, source) = (base(base_folder.path()), decoder(1), source(26));
    let mut trainer =
        Trainer::new(&trained_on, adapter_of(lora), &source, config()).expect("a run");
    trainer.run().expect("trained");
    let (trained, log) = trainer.into_parts();
    let card = model_card("the world", lora, &config(), &log);
    export(
        out.path(),
        &base,
        decoder(1),
        &trained,
        &card,
        &examples(1)[0],
        &[],
    )
    .expect("exported");
    (base_folder, out)
}

#[test]
fn a_head_of_its_own_is_written_and_said_in_the_configuration() {
    let (_base, out) = exported(&saving());
    let merged = ModelFiles::from_dir(&out.path().join(FUSED)).expect("a model folder");
    assert!(!merged.config.tie_word_embeddings && model().tie_word_embeddings);
    assert!(merged.weights.contains("lm_head.weight"));
    let read = |name: &str| std::fs::read(out.path().join(LORA_MODEL).join(name)).expect(name);
    let adapter = peft::read_adapter(
        &read(peft::CONFIG_FILE),
        &read(peft::WEIGHTS_FILE),
        &model(),
    );
    let adapter = adapter.expect("the adapter opens");
    assert_eq!(adapter.config().modules_to_save, saving().modules_to_save);
}

#[test]
fn where_every_weight_was_trained_there_is_a_model_and_no_adapter() {
    let lora = LoraConfig {
        base_model_name_or_path: Some("tiny".to_owned()),
        ..LoraConfig::full_fine_tuning()
    };
    let (_base, out) = exported(&lora);
    assert!(!out.path().join(LORA_MODEL).exists());
    let folder = out.path().join(FUSED);
    let model_now = ModelFiles::from_dir(&folder).expect("a model folder");
    assert_eq!(model_now.config, model());
    let before = tiny::weights(&model(), 1);
    assert!(model_now.weights.names().eq(before.names()));
    for name in before.names() {
        let bytes = |weights: &Weights| weights.bytes(name).expect("there");
        assert_ne!(
            bytes(&model_now.weights),
            bytes(&before),
            "{name} was not trained"
        );
    }
    let card = std::fs::read_to_string(folder.join("README.md")).expect("a card");
    assert!(
        card.contains("library_name: transformers") && card.contains("# tiny, fine-tuned"),
        "{card}"
    );
    assert!(!card.contains("lora_alpha"), "{card}");
}

#[test]
fn what_does_not_give_the_trained_logits_does_not_replace_anything() {
    let (base_folder, out) = (
        tempfile::tempdir().expect("one"),
        tempfile::tempdir().expect("one"),
    );
    let base = base(base_folder.path());
    // The decoder that was trained has other weights than the files that are merged.
    let (other, threads) = (tiny::weights(&model(), 2), decoder(1).threads().clone());
    let other = Decoder::load(&model(), &other, DType::F32, &Device::Cpu, &threads);
    let other = other.expect("the tiny model");
    let (adapter, probe) = (adapter(), &examples(1)[0]);
    let error = export(out.path(), &base, other, &adapter, "", probe, &[]);
    let error = error.expect_err("it differs");
    assert!(
        matches!(
            error,
            Error::Verification {
                artifact: FUSED,
                ..
            }
        ),
        "{error}"
    );
    let left = std::fs::read_dir(out.path()).expect("a folder").count();
    assert_eq!(left, 0, "nothing is left of it");
}

#[test]
fn cancelled_it_leaves_the_earlier_folders_as_they_were() {
    let (base_folder, out) = (
        tempfile::tempdir().expect("one"),
        tempfile::tempdir().expect("one"),
    );
    let base = base(base_folder.path());
    let (fresh, probe) = (adapter(), &examples(1)[0]);
    export(out.path(), &base, decoder(1), &fresh, "first", probe, &[]).expect("exported");
    let cancel = CancelToken::new();
    cancel.cancel();
    let tokens = [CancelToken::new(), cancel];
    let error = export(
        out.path(),
        &base,
        decoder(1),
        &fresh,
        "second",
        probe,
        &tokens,
    );
    let error = error.expect_err("cancelled");
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    let card = std::fs::read_to_string(out.path().join(LORA_MODEL).join("README.md"));
    assert_eq!(card.expect("there"), "first");
    let left = std::fs::read_dir(out.path()).expect("a folder").count();
    assert_eq!(left, 2, "the two folders and nothing else");
}
