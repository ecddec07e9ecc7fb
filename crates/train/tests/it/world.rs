//! A small world: a random model of two blocks and examples it can memorise.

use std::ops::Range;

use candle_core::{DType, Device};
use updraft_chat::Example;
use updraft_model::{Adapter, Architecture, Decoder, LoraConfig, ModelConfig, Threads, tiny};
use updraft_train::{MemorySource, TrainConfig};

pub(crate) fn model() -> ModelConfig {
    tiny::config(Architecture::Qwen2)
}

pub(crate) fn decoder(num_threads: usize) -> Decoder {
    decoder_in(DType::F32, num_threads)
}

pub(crate) fn decoder_in(dtype: DType, num_threads: usize) -> Decoder {
    let threads = Threads::new(num_threads).expect("threads");
    let weights = tiny::weights(&model(), 1);
    Decoder::load(&model(), &weights, dtype, &Device::Cpu, &threads).expect("the tiny model")
}

pub(crate) fn lora() -> LoraConfig {
    LoraConfig {
        r: 4,
        lora_alpha: 8.0,
        ..Default::default()
    }
}

pub(crate) fn adapter() -> Adapter {
    adapter_of(&lora())
}

pub(crate) fn adapter_of(lora: &LoraConfig) -> Adapter {
    let weights = tiny::weights(&model(), 1);
    Adapter::init_over(lora, &model(), &weights, 7, &Device::Cpu).expect("an adapter")
}

/// Pairs beside whole copies of the head, which is tied, and of the last norm.
pub(crate) fn saving() -> LoraConfig {
    LoraConfig {
        modules_to_save: vec!["lm_head".to_owned(), "model.norm".to_owned()],
        ..lora()
    }
}

/// One loss span. (A range in `vec![]` looks like a slip to clippy.)
pub(crate) fn span(span: Range<u32>) -> Vec<Range<u32>> {
    std::iter::once(span).collect()
}

/// Examples of 6 to 22 tokens, the second part of each trained, some with a gap.
pub(crate) fn examples(count: u32) -> Vec<Example> {
    (0..count)
        .map(|i| {
            let tokens = 6 + (i * 5) % 17;
            let input_ids = (0..tokens)
                .map(|t| (t * t * 3 + i * 29 + t * 7) % 96)
                .collect();
            let start = tokens / 3;
            let gap = start + 1..tokens - 2;
            let loss_spans = if i % 3 == 0 {
                vec![start..gap.start, gap.end..tokens]
            } else {
                span(start..tokens)
            };
            Example {
                input_ids,
                loss_spans,
            }
        })
        .collect()
}

pub(crate) fn source(count: u32) -> MemorySource {
    MemorySource::new(format!("world-{count}"), examples(count)).shuffled(5)
}

/// Ten steps over 26 examples: epochs end inside the run, warm-up and clipping
/// are at work.
pub(crate) fn config() -> TrainConfig {
    TrainConfig {
        learning_rate: 1e-2,
        max_steps: Some(10),
        per_device_train_batch_size: 3,
        gradient_accumulation_steps: 2,
        warmup_steps: 2,
        weight_decay: 0.01,
        max_grad_norm: 0.5,
        save_steps: 5,
        max_seq_len: 64,
        ..Default::default()
    }
}
