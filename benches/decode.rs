//! How many tokens per second does the decoder make, one sequence at a time and eight together?
//!
//! The shape of Qwen2.5-0.5B with random weights, which cost as much as trained ones. Each sequence starts from one
//! token; every step is a forward pass over the pages, all logits, and the choice of the likeliest. The peer is
//! llama.cpp's `llama-batched-bench` on the same shape. Run both in one go, with the same weights, threads and batch:
//!
//! ```sh
//! cargo bench --bench decode -- q8_0/2/1
//! python benches/peers/decode.py --llama-batched-bench PATH --dtype q8_0 --threads 2 --batch 1
//! ```

use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use updraft::model::{Batch, BlockTables, Decoder, ModelConfig, Threads, Weights, tiny};

/// Tokens that each sequence makes.
const LENGTH: u32 = 64;
const BLOCK_SIZE: u32 = 16;

const CONFIG: &[u8] = br#"{
    "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
    "tie_word_embeddings": true, "torch_dtype": "bfloat16"
}"#;

/// The time in which `batch` sequences make [`LENGTH`] tokens each.
fn generate(decoder: &Decoder, batch: u32) -> Duration {
    let blocks_each = LENGTH.div_ceil(BLOCK_SIZE);
    let num_blocks = (batch * blocks_each) as usize;
    let mut pages = decoder
        .new_pages(num_blocks, BLOCK_SIZE as usize)
        .expect("pages");
    let tables: Vec<Vec<u32>> = (0..batch)
        .map(|s| (s * blocks_each..(s + 1) * blocks_each).collect())
        .collect();
    let mut tokens: Vec<u32> = (0..batch).collect();
    let started = Instant::now();
    for position in 0..LENGTH {
        let mut step = Batch::default();
        for token in &tokens {
            step.push(&[*token], position);
        }
        step.logit_rows = (0..batch).collect();
        step.kv = Some(BlockTables {
            block_size: BLOCK_SIZE as usize,
            tables: tables.clone(),
        });
        let hidden = decoder
            .forward(&step, &[], Some(&mut pages))
            .expect("a sound batch");
        let logits = decoder.logits(&hidden).expect("its own hidden states");
        let likeliest = logits.to_tensor().and_then(|logits| Ok(logits.argmax(1)?));
        let likeliest = likeliest.expect("logits");
        tokens = likeliest.to_vec1().expect("token ids");
    }
    started.elapsed()
}

fn decode(criterion: &mut Criterion) {
    let config = ModelConfig::from_json(CONFIG).expect("valid configuration");
    let weights = tiny::weights_bf16(&config, 0);
    let mut group = criterion.benchmark_group("decode");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    for name in ["bf16", "q8_0"] {
        for num_threads in [1, 2] {
            let threads = Threads::new(num_threads).expect("threads");
            let decoder = load(&config, &weights, name, &threads);
            for batch in [1, 8] {
                group.throughput(Throughput::Elements(u64::from(batch * LENGTH)));
                let id = BenchmarkId::new(format!("{name}/{num_threads}"), batch);
                group.bench_function(id, |bencher| {
                    bencher
                        .iter_custom(|times| (0..times).map(|_| generate(&decoder, batch)).sum());
                });
            }
        }
    }
    group.finish();
}

fn load(config: &ModelConfig, weights: &Weights, name: &str, threads: &Threads) -> Decoder {
    let device = Device::Cpu;
    let decoder = match name.parse() {
        Ok(quantization) => {
            Decoder::load_quantized(config, weights, quantization, &device, threads)
        }
        Err(_) => Decoder::load(config, weights, DType::BF16, &device, threads),
    };
    decoder.expect("own weights")
}

criterion_group!(benches, decode);
criterion_main!(benches);
