//! Bad input to a stage: a clear error or a counted reject, and nothing taken for finished.

use std::sync::Mutex;

use futures::TryStreamExt as _;
use serde_json::{Value, json};
use updraft_dataset::{
    Error, ImportOptions, MAX_LISTED_REJECTS, MemorySource, Overflow, PretokenizeOptions,
    ShardPlan, SourceOptions, import, pretokenize, rejects, resolve_source, resolve_source_with,
};
use updraft_store::{Area, CancelToken, Progress, ProgressSink, StageId, Store, current};

use crate::world::{chat, import_into, options, pretokenize_into, row, source};

/// `rows` rows of which every `bad`-th has an unknown role.
fn some_bad(rows: usize, bad: usize) -> MemorySource {
    let one = |i: usize| {
        if i % bad == 1 {
            json!({ "conversations": [{ "from": "narrator", "value": "x" }] })
        } else {
            row(i)
        }
    };
    MemorySource::new("rows", (0..rows).map(one)).expect("objects")
}

async fn check_unfinished(store: &Store) {
    for area in Area::ALL {
        let id = StageId::new(area, "set").expect("a name");
        assert!(current(store, &id).await.expect("memory").is_none());
    }
}

#[tokio::test]
async fn rejects_are_counted_and_listed_in_order() {
    let store = Store::memory();
    let imported = import_into(&store, &some_bad(95, 20), &options())
        .await
        .expect("under the limit");
    let manifest = imported.manifest().await.expect("manifest");
    assert_eq!(
        (
            manifest.counts["rows"],
            manifest.counts["rejected"],
            manifest.counts["source_rows"]
        ),
        (90, 5, 95)
    );
    let rows: Vec<u64> = manifest.rejects.iter().map(|reject| reject.row).collect();
    assert_eq!(rows, [1, 21, 41, 61, 81]);
    assert_eq!(manifest.rejects[0].source, "rows:2");
    assert_eq!(
        manifest.rejects[0].reason,
        "message 0 has the unknown role \"narrator\""
    );
}

/// One shard of more rejects than its journal lists, and many shards of few.
#[tokio::test]
async fn a_manifest_of_many_rejects_stays_small_and_none_is_lost() {
    for (max_rows, listed, lists) in [(10_000, 50, 1), (10, MAX_LISTED_REJECTS, 1), (800, 250, 5)] {
        let store = Store::memory();
        let mut lenient = ImportOptions {
            max_reject_rate: 1.0,
            ..ImportOptions::default()
        };
        lenient.shards.max_rows = max_rows;
        let imported = import_into(&store, &some_bad(4000, 2), &lenient)
            .await
            .expect("no limit");
        let manifest = imported.manifest().await.expect("manifest");
        assert_eq!(manifest.counts["rejected"], 2000);
        assert_eq!(
            (manifest.rejects.len(), manifest.more_rejects.len()),
            (listed, lists)
        );
        let all = rejects(&imported).await.expect("rejects");
        let mut all: Vec<_> = all.try_collect().await.expect("lists");
        all.sort_by_key(|reject| reject.row);
        assert!(
            all.iter()
                .map(|reject| reject.row)
                .eq((0..2000).map(|i| 2 * i + 1))
        );
        assert_eq!(all[1999].source, "rows:4000");
        let kept = updraft_store::garbage(&store, imported.id())
            .await
            .expect("garbage");
        assert!(
            !kept.iter().any(|object| object.path.contains("/rejects-")),
            "{kept:?}"
        );

        // What the import left out is not in the next stage's way, shards of nothing included.
        let ready = pretokenize_into(&store, &imported, &PretokenizeOptions::default())
            .await
            .expect("a pretokenize");
        assert_eq!(ready.counts()["rows"], 2000);
    }
}

#[tokio::test]
async fn a_reason_quotes_no_whole_row() {
    let word = "né".repeat(10_000);
    let row = json!({ "conversations": [{ "from": word, "value": "x" }] });
    let source = MemorySource::new("rows", [row, crate::world::row(0)]).expect("objects");
    let lenient = ImportOptions {
        max_reject_rate: 1.0,
        ..ImportOptions::default()
    };
    let imported = import_into(&Store::memory(), &source, &lenient)
        .await
        .expect("no limit");
    let reason = &imported.manifest().await.expect("manifest").rejects[0].reason;
    assert!(
        reason.ends_with("né…") || reason.ends_with("n…"),
        "{reason}"
    );
    assert!((400..600).contains(&reason.len()), "{}", reason.len());
}

#[tokio::test]
async fn too_many_rejects_stop_the_import_and_a_higher_limit_goes_on() {
    let store = Store::memory();
    let source = some_bad(95, 5);
    let err = import_into(&store, &source, &options())
        .await
        .expect_err("20% are bad");
    assert_eq!(
        err.to_string(),
        "19 of 95 rows rejected, above the limit of 10%; the first is rows:2: message 0 has the unknown role \"narrator\": mend the data or raise max_reject_rate"
    );
    check_unfinished(&store).await;
    let lenient = ImportOptions {
        max_reject_rate: 0.2,
        ..options()
    };
    let imported = import_into(&store, &source, &lenient)
        .await
        .expect("within the limit");
    assert_eq!(imported.counts()["rows"], 76);
    // Finished, but not good enough for a stricter run.
    let err = import_into(&store, &source, &options())
        .await
        .expect_err("20% are bad");
    assert!(
        matches!(err, Error::TooManyRejects { rejected: 19, .. }),
        "{err}"
    );
}

