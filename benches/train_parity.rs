//! Does training here learn what it learns in transformers and PEFT?
//!
//! Fifty steps on the tiny pre-trained base and letter conversations, eight at once, from one random adapter. Writes the
//! adapter, the batches, the learning rates and the losses to a folder; `peers/train_parity.py` trains on them again and
//! compares.
//!
//! ```sh
//! cargo bench --bench train_parity -- --out parity && python benches/peers/train_parity.py parity
//! cargo bench --features cuda --bench train_parity -- --out parity --device cuda --dtype bf16
//! ```

#![expect(clippy::print_stdout, reason = "its output is the result")]

#[path = "../examples/pipeline/letters.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "the bench needs the conversations, neither the questions nor the tests"
)]
mod letters;

use std::error::Error;
use std::path::{Path, PathBuf};

use candle_core::Device;
use lexopt::{Arg, ValueExt};
use serde_json::{Value, json};
use updraft::chat::{Chat, ChatFiles, Conversation, Example, Message, TemplateFiles};
use updraft::model::{Adapter, Compute, Decoder, LoraConfig, ModelFiles, Threads, peft};
use updraft::train::{MemorySource, StepRecord, TrainConfig, Trainer};

const STEPS: usize = 50;
const BATCH: usize = 8;

struct Settings {
    base: PathBuf,
    out: PathBuf,
    compute: Compute,
    dtype: String,
}

fn main() -> Result<(), Box<dyn Error>> {
    let settings = Settings::from_args()?;
    let files = ModelFiles::from_dir(&settings.base)?;
    let examples = examples(&chat(&files)?)?;
    let config = TrainConfig {
        learning_rate: 2e-3,
        per_device_train_batch_size: u32::try_from(BATCH)?,
        max_steps: Some(STEPS as u64),
        warmup_steps: 5,
        weight_decay: 0.01,
        bf16: settings.dtype == "bf16",
        fp16: settings.dtype == "f16",
        ..TrainConfig::default()
    };
    let lora = LoraConfig {
        base_model_name_or_path: Some(settings.base.display().to_string()),
        ..LoraConfig::default()
    };
    let adapter = Adapter::init(&lora, &files.config, config.seed, &Device::Cpu)?;
    std::fs::create_dir_all(settings.out.join("adapter"))?;
    let written = peft::write_adapter(&adapter)?;
    write(
        &settings.out,
        "adapter/adapter_config.json",
        &written.config_json,
    )?;
    write(
        &settings.out,
        "adapter/adapter_model.safetensors",
        &written.safetensors,
    )?;

    let decoder = decoder(&settings, &files, &config)?;
    let source = MemorySource::new("letters", examples.clone());
    let mut trainer = Trainer::new(&decoder, adapter, &source, config.clone())?;
    trainer.run()?;
    let run = json!({
        "base": settings.base, "dtype": settings.dtype, "batch": BATCH,
        "device": decoder.gpu_name().unwrap_or_else(|| "cpu".to_owned()),
        "weight_decay": config.weight_decay, "max_grad_norm": config.max_grad_norm,
        "steps": trainer.log().iter().map(step).collect::<Vec<_>>(),
        "examples": examples.iter().map(example).collect::<Vec<_>>(),
    });
    write(&settings.out, "run.json", run.to_string().as_bytes())?;
    let (first, last) = (trainer.log()[0].loss, trainer.log()[STEPS - 1].loss);
    println!(
        "{STEPS} steps, loss {first:.4} to {last:.4}; wrote {}",
        settings.out.display()
    );
    Ok(())
}

fn step(record: &StepRecord) -> Value {
    json!({ "loss": record.loss, "learning_rate": record.learning_rate, "grad_norm": record.grad_norm,
            "overflowed": record.overflowed })
}

fn example(example: &Example) -> Value {
    json!({ "input_ids": example.input_ids, "labels": example.labels() })
}

fn write(out: &Path, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    std::fs::write(out.join(name), bytes)
}

/// The first conversations about letters in the base's tokens.
fn examples(chat: &Chat) -> Result<Vec<Example>, Box<dyn Error>> {
    let lines = letters::conversations(3407, STEPS * BATCH);
    let examples = lines.map(|line| {
        let row: Value = serde_json::from_str(&line)?;
        let text = |turn: usize| {
            row["conversations"][turn]["value"]
                .as_str()
                .unwrap_or_default()
        };
        let messages = vec![Message::user(text(0)), Message::assistant(text(1))];
        let example = chat.example(&Conversation::new(messages));
        example.map_err(|rejected| format!("{rejected:?}").into())
    });
    examples.collect()
}

fn chat(files: &ModelFiles) -> Result<Chat, Box<dyn Error>> {
    let file = |name: &str| files.files.get(name).map(AsRef::as_ref);
    Ok(Chat::from_files(&ChatFiles {
        tokenizer_json: file("tokenizer.json").ok_or("the base has no tokenizer.json")?,
        template: TemplateFiles {
            chat_template_jinja: file("chat_template.jinja"),
            tokenizer_config: file("tokenizer_config.json"),
            chat_template_json: file("chat_template.json"),
            special_tokens_map: file("special_tokens_map.json"),
            additional_chat_templates: &[],
        },
        generation_config: file("generation_config.json"),
    })?)
}

fn decoder(
    settings: &Settings,
    files: &ModelFiles,
    config: &TrainConfig,
) -> Result<Decoder, Box<dyn Error>> {
    let (model, weights, threads) = (&files.config, &files.weights, Threads::new(2)?);
    #[cfg(feature = "cuda")]
    if let Some(gpu) = settings.compute.gpu()? {
        let dtype = config.dtype();
        return Ok(Decoder::load_on_gpu(model, weights, dtype, &gpu, &threads)?);
    }
    settings.compute.check()?;
    Ok(Decoder::load(
        model,
        weights,
        config.dtype(),
        &Device::Cpu,
        &threads,
    )?)
}

impl Settings {
    fn from_args() -> Result<Self, Box<dyn Error>> {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets/tiny");
        let mut settings = Self {
            base: tiny,
            out: "parity".into(),
            compute: Compute::Cpu,
            dtype: "f32".to_owned(),
        };
        let mut parser = lexopt::Parser::from_env();
        while let Some(arg) = parser.next()? {
            match arg {
                Arg::Long("base") => settings.base = parser.value()?.into(),
                Arg::Long("out") => settings.out = parser.value()?.into(),
                Arg::Long("device") => settings.compute = parser.value()?.parse()?,
                Arg::Long("dtype") => settings.dtype = parser.value()?.string()?,
                Arg::Long("bench") => {} // cargo's own
                other => return Err(other.unexpected().into()),
            }
        }
        match &settings.dtype[..] {
            "f32" | "bf16" | "f16" => Ok(settings),
            other => Err(format!("--dtype {other}: say f32, bf16 or f16").into()),
        }
    }
}
