//! How many tokens per second does LoRA training take on a GPU, and how close is that to what the GPU can multiply?
//!
//! Qwen2.5-0.5B's shape with random weights, rank 16 on all projections, bf16, or f16 before `sm_80`: micro-batches of
//! packed rows of 4,096 tokens made of conversations of about 1,000, three quarters of whose tokens are trained.
//! `peers/train_gpu.py` asks transformers and PEFT the same. Also the memory that the articles' settings take.
//!
//! ```sh
//! cargo bench --features cuda --bench train_gpu && python benches/peers/train_gpu.py
//! ```

#![expect(clippy::print_stdout, reason = "its output is the table")]

use std::time::Instant;

use candle_core::Device;
use half::f16;
use updraft::chat::Example;

use updraft::model::{Adapter, Decoder, Gpu, LoraConfig, ModelConfig, Threads, tiny};
use updraft::train::{
    ExampleSource, MemorySource, TrainConfig, TrainReport, Trainer, Work, check_gpu_memory,
};
use updraft_kernels::cuda::linear;

/// Rows of a micro-batch, or as many as fit the memory.
const ROWS: u32 = 8;
const ROW: u32 = 4096;
const LENGTH: u32 = 1024;
const STEPS: u64 = 10;

const CONFIG: &[u8] = br#"{
    "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
    "tie_word_embeddings": true, "torch_dtype": "bfloat16"
}"#;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let gpu = Gpu::new(0)?;
    let config = ModelConfig::from_json(CONFIG)?;
    let lora = LoraConfig {
        r: 16,
        lora_alpha: 16.0,
        ..LoraConfig::default()
    };
    articles(&gpu, &config, &lora)?; // first, for the peak is the process's
    let ceiling = products_per_second(&gpu)?;
    let (source, settings) = fitting(&gpu, &config, &lora)?;
    let rows = settings.per_device_train_batch_size;
    let (step, report) = train(&gpu, &config, &lora, &source, settings)?;
    let mut work = Work::default();
    for example in source.open(0, 0)? {
        work.add(&example?);
    }
    let adapter = Adapter::init(&lora, &config, 3407, &Device::Cpu)?;
    let flops = work.flops(&config, adapter.parameters());
    println!(
        "{}, {:.0} TFLOP/s in a large product of 16-bit numbers",
        gpu.name()?,
        ceiling / 1e12
    );
    println!(
        "{:.0} tokens/s, {:.1} ms a step of {rows} rows, {} tokens, {:.1}% of that product's rate, {:.1} GiB at the peak",
        work.tokens as f64 / step,
        step * 1e3,
        work.tokens,
        100.0 * flops / step / ceiling,
        gibibytes(report.peak_gpu_memory_bytes.unwrap_or(0)),
    );
    Ok(())
}

/// The memory that the articles' settings take, which are for GPUs of 16 GB: two rows of 4,096 tokens at once, f16.
fn articles(
    gpu: &Gpu,
    config: &ModelConfig,
    lora: &LoraConfig,
) -> Result<(), Box<dyn std::error::Error>> {
    let row = |e: u32| Example {
        input_ids: (0..ROW).map(|t| token(e * ROW + t)).collect(),
        loss_spans: std::iter::once(0..ROW).collect(),
    };
    let source = MemorySource::new("articles", (0..8).map(row).collect());
    let settings = TrainConfig {
        per_device_train_batch_size: 2,
        gradient_accumulation_steps: 4,
        max_steps: Some(STEPS + 2),
        fp16: true,
        ..TrainConfig::default()
    };
    let estimate = check_gpu_memory(config, lora, source.plan(), &settings, gpu)?.total();
    let (step, report) = train(gpu, config, lora, &source, settings)?;
    println!(
        "the articles' settings, f16: {:.1} GiB at the peak, estimated {:.1}; {:.0} tokens/s",
        gibibytes(report.peak_gpu_memory_bytes.unwrap_or(0)),
        gibibytes(estimate),
        f64::from(8 * ROW) / step,
    );
    Ok(())
}

/// The seconds of a step, after two that warm up.
fn train(
    gpu: &Gpu,
    config: &ModelConfig,
    lora: &LoraConfig,
    source: &MemorySource,
    settings: TrainConfig,
) -> Result<(f64, TrainReport), Box<dyn std::error::Error>> {
    let decoder = {
        let weights = tiny::weights_bf16(config, 0);
        Decoder::load_on_gpu(config, &weights, settings.dtype(), gpu, &Threads::new(2)?)?
    };
    let adapter = Adapter::init(lora, config, 3407, &Device::Cpu)?;
    let mut trainer = Trainer::new(&decoder, adapter, source, settings)?;
    trainer.run_until(2)?;
    let started = Instant::now();
    let report = trainer.run_until(STEPS + 2)?;
    Ok((started.elapsed().as_secs_f64() / STEPS as f64, report))
}

fn gibibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

fn token(i: u32) -> u32 {
    (i.wrapping_mul(2_654_435_761) >> 7) % 151_936
}

/// The data of one micro-batch, and the settings of a run that fits the memory.
fn fitting(
    gpu: &Gpu,
    config: &ModelConfig,
    lora: &LoraConfig,
) -> Result<(MemorySource, TrainConfig), Box<dyn std::error::Error>> {
    let example = |e: u32| Example {
        input_ids: (0..LENGTH).map(|t| token(e * LENGTH + t)).collect(),
        loss_spans: std::iter::once(LENGTH / 4..LENGTH).collect(),
    };
    let mut rows = ROWS;
    loop {
        let source = MemorySource::new("bench", (0..rows * ROW / LENGTH).map(example).collect());
        let settings = TrainConfig {
            per_device_train_batch_size: rows,
            packing: true,
            max_seq_len: ROW,
            max_steps: Some(STEPS + 2),
            bf16: gpu.has_bf16(),
            fp16: !gpu.has_bf16(),
            ..TrainConfig::default()
        };
        match check_gpu_memory(config, lora, source.plan(), &settings, gpu) {
            Ok(_) => return Ok((source, settings)),
            Err(error) if rows == 1 => return Err(error.into()),
            Err(_) => rows /= 2,
        }
    }
}

/// The rate of a large product of random numbers.
fn products_per_second(gpu: &Gpu) -> Result<f64, Box<dyn std::error::Error>> {
    let size = 8192;
    let number = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 8) % 2001) as f32 / 1000.0 - 1.0;
    let numbers: Vec<f16> = (0..size * size).map(|i| f16::from_f32(number(i))).collect();
    let (a, mut c) = (gpu.upload(&numbers)?, gpu.zeros::<f16>(size * size)?);
    let mut run = |times: u32| -> Result<f64, Box<dyn std::error::Error>> {
        let started = Instant::now();
        for _ in 0..times {
            let factor = a.mat(size, size);
            linear::forward(gpu, 1.0, factor, factor, 0.0, &c.mat_mut(size, size))?;
        }
        gpu.synchronize()?;
        Ok(started.elapsed().as_secs_f64() / f64::from(times))
    };
    run(3)?;
    Ok(2.0 * (size as f64).powi(3) / run(20)?)
}
