//! A plain folder with what a run leaves behind.

use candle_core::{DType, Device};
use updraft_model::{Architecture, Decoder, ModelFiles, tiny};
use updraft_train::{Error, FUSED, LORA_MODEL, Trainer, export, model_card};

use crate::world::{adapter, config, decoder, examples, lora, model, source};

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
    let (base, decoder, source) = (base(base_folder.path()), decoder(1), source(26));
    let probe = &examples(1)[0];
    let merged = || std::fs::read(out.path().join(FUSED).join("model.safetensors")).expect("there");
    let fresh = adapter();
    let card = || model_card("the world", &lora(), &config(), &[]);
    export(out.path(), &base, &decoder, &fresh, card(), probe).expect("exported");
    let before = merged();

    let mut trainer = Trainer::new(&decoder, adapter(), &source, config()).expect("a run");
    let report = trainer.run().expect("trained");
    assert!(report.flops_per_second > 0.0);
    let (trained, log) = trainer.into_parts();
    let card = model_card("the world", &lora(), &config(), &log);
    export(out.path(), &base, &decoder, &trained, card, probe).expect("exported again");
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
    let error = export(out.path(), &base, &other, &adapter, String::new(), probe);
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
    assert!(!out.path().join(FUSED).exists());
}
