//! What a run leaves behind: the adapter as PEFT's folder, and the merged
//! model as a folder that any runtime loads.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use bytes::Bytes;
use candle_core::{DType, Device};
use updraft_chat::Example;
use updraft_model::{Adapter, Decoder, LoraConfig, ModelFiles, merge, peft};
use updraft_store::CancelToken;

use crate::merged::check_merged;
use crate::stop::Stop;
use crate::swap::{discard, recover, swap, write_synced};
use crate::verify::{Probe, compare, tolerance};
use crate::{Error, Result, StepRecord, TrainConfig};

/// Folder of the adapter within the stage.
pub const LORA_MODEL: &str = "lora_model";
/// Folder of the merged model within the stage.
pub const FUSED: &str = "fused";

/// Files that say what a model is; an adapter's folder has none of them.
const MODEL_FILES: [&str; 2] = ["config.json", "generation_config.json"];

/// Writes what a run leaves behind below a plain folder: [`LORA_MODEL`], which PEFT loads, and
/// [`FUSED`], which everything else loads; the latter alone where every weight was trained.
///
/// `decoder` is the base model in f32. Both folders are read back and asked for the logits of
/// `probe`, as [`train_stage`](crate::train_stage) does, before they take the place of earlier ones.
/// Those are moved aside first and deleted last: a kill leaves either, and the next export puts back
/// what it finds aside.
///
/// # Errors
/// [`Error::Cancelled`] within a tensor's work of one of `cancels` being cancelled, with all as it was before;
/// [`Error::Verification`] if a folder does not give the trained model's logits,
/// [`Error::WrongMerge`] if a merged weight is not what base and adapter give;
/// [`Error::Model`] if a file cannot be written or read.
pub fn export(
    folder: &Path,
    base: &ModelFiles,
    decoder: Decoder,
    adapter: &Adapter,
    card: &str,
    probe: &Example,
    cancels: &[CancelToken],
) -> Result<()> {
    let stop = Stop::new(cancels, 0);
    let new = recover(folder)?;
    match write_new(&new, base, decoder, adapter, card, probe, &stop) {
        Ok(()) => swap(folder),
        Err(error) => {
            discard(&new)?; // On a full disk it takes the space.
            Err(error)
        }
    }
}

/// Writes and verifies both folders below `new`.
fn write_new(
    new: &Path,
    base: &ModelFiles,
    decoder: Decoder,
    adapter: &Adapter,
    card: &str,
    probe: &Example,
    stop: &Stop,
) -> Result<()> {
    let write = |name: &str, bytes: &[u8]| {
        stop.check()?;
        write_synced(&new.join(name), bytes)
    };
    let probe = Probe::new(probe);
    let expected = probe.logits(&decoder, Some(adapter))?;
    if !adapter.is_whole() {
        for (name, bytes) in adapter_folder(adapter, card, &base.files)? {
            write(&name, &bytes)?;
        }
        verify_adapter(new, &decoder, &expected, &probe)?;
    }
    let threads = decoder.threads().clone();
    drop(decoder); // A second one is loaded to verify the merged model.
    for (name, bytes) in fused_folder(adapter, card, base)? {
        write(&name, &bytes)?;
    }
    let merged = merge::merge(&base.weights, &base.config, adapter)?;
    for file in merged.with_cancels(stop.switches()) {
        stop.check()?;
        let (name, bytes) = file?;
        write(&format!("{FUSED}/{name}"), &bytes)?;
    }
    let merged = ModelFiles::from_dir(&new.join(FUSED))?;
    check_merged(base, adapter, &merged.config, &merged.weights, stop)?;
    let tolerance = tolerance(&merged.weights)?;
    let (config, weights) = (&merged.config, &merged.weights);
    let merged = Decoder::load(config, weights, DType::F32, &Device::Cpu, &threads)?;
    stop.check()?;
    compare(FUSED, &expected, &probe.logits(&merged, None)?, tolerance)?;
    stop.check()
}

pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Model(updraft_model::Error::Io { path, source })
}

