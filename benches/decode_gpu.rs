//! How many tokens per second does decoding take on a GPU, and how close is that to reading the weights as fast as it can?
//!
//! Qwen2.5-0.5B's shape with random bf16 weights: every sequence begins with a prompt of 512 tokens and makes 128 more,
//! greedily, tokens chosen on the GPU. `peers/decode_gpu.py` asks transformers the same, with a static cache and CUDA graphs.
//!
//! ```sh
//! cargo bench --features cuda --bench decode_gpu && python benches/peers/decode_gpu.py
//! ```

#![expect(clippy::print_stdout, reason = "its output is the table")]

use std::error::Error;
use std::time::Instant;

use candle_core::DType;
use updraft::model::{
    Batch, BlockTables, Choice, Decoder, Gpu, KvPages, Logits, ModelConfig, Threads, tiny,
};

const PROMPT: u32 = 512;
const LENGTH: u32 = 128;
const BLOCK_SIZE: u32 = 16;
const BATCHES: [u32; 4] = [1, 8, 32, 128];

const CONFIG: &[u8] = br#"{
    "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
    "tie_word_embeddings": true, "torch_dtype": "bfloat16"
}"#;

const LIKELIEST: Choice = Choice {
    temperature: 0.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    uniform: 0.0,
};

fn main() -> Result<(), Box<dyn Error>> {
    let gpu = Gpu::new(0)?;
    let bandwidth = copied_per_second(&gpu)?;
    let config = ModelConfig::from_json(CONFIG)?;
    let decoder = {
        let weights = tiny::weights_bf16(&config, 0);
        let dtype = match gpu.has_bf16() {
            true => DType::BF16,
            false => DType::F16,
        };
        Decoder::load_on_gpu(&config, &weights, dtype, &gpu, &Threads::new(2)?)?
    };
    println!("{}, copies {:.2} TB/s", gpu.name()?, bandwidth / 1e12);
    println!(
        "| sequences | prompts, tokens/s | decoding, tokens/s | ms a step | share of the bandwidth |"
    );
    println!("| --- | --- | --- | --- | --- |");
    for batch in BATCHES {
        generate(&decoder, batch)?; // warms up
        let (prefill, decode) = generate(&decoder, batch)?;
        let step = decode / f64::from(LENGTH);
        // What a step must read: every weight once, and the keys and values of every sequence.
        let context = u64::from(batch * (PROMPT + LENGTH / 2));
        let read = 2 * config.num_parameters()
            + context * KvPages::bytes_per_block(&config, 1, decoder.dtype());
        println!(
            "| {batch} | {:.0} | {:.0} | {:.2} | {:.0}% |",
            f64::from(batch * PROMPT) / prefill,
            f64::from(batch) / step,
            step * 1e3,
            100.0 * read as f64 / step / bandwidth
        );
    }
    Ok(())
}

/// The seconds that the prompts of `batch` sequences take, and those of all further tokens.
fn generate(decoder: &Decoder, batch: u32) -> Result<(f64, f64), Box<dyn Error>> {
    let blocks_each = (PROMPT + LENGTH).div_ceil(BLOCK_SIZE);
    let mut pages = decoder.new_pages((batch * blocks_each) as usize, BLOCK_SIZE as usize)?;
    let table = |s: u32| (s * blocks_each..(s + 1) * blocks_each).collect::<Vec<u32>>();
    let mut step = |sequences: Vec<(u32, Vec<u32>, u32)>| -> Result<Vec<u32>, Box<dyn Error>> {
        let (mut batch, mut tables) = (Batch::default(), Vec::new());
        for (s, ids, start) in sequences {
            let rows = batch.push(&ids, start);
            batch.logit_rows.push(rows.end - 1);
            tables.push(table(s));
        }
        let block_size = BLOCK_SIZE as usize;
        batch.kv = Some(BlockTables { block_size, tables });
        let hidden = decoder.forward(&batch, &[], Some(&mut pages))?;
        likeliest(decoder.logits(&hidden)?)
    };
    let id = |i: u32| (i.wrapping_mul(2_654_435_761) >> 7) % 151_936;
    let prompt = |s: u32| {
        (0..PROMPT)
            .map(|t| id(s * PROMPT + t))
            .collect::<Vec<u32>>()
    };
    let started = Instant::now();
    let mut tokens = Vec::new();
    for first in (0..batch).step_by(8) {
        let some = (first..batch.min(first + 8)).map(|s| (s, prompt(s), 0));
        tokens.extend(step(some.collect())?);
    }
    let prefill = started.elapsed().as_secs_f64();
    let started = Instant::now();
    for position in PROMPT..PROMPT + LENGTH {
        let each = (0..batch).zip(&tokens);
        tokens = step(each.map(|(s, &token)| (s, vec![token], position)).collect())?;
    }
    Ok((prefill, started.elapsed().as_secs_f64()))
}

fn likeliest(mut logits: Logits) -> Result<Vec<u32>, Box<dyn Error>> {
    let choices = vec![LIKELIEST; logits.num_rows()];
    let tokens = logits.sample(&choices, &[])?;
    let tokens = tokens.into_iter().collect::<Option<Vec<u32>>>();
    Ok(tokens.ok_or("a logit that is no number")?)
}

/// Bytes that a large copy reads and writes in a second.
fn copied_per_second(gpu: &Gpu) -> Result<f64, Box<dyn Error>> {
    let bytes = 1 << 30;
    let (from, mut to) = (gpu.zeros::<u8>(bytes)?, gpu.zeros::<u8>(bytes)?);
    let mut run = |times: u32| -> Result<f64, Box<dyn Error>> {
        let started = Instant::now();
        for _ in 0..times {
            gpu.copy(from.view(), &to.view_mut())?;
        }
        gpu.synchronize()?;
        Ok(started.elapsed().as_secs_f64() / f64::from(times))
    };
    run(2)?;
    Ok(2.0 * bytes as f64 / run(20)?)
}
