//! Combining adapters against PEFT's own combinations.

use std::path::Path;

use updraft_model::{Adapter, Combination, ModelConfig, combine, peft};

fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/combine")
}

fn model() -> ModelConfig {
    let json = std::fs::read(folder().join("config.json")).expect("committed");
    ModelConfig::from_json(&json).expect("a configuration")
}

fn adapter(name: &str) -> Adapter {
    let read = |file| std::fs::read(folder().join(name).join(file)).expect("committed");
    let (config, weights) = (read(peft::CONFIG_FILE), read(peft::WEIGHTS_FILE));
    peft::read_adapter(&config, &weights, &model()).expect("PEFT's files")
}

#[test]
fn combinations_are_pefts() {
    let cases = [
        (Combination::Linear, "two", "linear"),
        (Combination::Cat, "three", "cat"),
    ];
    for (combination, other, expected) in cases {
        let (one, other) = (adapter("one"), adapter(other));
        let weighted = [(&one, 0.7), (&other, -0.4)];
        let combined = combine(&weighted, combination, &model()).expect("they fit");
        let expected = adapter(expected);
        assert_eq!(combined.parameters(), expected.parameters());
        assert_eq!(combined.config().r, expected.config().r);
        assert_eq!(combined.config().lora_alpha, expected.config().lora_alpha);
        let (values, expected) = (
            combined.values().expect("f32"),
            expected.values().expect("f32"),
        );
        for (value, expected) in values.iter().zip(&expected) {
            assert!(
                (value - expected).abs() <= 1e-6,
                "{value} against {expected}"
            );
        }
    }
}

#[test]
fn a_combination_is_written_and_read_as_any_adapter() {
    let (one, three) = (adapter("one"), adapter("three"));
    let weighted = [(&one, 2.0), (&three, 1.0)];
    let combined = combine(&weighted, Combination::Cat, &model()).expect("they fit");
    let files = peft::write_adapter(&combined).expect("written");
    let again = peft::read_adapter(&files.config_json, &files.safetensors, &model());
    let again = again.expect("our own files");
    assert_eq!(
        again.values().expect("f32"),
        combined.values().expect("f32")
    );
    assert_eq!(
        again.config().target_modules,
        combined.config().target_modules
    );
}