/// Reads the adapter's folder back and compares its logits with the trained model's.
fn verify_adapter(folder: &Path, decoder: &Decoder, expected: &[f32], probe: &Probe) -> Result<()> {
    let read = |name: &str| {
        let path = folder.join(LORA_MODEL).join(name);
        std::fs::read(&path).map_err(io(&path))
    };
    let (config, weights) = (read(peft::CONFIG_FILE)?, read(peft::WEIGHTS_FILE)?);
    let again = peft::read_adapter(&config, &weights, decoder.config())?;
    let found = probe.logits(decoder, Some(&again))?;
    compare(LORA_MODEL, expected, &found, 0.0)
}

/// The adapter's folder: PEFT's two files, a model card, and what the base
/// model needs to read text.
pub(crate) fn adapter_folder(
    adapter: &Adapter,
    card: &str,
    base: &BTreeMap<String, Bytes>,
) -> Result<Vec<(String, Bytes)>> {
    let files = peft::write_adapter(adapter)?;
    let mut folder = vec![
        (peft::CONFIG_FILE.to_owned(), files.config_json.into()),
        (peft::WEIGHTS_FILE.to_owned(), files.safetensors.into()),
        ("README.md".to_owned(), card.to_owned().into()),
    ];
    let reads_text = base
        .iter()
        .filter(|(name, _)| !MODEL_FILES.contains(&name.as_str()));
    folder.extend(reads_text.map(|(name, bytes)| (name.clone(), bytes.clone())));
    Ok(prefixed(LORA_MODEL, folder))
}

/// The merged model's folder, but for its weights: all the base model's small files as they are,
/// but for a head that is tied no more; and the card, where there is no adapter to hold it.
pub(crate) fn fused_folder(
    adapter: &Adapter,
    card: &str,
    base: &ModelFiles,
) -> Result<Vec<(String, Bytes)>> {
    let mut files = base.files.clone();
    if let Some(config) = files.get_mut("config.json") {
        *config = merge::config_json(config, &base.config, adapter)?.into();
    }
    if adapter.is_whole() {
        files.insert("README.md".to_owned(), card.to_owned().into());
    }
    Ok(prefixed(FUSED, files.into_iter().collect()))
}

fn prefixed(folder: &str, files: Vec<(String, Bytes)>) -> Vec<(String, Bytes)> {
    files
        .into_iter()
        .map(|(name, bytes)| (format!("{folder}/{name}"), bytes))
        .collect()
}

/// The `README.md` beside an adapter, or beside a model whose every weight was trained: where it
/// comes from, the recipe and the result. It holds no date, so that a rerun writes the same.
pub fn model_card(
    dataset: &str,
    lora: &LoraConfig,
    config: &TrainConfig,
    log: &[StepRecord],
) -> String {
    let base = lora.base_model_name_or_path.as_deref().unwrap_or("unknown");
    let (library, tag, title) = match lora.adapts_nothing() {
        true => ("transformers", "full", format!("{base}, fine-tuned")),
        false => ("peft", "lora", format!("A LoRA adapter for {base}")),
    };
    let mut card = format!(
        "---\nbase_model: {base}\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n- {tag}\n- updraft\n---\n\n\
         # {title}\n\nTrained on `{dataset}` with [Updraft](https://crates.io/crates/updraft).\n\n\
         | setting | value |\n| --- | --- |\n"
    );
    let lora_rows = [
        ("r", json(&lora.r)),
        ("lora_alpha", json(&lora.lora_alpha)),
        ("target_modules", json(&lora.target_modules)),
    ];
    let saved = ("modules_to_save", json(&lora.modules_to_save));
    let adapter_rows = lora_rows.into_iter().filter(|_| !lora.adapts_nothing());
    let saved_row = Some(saved).filter(|_| !lora.modules_to_save.is_empty());
    let rows = [
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
    for (setting, value) in adapter_rows.chain(saved_row).chain(rows) {
        // Writing to a string cannot fail.
        let _ = writeln!(card, "| {setting} | {} |", value.replace('"', ""));
    }
    card
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("plain settings serialize")
}
