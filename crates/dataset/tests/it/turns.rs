//! Plain turns go straight from Arrow to JSON; what is stored is what the long way would store.

use std::path::PathBuf;
use std::sync::Arc;

use arrow_array::builder::{Float64Builder, ListBuilder, StringBuilder, StructBuilder};
use arrow_array::{ArrayRef, LargeStringArray, NullArray, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Fields};
use parquet::arrow::ArrowWriter;
use serde_json::Value;
use updraft_dataset::source::{Cursor, Row};
use updraft_dataset::{
    Format, Formats, ImportOptions, Record, ShardPlan, Source, SourceOptions, conformance,
    import_with, resolve_source,
};
use updraft_store::{CancelToken, Manifest, NoProgress, Store};

/// A turn's role, text and weight.
type Turn<'a> = (Option<&'a str>, Option<&'a str>, Option<f64>);

fn turn<'a>(role: &'a str, text: &'a str) -> Turn<'a> {
    (Some(role), Some(text), None)
}

/// A column of lists of turns, under these names.
fn column(names: [&str; 2], rows: &[Option<Vec<Turn<'_>>>]) -> ArrayRef {
    let fields = Fields::from(vec![
        Field::new(names[0], DataType::Utf8, true),
        Field::new(names[1], DataType::Utf8, true),
        Field::new("weight", DataType::Float64, true),
    ]);
    let mut lists = ListBuilder::new(StructBuilder::from_fields(fields, 0));
    for row in rows {
        for (role, text, weight) in row.iter().flatten() {
            let items = lists.values();
            for (i, cell) in [role, text].into_iter().enumerate() {
                let column: &mut StringBuilder = items.field_builder(i).expect("a text");
                column.append_option(*cell);
            }
            let column: &mut Float64Builder = items.field_builder(2).expect("a number");
            column.append_option(*weight);
            let is_there = role.is_some() || text.is_some();
            items.append(is_there);
        }
        lists.append(row.is_some());
    }
    Arc::new(lists.finish())
}

fn rows() -> Vec<Option<Vec<Turn<'static>>>> {
    vec![
        Some(vec![
            turn("human", "hi"),
            turn("gpt", "a \"quoted\" \\ line\nand \u{1} ü 🦀"),
        ]),
        Some(vec![
            turn("SYSTEM", ""),
            turn("user", "q"),
            turn("assistant", "\u{7f}\u{2028}</s>"),
        ]),
        Some(vec![
            turn("human", "call"),
            turn(
                "function_call",
                "{\"name\":\"f\",\"arguments\":{\"b\":1,\"a\":2}}",
            ),
        ]),
        Some(vec![turn("human", "no such"), turn("narrator", "role")]),
        Some(vec![
            turn("human", "weighted"),
            (Some("gpt"), Some("not trained"), Some(0.0)),
        ]),
        Some(vec![turn("human", "no text"), (Some("gpt"), None, None)]),
        Some(vec![(None, Some("no role"), None)]),
        Some(vec![(None, None, None)]),
        Some(vec![]),
        None,
        Some(vec![
            turn("prompter", "last"),
            turn("observation", "one"),
            turn("bot", "done"),
        ]),
    ]
}

fn parquet(columns: Vec<(&str, ArrayRef)>) -> Vec<u8> {
    let batch = RecordBatch::try_from_iter_with_nullable(
        columns
            .into_iter()
            .map(|(name, column)| (name, column, true)),
    )
    .expect("columns of one length");
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), None).expect("a writer");
    writer.write(&batch).expect("memory");
    writer.into_inner().expect("memory")
}

/// The built-in format by another name for itself: as a stranger's, it takes the long way.
#[derive(Debug)]
struct Stranger(Arc<dyn Format>);

impl Format for Stranger {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn detect(&self, row: &serde_json::Map<String, Value>) -> bool {
        self.0.detect(row)
    }

    fn convert(&self, row: &mut serde_json::Map<String, Value>) -> Result<Record, String> {
        self.0.convert(row)
    }
}

