//! How many tokens per second does one LoRA step take: forward, backward, clipping, AdamW?
//!
//! The model of `peers/train_step.py`, which asks PEFT the same: hidden 256, 6 layers, 4 heads, 2
//! key/value heads, intermediate 1,024, vocabulary 8,192, rank 16 on all projections, batch 8 x 256,
//! f32 and bf16. Every token is trained on. Run both in one go:
//!
//! ```sh
//! cargo bench --bench train_step && python benches/peers/train_step.py --threads 2 --dtype f32
//! ```
//!
//! Both print the most memory their process held; name one case (`-- train_step/f32/2`) for its own.

#![expect(
    clippy::print_stderr,
    reason = "a bench says what criterion does not measure"
)]

use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use updraft::chat::Example;
use updraft::model::{Adapter, Decoder, LoraConfig, ModelConfig, Threads, tiny};
use updraft::train::{MemorySource, TrainConfig, Trainer};

const BATCH: u32 = 8;
const LENGTH: u32 = 256;
const VOCAB: u32 = 8192;

const CONFIG: &[u8] = br#"{
    "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 256, "intermediate_size": 1024,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8192,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 512,
    "tie_word_embeddings": true, "torch_dtype": "float32"
}"#;

/// As many distinct full-length examples as one batch has.
fn examples() -> Vec<Example> {
    let token = |i: u32| (i.wrapping_mul(2_654_435_761) >> 7) % VOCAB;
    let example = |b: u32| Example {
        input_ids: (0..LENGTH).map(|t| token(b * LENGTH + t)).collect(),
        loss_spans: std::iter::once(0..LENGTH).collect(),
    };
    (0..BATCH).map(example).collect()
}

/// The time of `steps` optimizer steps, after one that warms up.
fn time_steps(decoder: &Decoder, source: &MemorySource, steps: u64) -> Duration {
    let lora = LoraConfig {
        r: 16,
        lora_alpha: 16.0,
        ..LoraConfig::default()
    };
    let adapter =
        Adapter::init(&lora, decoder.config(), 3407, &Device::Cpu).expect("valid configuration");
    let config = TrainConfig {
        per_device_train_batch_size: BATCH,
        max_steps: Some(steps + 1),
        ..TrainConfig::default()
    };
    let mut trainer = Trainer::new(decoder, adapter, source, config).expect("valid run");
    trainer.run_until(1).expect("first step");
    let started = Instant::now();
    trainer.run_until(steps + 1).expect("steps");
    started.elapsed()
}

fn train_step(criterion: &mut Criterion) {
    let config = ModelConfig::from_json(CONFIG).expect("valid configuration");
    let weights = tiny::weights(&config, 0);
    let source = MemorySource::new("bench", examples());
    let mut group = criterion.benchmark_group("train_step");
    group
        .throughput(Throughput::Elements(u64::from(BATCH * LENGTH)))
        .sample_size(10);
    for (name, dtype) in [("f32", DType::F32), ("bf16", DType::BF16)] {
        for num_threads in [1, 2] {
            let threads = Threads::new(num_threads).expect("threads");
            let decoder = Decoder::load(&config, &weights, dtype, &Device::Cpu, &threads)
                .expect("own weights");
            group.bench_function(BenchmarkId::new(name, num_threads), |bencher| {
                bencher.iter_custom(|steps| time_steps(&decoder, &source, steps));
            });
        }
    }
    group.finish();
    // Of all four together; criterion's own is a few MiB. The peer prints its own.
    if let Some(bytes) = updraft::train::peak_memory() {
        eprintln!("peak_rss_mib: {}", bytes >> 20);
    }
}

criterion_group!(benches, train_step);
criterion_main!(benches);