#[tokio::test]
async fn a_long_run_of_rejects_stops_early() {
    let endless = MemorySource::new(
        "rows",
        (0..60_000).map(|i| if i == 0 { row(0) } else { json!({ "i": i }) }),
    )
    .expect("objects");
    let err = import_into(&Store::memory(), &endless, &options())
        .await
        .expect_err("nearly all are bad");
    assert!(
        matches!(
            err,
            Error::TooManyRejects {
                rows: 10_000..30_000,
                ..
            }
        ),
        "{err}"
    );
}

#[tokio::test]
async fn nothing_to_import_is_said_so() {
    let store = Store::memory();
    let check = async |rows: Vec<Value>, options: ImportOptions, words: &str| {
        let source = MemorySource::new("rows", rows).expect("objects");
        let err = import_into(&store, &source, &options)
            .await
            .expect_err(words)
            .to_string();
        assert!(err.contains(words) && !err.contains('\n'), "{err}");
    };
    check(
        vec![],
        options(),
        "rows has no rows: check the file and the split",
    )
    .await;
    check(
        vec![json!({ "a": 1, "b": 2 })],
        options(),
        "no format fits rows (columns: a, b): name one of preference, sharegpt",
    )
    .await;
    check(
        vec![row(0)],
        ImportOptions {
            format: Some("sharegtp".into()),
            ..options()
        },
        "no format fits the name 'sharegtp'",
    )
    .await;
    check(
        vec![row(0)],
        ImportOptions {
            limit: Some(0),
            ..options()
        },
        "limit is 0",
    )
    .await;
    check(
        vec![row(0)],
        ImportOptions {
            max_reject_rate: 1.5,
            ..options()
        },
        "max_reject_rate is 1.5",
    )
    .await;
    let no_rows = ShardPlan {
        max_rows: 0,
        ..ShardPlan::default()
    };
    check(
        vec![row(0)],
        ImportOptions {
            shards: no_rows,
            ..options()
        },
        "shards max_rows is 0",
    )
    .await;
    let all_bad = ImportOptions {
        format: Some("text".into()),
        max_reject_rate: 1.0,
        ..options()
    };
    check(
        vec![row(0)],
        all_bad,
        "rows has no rows: all 1 rows were rejected, the first for: column text is missing or null",
    )
    .await;
    check_unfinished(&store).await;
}

#[tokio::test]
async fn a_limit_takes_the_first_rows_and_unknown_columns_come_when_asked() {
    let with_id = |i| {
        let mut row = row(i);
        row["id"] = json!(i);
        row
    };
    let source = MemorySource::new("rows", (0..50).map(with_id)).expect("objects");
    let store = Store::memory();
    let few = import_into(
        &store,
        &source,
        &ImportOptions {
            limit: Some(25),
            ..options()
        },
    )
    .await
    .expect("import");
    assert_eq!(
        (
            few.counts()["rows"],
            few.manifest().await.expect("manifest").objects.len()
        ),
        (25, 3)
    );
    let kept = import_into(
        &store,
        &source,
        &ImportOptions {
            keep_columns: true,
            ..options()
        },
    )
    .await
    .expect("import");
    assert_ne!(few.key(), kept.key());
    assert_eq!(kept.counts()["rows"], 50);
}

/// Cancels at the first event.
#[derive(Debug)]
struct CancelAtOnce(CancelToken);

impl ProgressSink for CancelAtOnce {
    fn report(&self, _: &Progress) {
        self.0.cancel();
    }
}

#[tokio::test]
async fn a_cancelled_stage_goes_on_in_the_next_run() {
    let (store, source) = (Store::memory(), source(1500));
    let expected = import_into(&Store::memory(), &source, &options())
        .await
        .expect("import")
        .manifest()
        .await
        .expect("manifest");
    let cancel = CancelToken::new();
    let err = import(
        &store,
        "set",
        &source,
        &options(),
        &CancelAtOnce(cancel.clone()),
        &cancel,
    )
    .await
    .expect_err("cancelled");
    assert!(
        matches!(err, Error::Store(updraft_store::Error::Cancelled)),
        "{err}"
    );
    check_unfinished(&store).await;
    let standardized = import_into(&store, &source, &options())
        .await
        .expect("the next run");
    assert_eq!(standardized.manifest().await.expect("manifest"), expected);

    let cancel = CancelToken::new();
    let options = PretokenizeOptions::default();
    let err = pretokenize(
        &store,
        "tiny",
        "set",
        &standardized,
        &chat(),
        &options,
        &CancelAtOnce(cancel.clone()),
        &cancel,
    )
    .await
    .expect_err("cancelled");
    assert!(
        matches!(err, Error::Store(updraft_store::Error::Cancelled)),
        "{err}"
    );
    assert_eq!(
        pretokenize_into(&store, &standardized, &options)
            .await
            .expect("the next run")
            .counts()["rows"],
        1500
    );
}