async fn imported(source: &dyn Source, formats: &Formats, format: &str) -> Manifest {
    let options = ImportOptions {
        format: Some(format.to_owned()),
        max_reject_rate: 1.0,
        shards: ShardPlan {
            max_rows: 1000,
            ..ShardPlan::default()
        },
        ..ImportOptions::default()
    };
    let (store, cancel) = (Store::memory(), CancelToken::new());
    let stage = import_with(
        &store,
        "set",
        source,
        formats,
        &options,
        &NoProgress,
        &cancel,
    )
    .await;
    let stage = stage.expect("imported");
    stage.manifest().await.expect("committed")
}

/// Both ways give the same objects, counts and rejects.
async fn check(path: &std::path::Path, format: &str) -> Manifest {
    let spec = path.to_str().expect("UTF-8");
    let source = resolve_source(spec, &SourceOptions::default())
        .await
        .expect("a file");
    let built_in = Formats::default();
    let format_itself = Arc::clone(built_in.get(format).expect("built in"));
    let long = Formats::default().with(Arc::new(Stranger(format_itself)));
    let short = imported(&*source, &built_in, format).await;
    let long = imported(&*source, &long, format).await;
    assert_eq!(short.objects, long.objects, "{spec}");
    assert_eq!(
        (&short.counts, &short.rejects),
        (&long.counts, &long.rejects)
    );
    short
}

async fn check_columns(columns: Vec<(&str, ArrayRef)>, format: &str) -> Manifest {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("rows.parquet");
    std::fs::write(&path, parquet(columns)).expect("written");
    check(&path, format).await
}

#[tokio::test]
async fn the_short_way_stores_what_the_long_way_does() {
    let rows = rows();
    let texts = |text: &'static str| vec![Some(text), None, Some(""), Some(text)];
    let mut side: Vec<Option<&str>> = texts("be brief")
        .into_iter()
        .cycle()
        .take(rows.len())
        .collect();
    side[0] = None;
    for names in [["from", "value"], ["role", "content"], ["role", "value"]] {
        for list in ["conversations", "Messages", "conversation"] {
            let turns = || column(names, &rows);
            let plain = check_columns(vec![(list, turns())], "sharegpt").await;
            assert_eq!((plain.counts["rows"], plain.counts["rejected"]), (5, 6));
            let nulls: ArrayRef = Arc::new(NullArray::new(rows.len()));
            let system: ArrayRef = Arc::new(StringArray::from(side.clone()));
            let source: ArrayRef = Arc::new(LargeStringArray::from(side.clone()));
            let columns = vec![
                ("tools", nulls),
                (list, turns()),
                ("System", system),
                ("source", source),
            ];
            check_columns(columns, "openai").await;
        }
    }
    // Two columns that could be meant.
    let (first, second) = (
        column(["from", "value"], &rows),
        column(["from", "value"], &rows[..]),
    );
    check_columns(
        vec![("messages", first), ("conversations", second)],
        "sharegpt",
    )
    .await;
}

/// A genuine set of 20,000 conversations, if there is one.
#[tokio::test]
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
async fn a_genuine_set_is_stored_the_same_both_ways() {
    let Some(folder) = std::env::var_os("UPDRAFT_FIXTURES").map(PathBuf::from) else {
        eprintln!("skipped: set UPDRAFT_FIXTURES to the folder with the reference data");
        return;
    };
    let manifest = check(&folder.join("golden/conv20k.parquet"), "openai").await;
    assert_eq!(manifest.counts["rows"], 20_000);
}

/// Rows taken one by one are the batch's rows.
#[tokio::test]
async fn a_row_alone_is_the_row_of_the_batch() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("rows.parquet");
    let bytes = parquet(vec![("conversations", column(["from", "value"], &rows()))]);
    std::fs::write(&path, bytes).expect("written");
    let source = resolve_source(path.to_str().expect("UTF-8"), &SourceOptions::default())
        .await
        .expect("a file");
    let all: Vec<Row> = conformance::rows(&*source, Cursor::default()).await;
    for (i, row) in all.iter().enumerate().skip(1) {
        let from = all[i - 1].next;
        let alone = conformance::rows(&*source, from).await;
        assert_eq!(alone.first(), Some(row));
    }
}
