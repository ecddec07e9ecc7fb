//! How many real tokens per second does LoRA training take on ragged conversations, packed?
//!
//! The first 2,000 conversations of `golden/conv20k.parquet` (`UPDRAFT_FIXTURES`), cut at 2,048 tokens,
//! assistant tokens trained, on the model of `train_step`. Rows of up to 2,048 tokens, two for each
//! optimizer step; the peer trains batches of 8 conversations, padded. Ids are folded into the model's
//! vocabulary on both sides. Run both in one go:
//!
//! ```sh
//! UPDRAFT_FIXTURES=DIR cargo bench --bench train_ragged
//! python benches/peers/train_ragged.py DIR/golden/conv4k.qwen2.5.mask.parquet --threads 2
//! ```

#![expect(clippy::print_stderr, reason = "says what it skips")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use futures::TryStreamExt;
use updraft::chat::{Chat, ChatFiles, Example, TemplateFiles};
use updraft::dataset::source::Cursor;
use updraft::dataset::{Formats, Record, Source, SourceOptions, resolve_source};
use updraft::model::{Adapter, Decoder, LoraConfig, ModelConfig, Threads, tiny};
use updraft::train::{MemorySource, RunPlan, TrainConfig, Trainer};

const CONVERSATIONS: usize = 2000;
const MAX_SEQ_LEN: u32 = 2048;
const VOCAB: u32 = 8192;

const CONFIG: &[u8] = br#"{
    "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 256, "intermediate_size": 1024,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8192,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 2048,
    "tie_word_embeddings": true, "torch_dtype": "float32"
}"#;

fn chat(dir: &Path) -> Chat {
    let read = |name: &str| std::fs::read(dir.join(name)).ok();
    let template = read("chat_template.jinja");
    let config = read("tokenizer_config.json");
    Chat::from_files(&ChatFiles {
        tokenizer_json: &read("tokenizer.json").expect("a tokenizer"),
        template: TemplateFiles {
            tokenizer_config: config.as_deref(),
            chat_template_jinja: template.as_deref(),
            ..TemplateFiles::default()
        },
        ..ChatFiles::default()
    })
    .expect("a folder with tokenizer and template")
}

/// The conversations' tokens, folded into the vocabulary and cut.
async fn examples(fixtures: &Path) -> Vec<Example> {
    let chat = chat(&fixtures.join("tokenizers/qwen2.5"));
    let formats = Formats::built_in("\n");
    let sharegpt = formats.get("sharegpt").expect("built in");
    let path = fixtures.join("golden/conv20k.parquet");
    let path = path.to_str().expect("UTF-8");
    let source = resolve_source(path, &SourceOptions::default())
        .await
        .expect("the file");
    let batches = source.open(Cursor::default()).await.expect("open");
    let batches: Vec<_> = batches.try_collect().await.expect("rows");
    let rows = batches
        .into_iter()
        .flat_map(updraft::dataset::source::Batch::rows);
    rows.take(CONVERSATIONS)
        .map(
            |row| match sharegpt.convert(&mut row.value.expect("a row")) {
                Ok(Record::Conversation(conversation)) => {
                    cut(chat.example(&conversation).expect("a conversation"))
                }
                other => unreachable!("these are conversations, not {other:?}"),
            },
        )
        .collect()
}

fn cut(mut example: Example) -> Example {
    example.input_ids.truncate(MAX_SEQ_LEN as usize);
    example.input_ids.iter_mut().for_each(|id| *id %= VOCAB);
    let end = example.input_ids.len() as u32;
    example.loss_spans.retain_mut(|span| {
        span.end = span.end.min(end);
        span.start < span.end
    });
    example
}

/// The time that `steps` optimizer steps take, scaled to whole passes of the average step.
fn time_steps(
    decoder: &Decoder,
    source: &MemorySource,
    config: TrainConfig,
    steps: u64,
) -> Duration {
    let adapter = Adapter::init(&LoraConfig::default(), decoder.config(), 3407, &Device::Cpu)
        .expect("valid configuration");
    let mut trainer = Trainer::new(decoder, adapter, source, config).expect("valid run");
    trainer.run_until(1).expect("first step");
    let started = Instant::now();
    trainer.run_until(steps + 1).expect("steps");
    let elapsed = started.elapsed();
    let tokens: u64 = trainer.log()[1..].iter().map(|step| step.tokens).sum();
    elapsed.mul_f64((TOKENS_PER_STEP * steps) as f64 / tokens as f64)
}

/// What throughput is counted in: a step's tokens if every row were full.
const TOKENS_PER_STEP: u64 = 2 * MAX_SEQ_LEN as u64;

fn conv20k(criterion: &mut Criterion) {
    let Some(fixtures) = std::env::var_os("UPDRAFT_FIXTURES").map(PathBuf::from) else {
        eprintln!("skipped: train_ragged needs UPDRAFT_FIXTURES");
        return;
    };
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    let source = MemorySource::new("conv20k", runtime.block_on(examples(&fixtures))).shuffled(3407);
    let config = TrainConfig {
        packing: true,
        max_seq_len: MAX_SEQ_LEN,
        per_device_train_batch_size: 2,
        num_train_epochs: 1.0,
        ..TrainConfig::default()
    };
    let plan = RunPlan::new(&source, &config).expect("a plan");
    let shape = plan.epoch(0);
    let room = shape.rows * u64::from(MAX_SEQ_LEN);
    eprintln!(
        "{} rows, filled to {:.1}%",
        shape.rows,
        100.0 * shape.tokens as f64 / room as f64
    );

    let model = ModelConfig::from_json(CONFIG).expect("valid configuration");
    let weights = tiny::weights(&model, 0);
    let mut group = criterion.benchmark_group("train_ragged");
    group
        .throughput(Throughput::Elements(TOKENS_PER_STEP))
        .sample_size(10);
    for num_threads in [1, 2] {
        let threads = Threads::new(num_threads).expect("threads");
        let decoder = Decoder::load(&model, &weights, DType::F32, &Device::Cpu, &threads)
            .expect("own weights");
        group.bench_function(BenchmarkId::new("f32", num_threads), |bencher| {
            bencher.iter_custom(|steps| time_steps(&decoder, &source, config.clone(), steps));
        });
    }
    group.finish();
}

criterion_group!(benches, conv20k);
criterion_main!(benches);
