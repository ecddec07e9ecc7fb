//! How many tokens per second do conversations become: render, locate loss spans, encode?
//!
//! `letters` needs nothing but this repository: the example's conversations through the tiny
//! model's template and tokenizer, on one thread. The rest reads `golden/conv20k.parquet` of
//! `UPDRAFT_FIXTURES` with Qwen2.5's own files: `both_stages` is what the peer does, from the
//! conversations as they came to Parquet, on all cores; `stage` is pretokenizing alone; `render` and
//! `example` are parts of it on one thread. `detokenize` streams ids back, `load` reads the model's
//! tokenizer and template. What share of the stage is reading, tokenizing and writing is printed
//! first. The peer is `datasets.map(apply_chat_template)`:
//!
//! ```sh
//! UPDRAFT_FIXTURES=DIR cargo bench --bench tokenize
//! python benches/peers/tokenize_chats.py --data DIR/golden/conv20k.parquet --tokenizer DIR/tokenizers/qwen2.5
//! ```

#![expect(
    clippy::print_stderr,
    reason = "says what it skips and where time goes"
)]

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use futures::TryStreamExt as _;
use tokio::runtime::Runtime;
use tracing::field::{Field, Visit};
use tracing::span;
use updraft::chat::{Chat, ChatFiles, Conversation, Detokenizer, TemplateFiles};
use updraft::dataset::source::Cursor;
use updraft::dataset::{
    Formats, ImportOptions, PretokenizeOptions, Record, Source, SourceOptions, import, pretokenize,
    resolve_source,
};
use updraft::store::{CancelToken, FinishedStage, NoProgress, Store};

#[path = "../examples/pipeline/letters.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "the bench needs the conversations, neither the questions nor the tests"
)]
mod letters;

/// A model folder's files about chatting.
struct Model {
    tokenizer_json: Vec<u8>,
    config: Option<Vec<u8>>,
    template: Option<Vec<u8>>,
}

impl Model {
    fn read(dir: &Path) -> Model {
        let read = |name: &str| std::fs::read(dir.join(name)).ok();
        Model {
            tokenizer_json: read("tokenizer.json").expect("a tokenizer"),
            config: read("tokenizer_config.json"),
            template: read("chat_template.jinja"),
        }
    }

    fn chat(&self) -> Chat {
        Chat::from_files(&ChatFiles {
            tokenizer_json: &self.tokenizer_json,
            template: TemplateFiles {
                tokenizer_config: self.config.as_deref(),
                chat_template_jinja: self.template.as_deref(),
                ..TemplateFiles::default()
            },
            ..ChatFiles::default()
        })
        .expect("a folder with tokenizer and template")
    }
}

fn conversation(
    formats: &Formats,
    row: &mut serde_json::Map<String, serde_json::Value>,
) -> Conversation {
    let sharegpt = formats.get("sharegpt").expect("built in");
    match sharegpt.convert(row).expect("valid") {
        Record::Conversation(conversation) => conversation,
        other => unreachable!("these are conversations, not {other:?}"),
    }
}

fn letters(criterion: &mut Criterion) {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets/tiny");
    let chat = Model::read(&tiny).chat();
    let formats = Formats::built_in("\n");
    let conversations: Vec<_> = letters::conversations(0, 1000)
        .map(|line| {
            let mut row = serde_json::from_str(&line).expect("generated JSON");
            conversation(&formats, &mut row)
        })
        .collect();
    let tokens: usize = conversations
        .iter()
        .map(|c| chat.example(c).expect("an example").len())
        .sum();
    let mut group = criterion.benchmark_group("tokenize");
    group.throughput(Throughput::Elements(tokens as u64));
    group.bench_function("letters", |bencher| {
        bencher.iter(|| {
            conversations
                .iter()
                .filter_map(|c| chat.example(c).ok())
                .count()
        });
    });
    group.finish();
}

async fn source(path: &str) -> Arc<dyn Source> {
    let options = SourceOptions::default();
    resolve_source(path, &options).await.expect("the file")
}

async fn standardize(path: &str) -> FinishedStage {
    let (source, options) = (source(path).await, ImportOptions::default());
    import(
        &Store::memory(),
        "conv20k",
        &*source,
        &options,
        &NoProgress,
        &CancelToken::new(),
    )
    .await
    .expect("imported")
}