#[tokio::test]
async fn long_examples_are_truncated_split_or_rejected() {
    let store = Store::memory();
    let long =
        |answer: usize| json!({ "prompt": "q".repeat(20), "completion": "a".repeat(answer) });
    let source = MemorySource::new("rows", [long(5), long(200)]).expect("objects");
    let standardized = import_into(&store, &source, &options())
        .await
        .expect("import");
    let counts = async |overflow, max_seq_len| {
        let options = PretokenizeOptions {
            max_seq_len: Some(max_seq_len),
            overflow,
            max_reject_rate: 1.0,
            ..PretokenizeOptions::default()
        };
        pretokenize_into(&store, &standardized, &options)
            .await
            .map(|stage| stage.counts().clone())
    };
    let whole = counts(Overflow::Reject, 1000).await.expect("all fit");
    assert_eq!((whole["rows"], whole.get("rejected")), (2, None));
    let rejected = counts(Overflow::Reject, 100).await.expect("one fits");
    assert_eq!((rejected["rows"], rejected["rejected"]), (1, 1));
    let truncated = counts(Overflow::Truncate, 100).await.expect("both fit");
    assert_eq!((truncated["rows"], truncated["truncated"]), (2, 1));
    assert!(truncated["tokens"] < whole["tokens"]);
    let split = counts(Overflow::Split, 100).await.expect("both fit");
    assert_eq!(
        (split["rows"], split["split"], split["tokens"]),
        (4, 1, whole["tokens"])
    );
    // A cut before the answer leaves nothing to train on.
    let err = counts(Overflow::Truncate, 10)
        .await
        .expect_err("nothing is left");
    assert!(
        err.to_string().contains(
            "all 2 rows were rejected, the first for: nothing to train on within max_seq_len"
        ),
        "{err}"
    );
    let err = counts(Overflow::Truncate, 1).await.expect_err("too short");
    assert!(matches!(
        err,
        Error::InvalidOption {
            option: "max_seq_len",
            ..
        }
    ));
}

#[tokio::test]
async fn what_cannot_be_trained_is_rejected_with_the_chats_reason() {
    let store = Store::memory();
    let mute = json!({ "conversations": [{ "from": "human", "value": "hello" }] });
    let source = MemorySource::new("rows", [row(0), mute]).expect("objects");
    let standardized = import_into(&store, &source, &options())
        .await
        .expect("import");
    let err = pretokenize_into(&store, &standardized, &PretokenizeOptions::default())
        .await
        .expect_err("half are bad")
        .to_string();
    assert!(
        err.starts_with("1 of 2 rows rejected") && err.contains("nothing to train on"),
        "{err}"
    );
}

/// Each of these is a quarter of the memory that batches share.
#[tokio::test]
async fn rows_of_almost_the_limit_come_one_after_the_other() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("long.jsonl.zst");
    let mut lines = Vec::new();
    for i in 0..9 {
        let text = format!("{i} ").repeat(15 << 19);
        let line = json!({ "text": text }).to_string() + "\n";
        lines.extend(zstd::bulk::compress(line.as_bytes(), 1).expect("memory"));
    }
    std::fs::write(&path, lines).expect("written");
    let spec = path.to_str().expect("UTF-8");
    let source = resolve_source(spec, &SourceOptions::default())
        .await
        .expect("a file");
    let imported = import_into(&Store::memory(), &*source, &ImportOptions::default())
        .await
        .expect("imported");
    assert_eq!(
        (imported.counts()["rows"], imported.counts().get("rejected")),
        (9, None)
    );
}

/// Keeps the events.
#[derive(Debug, Default)]
struct Kept(Mutex<Vec<Progress>>);

impl ProgressSink for Kept {
    fn report(&self, progress: &Progress) {
        self.0.lock().expect("no panic").push(progress.clone());
    }
}

#[tokio::test]
async fn hashing_large_files_shows_progress_and_can_be_cancelled() {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["a.jsonl", "b.jsonl"] {
        let file = std::fs::File::create(folder.path().join(name)).expect("created");
        file.set_len(100 << 20).expect("a file of zeros");
    }
    let spec = folder.path().to_str().expect("UTF-8");
    let options = SourceOptions::default();
    let (cancel, kept) = (CancelToken::new(), Kept::default());
    resolve_source_with(spec, &options, &kept, &cancel)
        .await
        .expect("a folder");
    let events = kept.0.into_inner().expect("no panic");
    assert_eq!(events.len(), 3);
    assert!(events.is_sorted_by_key(|event| event.done));
    assert!(events.iter().all(|event| event.total == Some(200 << 20)));

    // Hashed afresh: what was just written is not remembered.
    let at_once = CancelAtOnce(cancel.clone());
    let err = resolve_source_with(spec, &options, &at_once, &cancel)
        .await
        .expect_err("cancelled");
    assert!(
        matches!(err, Error::Store(updraft_store::Error::Cancelled)),
        "{err:?}"
    );
}
