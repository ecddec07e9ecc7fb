//! How many tokens per second do conversations become: render, locate loss spans, encode?
//!
//! `letters` needs nothing but this repository: the example's conversations through the tiny model's
//! template and tokenizer, on one thread. `conv20k` is the whole stage, Parquet to Parquet on all
//! cores, over `golden/conv20k.parquet` of `UPDRAFT_FIXTURES` with Qwen2.5's own files; its peer is
//! `datasets.map(apply_chat_template)`:
//!
//! ```sh
//! UPDRAFT_FIXTURES=DIR cargo bench --bench tokenize
//! python benches/peers/tokenize.py DIR/golden/conv20k.parquet DIR/tokenizers/qwen2.5
//! ```

#![expect(clippy::print_stderr, reason = "says what it skips")]

use std::path::{Path, PathBuf};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tokio::runtime::Runtime;
use updraft::chat::{Chat, ChatFiles, TemplateFiles};
use updraft::dataset::{
    Formats, ImportOptions, PretokenizeOptions, Record, SourceOptions, import, pretokenize,
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

fn chat(dir: &Path) -> Chat {
    let read = |name: &str| std::fs::read(dir.join(name)).ok();
    let files = (
        read("tokenizer.json"),
        read("tokenizer_config.json"),
        read("chat_template.jinja"),
    );
    Chat::from_files(&ChatFiles {
        tokenizer_json: files.0.as_deref().unwrap_or_default(),
        template: TemplateFiles {
            tokenizer_config: files.1.as_deref(),
            chat_template_jinja: files.2.as_deref(),
            ..TemplateFiles::default()
        },
        ..ChatFiles::default()
    })
    .expect("a folder with tokenizer and template")
}

fn letters(criterion: &mut Criterion) {
    let chat = chat(&Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets/tiny"));
    let formats = Formats::built_in("\n");
    let sharegpt = formats.get("sharegpt").expect("built in");
    let conversations: Vec<_> = letters::conversations(0, 1000)
        .map(|line| {
            let mut row = serde_json::from_str(&line).expect("generated JSON");
            match sharegpt.convert(&mut row).expect("valid") {
                Record::Conversation(conversation) => conversation,
                other => unreachable!("letters are conversations, not {other:?}"),
            }
        })
        .collect();
    let tokens: usize = conversations
        .iter()
        .map(|c| chat.example(c).expect("an example").input_ids.len())
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

/// Pretokenizes into a fresh store, so that nothing is found finished.
fn stage(runtime: &Runtime, standardized: &FinishedStage, chat: &Chat) -> FinishedStage {
    let (options, cancel) = (PretokenizeOptions::default(), CancelToken::new());
    let store = Store::memory();
    runtime
        .block_on(pretokenize(
            &store,
            "qwen",
            "conv20k",
            standardized,
            chat,
            &options,
            &NoProgress,
            &cancel,
        ))
        .expect("pretokenized")
}

fn conv20k(criterion: &mut Criterion) {
    let Some(fixtures) = std::env::var_os("UPDRAFT_FIXTURES").map(PathBuf::from) else {
        eprintln!("skipped: conv20k needs UPDRAFT_FIXTURES");
        return;
    };
    let runtime = Runtime::new().expect("runtime");
    let chat = chat(&fixtures.join("tokenizers/qwen2.5"));
    let store = Store::memory();
    let path = fixtures
        .join("golden/conv20k.parquet")
        .display()
        .to_string();
    let standardized = runtime.block_on(async {
        let source = resolve_source(&path, &SourceOptions::default())
            .await
            .expect("the file");
        let options = ImportOptions::default();
        import(
            &store,
            "conv20k",
            &*source,
            &options,
            &NoProgress,
            &CancelToken::new(),
        )
        .await
        .expect("imported")
    });
    let tokens = stage(&runtime, &standardized, &chat).counts()["tokens"];
    let mut group = criterion.benchmark_group("tokenize");
    group
        .throughput(Throughput::Elements(tokens))
        .sample_size(10);
    group.bench_function("conv20k", |bencher| {
        bencher.iter(|| stage(&runtime, &standardized, &chat));
    });
    group.finish();
}

criterion_group!(benches, letters, conv20k);
criterion_main!(benches);