/// Pretokenizes into a fresh store, so that nothing is found finished.
async fn stage(standardized: &FinishedStage, chat: &Chat) -> FinishedStage {
    let (options, cancel) = (PretokenizeOptions::default(), CancelToken::new());
    let store = Store::memory();
    pretokenize(
        &store,
        "qwen",
        "conv20k",
        standardized,
        chat,
        &options,
        &NoProgress,
        &cancel,
    )
    .await
    .expect("pretokenized")
}

async fn conversations(path: &str) -> Vec<Conversation> {
    let source = source(path).await;
    let batches = source.open(Cursor::default()).await.expect("open");
    let batches: Vec<_> = batches.try_collect().await.expect("rows");
    let formats = Formats::built_in("\n");
    let rows = batches
        .into_iter()
        .flat_map(updraft::dataset::source::Batch::rows);
    rows.map(|row| conversation(&formats, &mut row.value.expect("a row")))
        .collect()
}

fn conv20k(criterion: &mut Criterion) {
    let Some(fixtures) = std::env::var_os("UPDRAFT_FIXTURES").map(PathBuf::from) else {
        eprintln!("skipped: conv20k needs UPDRAFT_FIXTURES");
        return;
    };
    let runtime = Runtime::new().expect("runtime");
    let model = Model::read(&fixtures.join("tokenizers/qwen2.5"));
    let chat = model.chat();
    let path = fixtures.join("golden/conv20k.parquet");
    let path = path.to_str().expect("UTF-8");
    let standardized = runtime.block_on(standardize(path));
    let shares = tracing::Dispatch::new(TellsShares::default());
    let _told = tracing::dispatcher::set_global_default(shares);
    let tokens = runtime.block_on(stage(&standardized, &chat)).counts()["tokens"];

    let mut group = criterion.benchmark_group("conv20k");
    group
        .throughput(Throughput::Elements(tokens))
        .sample_size(10);
    group.bench_function("stage", |bencher| {
        bencher.iter(|| runtime.block_on(stage(&standardized, &chat)));
    });
    group.bench_function("both_stages", |bencher| {
        bencher.iter(|| runtime.block_on(async { stage(&standardize(path).await, &chat).await }));
    });
    let conversations = runtime.block_on(conversations(path));
    group.bench_function("render", |bencher| {
        bencher.iter(|| {
            let rendered = conversations.iter().map(|c| chat.render_spans(c));
            rendered.filter(Result::is_ok).count()
        });
    });
    group.bench_function("example", |bencher| {
        bencher.iter(|| {
            let examples = conversations.iter().map(|c| chat.example(c));
            examples.filter(Result::is_ok).count()
        });
    });
    let ids: Vec<u32> = conversations
        .iter()
        .take(1000)
        .flat_map(|c| chat.example(c).expect("an example").input_ids)
        .collect();
    group.throughput(Throughput::Elements(ids.len() as u64));
    group.bench_function("detokenize", |bencher| {
        bencher.iter_batched(
            || Detokenizer::new(Arc::clone(chat.tokenizer())),
            |mut stream| ids.iter().map(|&id| stream.push(id).len()).sum::<usize>(),
            BatchSize::SmallInput,
        );
    });
    group.throughput(Throughput::Bytes(model.tokenizer_json.len() as u64));
    group.bench_function("load", |bencher| bencher.iter(|| model.chat()));
    group.finish();
}

/// Prints the stage's own account of its first run, which it hands to `tracing`.
#[derive(Default)]
struct TellsShares(AtomicBool);

impl tracing::Subscriber for TellsShares {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata
            .target()
            .starts_with("updraft_dataset::pretokenize")
    }

    fn event(&self, event: &tracing::Event<'_>) {
        struct Seconds(Vec<(&'static str, f64)>);
        impl Visit for Seconds {
            fn record_f64(&mut self, field: &Field, value: f64) {
                self.0.push((field.name(), value));
            }
            fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}
        }
        if self.0.swap(true, Ordering::Relaxed) {
            return;
        }
        let mut fields = Seconds(Vec::new());
        event.record(&mut fields);
        let all: f64 = fields.0.iter().map(|(_, seconds)| seconds).sum();
        for (name, seconds) in fields.0 {
            let share = 100.0 * seconds / all;
            eprintln!("{name}: {seconds:.3} ({share:.0}%)");
        }
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

criterion_group!(benches, letters, conv20k);
criterion_main!(benches);
