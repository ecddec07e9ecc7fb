//! Genuine datasets: the format that is found, the rows, the rejects.

use std::path::PathBuf;

use arrow_array::cast::AsArray as _;
use arrow_array::types::UInt32Type;
use futures::TryStreamExt as _;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use updraft_chat::{Chat, ChatFiles, TemplateFiles};
use updraft_dataset::{
    ImportOptions, PretokenizeOptions, Reader, ReaderOptions, ShardPlan, Shuffle, SourceOptions,
    pretokenize, resolve_source,
};
use updraft_store::{CancelToken, NoProgress, Store};

use crate::world::import_into;

/// Every file of `$UPDRAFT_FIXTURES/datasets`: format, rows taken, rows rejected.
const SETS: [(&str, &str, u64, u64); 14] = [
    ("fastchat_dummy_conversation.json", "sharegpt", 500, 0),
    ("gpteacher_roleplay.json", "alpaca", 1923, 0),
    ("gpteacher_toolformer.json", "alpaca", 4709, 0),
    ("gsm8k_train.jsonl", "question-answer", 7473, 0),
    ("hh_harmless_test.jsonl.gz", "preference", 2312, 0),
    ("lf_alpaca_en_demo.json", "alpaca", 999, 0),
    ("lf_alpaca_zh_demo.json", "alpaca", 1000, 0),
    ("lf_c4_demo.jsonl", "text", 300, 0),
    ("lf_dpo_en_demo.json", "preference", 300, 0),
    ("lf_glaive_toolcall_en_demo.json", "sharegpt", 300, 0),
    ("lf_identity.json", "alpaca", 91, 0),
    ("lf_kto_en_demo.json", "preference", 300, 0),
    ("lf_reason_tool_use_demo_50.jsonl", "openai", 50, 0),
    ("lf_v1_multimodal_demo.jsonl", "openai", 24, 0),
];

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn fixtures() -> Option<PathBuf> {
    let folder = std::env::var_os("UPDRAFT_FIXTURES").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("skipped: set UPDRAFT_FIXTURES to the folder with the reference data");
    }
    folder
}

#[tokio::test]
async fn every_genuine_set_imports_with_its_format() {
    let Some(folder) = fixtures() else { return };
    let mut known: Vec<&str> = SETS.iter().map(|set| set.0).collect();
    for (name, format, rows, rejected) in SETS {
        let path = folder.join("datasets").join(name);
        let source = resolve_source(path.to_str().expect("UTF-8"), &SourceOptions::default())
            .await
            .expect(name);
        let imported = import_into(&Store::memory(), &*source, &ImportOptions::default())
            .await
            .expect(name);
        let manifest = imported.manifest().await.expect(name);
        let counts = (
            manifest.counts["rows"],
            manifest.counts.get("rejected").copied().unwrap_or(0),
        );
        assert_eq!(manifest.attributes["format"], format, "{name}");
        assert_eq!(
            counts,
            (rows, rejected),
            "{name}: {:?}",
            manifest.rejects.first()
        );
    }
    known.sort_unstable();
    let mut found: Vec<String> = std::fs::read_dir(folder.join("datasets"))
        .expect("folder")
        .map(|entry| {
            entry
                .expect("entry")
                .file_name()
                .into_string()
                .expect("UTF-8")
        })
        .collect();
    found.sort_unstable();
    assert_eq!(found, known, "every set has its line");
}

/// The first rows of a golden file's `input_ids`.
fn golden_ids(path: &std::path::Path, rows: usize) -> Vec<Vec<u32>> {
    let file = std::fs::File::open(path).expect("the golden file");
    let reader = ParquetRecordBatchReaderBuilder::try_new(file)
        .expect("Parquet")
        .with_limit(rows)
        .build()
        .expect("Parquet");
    let mut all = Vec::new();
    for batch in reader {
        let batch = batch.expect("Parquet");
        let ids = batch
            .column_by_name("input_ids")
            .expect("the column")
            .as_list::<i32>();
        all.extend(ids.iter().map(|row| {
            row.expect("no null")
                .as_primitive::<UInt32Type>()
                .values()
                .to_vec()
        }));
    }
    all
}

#[tokio::test]
async fn token_ids_are_those_of_transformers() {
    const ROWS: usize = 2000;
    let Some(folder) = fixtures() else { return };
    let read =
        |name: &str| std::fs::read(folder.join("tokenizers/qwen2.5").join(name)).expect(name);
    let (tokenizer, config) = (read("tokenizer.json"), read("tokenizer_config.json"));
    let template = TemplateFiles {
        tokenizer_config: Some(&config),
        ..TemplateFiles::default()
    };
    let chat = Chat::from_files(&ChatFiles {
        tokenizer_json: &tokenizer,
        template,
        generation_config: None,
    })
    .expect("a chat");

    let conversations = folder.join("golden/conv20k.parquet");
    let source = resolve_source(
        conversations.to_str().expect("UTF-8"),
        &SourceOptions::default(),
    )
    .await
    .expect("found");
    let store = Store::memory();
    let shards = ShardPlan {
        max_rows: 300,
        ..ShardPlan::default()
    };
    let options = ImportOptions {
        limit: Some(ROWS as u64),
        shards,
        ..ImportOptions::default()
    };
    let standardized = import_into(&store, &*source, &options)
        .await
        .expect("import");
    let options = PretokenizeOptions::default();
    let ready = pretokenize(
        &store,
        "qwen",
        "conv20k",
        &standardized,
        &chat,
        &options,
        &NoProgress,
        &CancelToken::new(),
    )
    .await
    .expect("pretokenize");
    assert_eq!(
        (ready.counts()["rows"], ready.counts().get("rejected")),
        (ROWS as u64, None)
    );

    let reader = Reader::open(
        &ready,
        ReaderOptions {
            shuffle: Shuffle::Off,
            ..ReaderOptions::default()
        },
    )
    .await
    .expect("reader");
    let examples: Vec<_> = reader.read(0, 0).try_collect().await.expect("read");
    let golden = golden_ids(&folder.join("golden/conv20k.qwen2.5.ids.parquet"), ROWS);
    for (row, (example, golden)) in examples.iter().zip(&golden).enumerate() {
        assert_eq!(&example.input_ids, golden, "row {row}");
    }
    assert_eq!(examples.len(), golden.len());
}
