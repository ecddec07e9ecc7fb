//! The raw copy: rows as they came, committed, and a source again.

use serde_json::{Value, json};
use updraft_dataset::source::{Cursor, Files};
use updraft_dataset::{ImportOptions, MemorySource, conformance, copy_raw};
use updraft_store::conformance::survives_every_fault;
use updraft_store::{CancelToken, FinishedStage, NoProgress, Store, faults};

use crate::world::{import_into, options, source};

async fn copy(store: &Store, source: &MemorySource) -> updraft_dataset::Result<FinishedStage> {
    copy_raw(
        store,
        "set",
        source,
        &options(),
        &NoProgress,
        &CancelToken::new(),
    )
    .await
}

#[tokio::test]
async fn rows_come_back_as_they_came() {
    let rows: Vec<Value> = (0..25)
        .map(|i| json!({ "z": i, "a": { "b": [null, 1.5, "ü\n"] }, "text": format!("row {i}") }))
        .collect();
    let source = MemorySource::new("rows", rows.clone()).expect("objects");
    let store = Store::memory();
    let raw = copy(&store, &source).await.expect("copied");
    assert_eq!(
        (
            raw.counts()["rows"],
            raw.manifest().await.expect("committed").objects.len()
        ),
        (25, 3)
    );
    assert!(raw.dir().starts_with("raw/set/"));

    let again = Files::in_stage(&raw).await.expect("a source");
    let found = conformance::rows(&again, Cursor::default()).await;
    let found: Vec<Value> = found
        .into_iter()
        .map(|row| Value::Object(row.value.expect("a row")))
        .collect();
    assert_eq!(found, rows);
    assert_eq!(
        found[0].to_string(),
        rows[0].to_string(),
        "keys keep their order"
    );
}

#[tokio::test(start_paused = true)]
async fn a_copy_killed_at_any_call_ends_the_same() {
    survives_every_fault(
        async || Store::memory(),
        async |store| copy(&store, &source(45)).await,
    )
    .await;
}

#[tokio::test]
async fn an_import_keeps_the_raw_rows_only_when_asked() {
    let (plain, kept) = (Store::memory(), Store::memory());
    let keep = ImportOptions {
        keep_raw: true,
        ..options()
    };
    let one = import_into(&plain, &source(45), &options())
        .await
        .expect("imported");
    let two = import_into(&kept, &source(45), &keep)
        .await
        .expect("imported");
    assert_eq!(one.key(), two.key(), "the raw copy changes nothing else");
    assert!(plain.list("raw").await.expect("list").is_empty());
    assert_eq!(
        kept.list("raw").await.expect("list").len(),
        5 + 5 + 2,
        "shards, journal, manifest, pointer"
    );

    let (counted, calls) = faults::count(&kept);
    import_into(&counted, &source(45), &keep)
        .await
        .expect("again");
    assert_eq!(
        (calls.reads(), calls.total()),
        (2, 2),
        "one GET for each of the two stages"
    );
}
