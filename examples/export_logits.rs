//! Computes logits with a base model and its adapter, and with the merged model, for others to compare.
//!
//! ```sh
//! cargo run --release --example export_logits -- BASE ADAPTER MERGED probe.safetensors
//! python benches/peers/check_export.py --base BASE --adapter ADAPTER --merged MERGED --probe probe.safetensors
//! ```
//!
//! All three are folders as transformers and PEFT write them. The probe holds `ids` `[T]`,
//! `tuned_logits` and `merged_logits` `[T, V]`.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor, safetensors};
use updraft::model::{Adapter, Batch, Decoder, ModelFiles, Threads, peft};

const NUM_TOKENS: u32 = 64;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [base, adapter, merged, out] = args.as_slice() else {
        bail!("usage: export_logits BASE ADAPTER MERGED OUT");
    };
    let base = load(base)?;
    let merged = load(merged)?;
    let adapter = read_adapter(adapter, &base)?;

    // Any ids will do; these are spread over the whole vocabulary.
    let vocab_size = base.config().vocab_size as u32;
    let ids: Vec<u32> = (0..NUM_TOKENS)
        .map(|i| (i * 2_654_435 + 17) % vocab_size)
        .collect();
    let tensors = HashMap::from([
        ("tuned_logits", logits(&base, &ids, &[&adapter])?),
        ("merged_logits", logits(&merged, &ids, &[])?),
        (
            "ids",
            Tensor::from_vec(ids, NUM_TOKENS as usize, &Device::Cpu)?,
        ),
    ]);
    safetensors::save(&tensors, out)?;
    Ok(())
}

fn load(folder: &str) -> Result<Decoder> {
    let files = ModelFiles::from_dir(Path::new(folder))?;
    let threads = Threads::single();
    Ok(Decoder::load(
        &files.config,
        &files.weights,
        DType::F32,
        &Device::Cpu,
        &threads,
    )?)
}

fn read_adapter(folder: &str, base: &Decoder) -> Result<Adapter> {
    let read = |name: &str| {
        std::fs::read(Path::new(folder).join(name)).with_context(|| format!("{folder}/{name}"))
    };
    Ok(peft::read_adapter(
        &read("adapter_config.json")?,
        &read("adapter_model.safetensors")?,
        base.config(),
    )?)
}

/// `[T, V]`
fn logits(decoder: &Decoder, ids: &[u32], adapters: &[&Adapter]) -> Result<Tensor> {
    let mut batch = Batch::packed([ids]);
    batch.logit_rows = (0..NUM_TOKENS).collect();
    batch.adapters = adapters
        .iter()
        .enumerate()
        .map(|(index, _)| Some(index))
        .collect();
    let hidden = decoder.forward(&batch, adapters, None)?;
    Ok(decoder.logits(&hidden)?.to_tensor()?)
}
