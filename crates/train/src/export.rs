//! What a run leaves behind: the adapter as PEFT's folder, and the merged
//! model as a folder that any runtime loads.

use std::collections::BTreeMap;
use std::fmt::Write;

use bytes::Bytes;
use updraft_model::{Adapter, LoraConfig, peft};

use crate::{Result, StepRecord, TrainConfig};

/// Folder of the adapter within the stage.
pub const LORA_MODEL: &str = "lora_model";
/// Folder of the merged model within the stage.
pub const FUSED: &str = "fused";

/// Files that say what a model is; an adapter's folder has none of them.
const MODEL_FILES: [&str; 2] = ["config.json", "generation_config.json"];

/// The adapter's folder: PEFT's two files, a model card, and what the base
/// model needs to read text.
pub(crate) fn adapter_folder(
    adapter: &Adapter,
    card: String,
    base: &BTreeMap<String, Bytes>,
) -> Result<Vec<(String, Bytes)>> {
    let files = peft::write_adapter(adapter)?;
    let mut folder = vec![
        (peft::CONFIG_FILE.to_owned(), files.config_json.into()),
        (peft::WEIGHTS_FILE.to_owned(), files.safetensors.into()),
        ("README.md".to_owned(), card.into_bytes().into()),
    ];
    let reads_text = base
        .iter()
        .filter(|(name, _)| !MODEL_FILES.contains(&name.as_str()));
    folder.extend(reads_text.map(|(name, bytes)| (name.clone(), bytes.clone())));
    Ok(prefixed(LORA_MODEL, folder))
}

/// The merged model's folder, but for its weights: all the base model's small
/// files as they are.
pub(crate) fn fused_folder(base: &BTreeMap<String, Bytes>) -> Vec<(String, Bytes)> {
    prefixed(
        FUSED,
        base.iter()
            .map(|(name, bytes)| (name.clone(), bytes.clone()))
            .collect(),
    )
}

fn prefixed(folder: &str, files: Vec<(String, Bytes)>) -> Vec<(String, Bytes)> {
    files
        .into_iter()
        .map(|(name, bytes)| (format!("{folder}/{name}"), bytes))
        .collect()
}

/// The `README.md` beside an adapter: where it comes from, the recipe and the
/// result. It holds no date, so that a rerun writes the same.
pub(crate) fn model_card(
    dataset: &str,
    lora: &LoraConfig,
    config: &TrainConfig,
    log: &[StepRecord],
) -> String {
    let base = lora.base_model_name_or_path.as_deref().unwrap_or("unknown");
    let mut card = format!(
        "---\nbase_model: {base}\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n- updraft\n---\n\n\
         # A LoRA adapter for {base}\n\nTrained on `{dataset}` with [Updraft](https://crates.io/crates/updraft).\n\n\
         | setting | value |\n| --- | --- |\n"
    );
    let rows = [
        ("r", json(&lora.r)),
        ("lora_alpha", json(&lora.lora_alpha)),
        ("target_modules", json(&lora.target_modules)),
        ("optim", json(&config.optim)),
        ("learning_rate", json(&config.learning_rate)),
        ("lr_scheduler_type", json(&config.lr_scheduler_type)),
        ("weight_decay", json(&config.weight_decay)),
        (
            "per_device_train_batch_size",
            json(&config.per_device_train_batch_size),
        ),
        (
            "gradient_accumulation_steps",
            json(&config.gradient_accumulation_steps),
        ),
        ("packing", json(&config.packing)),
        ("optimizer steps", json(&log.len())),
        (
            "epochs",
            format!("{:.2}", log.last().map_or(0.0, |record| record.epoch)),
        ),
        (
            "trained tokens",
            json(&log.iter().map(|record| record.trained_tokens).sum::<u64>()),
        ),
        (
            "first loss",
            format!("{:.4}", log.first().map_or(0.0, |record| record.loss)),
        ),
        (
            "last loss",
            format!("{:.4}", log.last().map_or(0.0, |record| record.loss)),
        ),
    ];
    for (setting, value) in rows {
        // Writing to a string cannot fail.
        let _ = writeln!(card, "| {setting} | {} |", value.replace('"', ""));
    }
    card
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("plain settings serialize")
}
