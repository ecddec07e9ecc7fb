//! Which files are meant: by the dataset card, by names, in a folder, a store and on the Hub alike.

use std::fs;

use updraft_dataset::source::{Cursor, Files};
use updraft_dataset::{Error, Source, SourceOptions, conformance, resolve_source};
use updraft_store::Store;

const CARD: &str = "---
configs:
- config_name: en
  default: true
  data_files:
  - split: train
    path: en/*.jsonl
  - split: extra
    path: [more.jsonl, other/**]
- config_name: fr
  data_dir: fr
---
# A set
";

const FILES: [(&str, &str); 7] = [
    ("README.md", CARD),
    ("en/b.jsonl", "en b"),
    ("en/a.jsonl", "en a"),
    ("fr/train.jsonl", "fr train"),
    ("fr/test.jsonl", "fr test"),
    ("more.jsonl", "more"),
    ("other/deep/c.jsonl", "deep"),
];

fn content(name: &str, text: &str) -> String {
    if name == "README.md" {
        text.to_owned()
    } else {
        serde_json::json!({ "text": text }).to_string()
    }
}

fn options(config: Option<&str>, split: &str) -> SourceOptions {
    SourceOptions {
        config: config.map(str::to_owned),
        split: split.to_owned(),
        ..SourceOptions::default()
    }
}

async fn texts(files: &Files) -> Vec<String> {
    let rows = conformance::rows(files, Cursor::default()).await;
    let text = |row: updraft_dataset::source::Row| {
        row.value.expect("a row")["text"]
            .as_str()
            .expect("text")
            .to_owned()
    };
    rows.into_iter().map(text).collect()
}

#[tokio::test]
async fn the_card_says_which_files_a_split_has() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::memory();
    for (name, text) in FILES {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("inside")).expect("made");
        fs::write(path, content(name, text)).expect("written");
        store
            .put(&format!("some/set/{name}"), content(name, text).into())
            .await
            .expect("put");
    }
    let spec = folder.path().to_str().expect("UTF-8");
    let both = async |options: &SourceOptions| -> Result<[Vec<String>; 2], Error> {
        let local = resolve_source(spec, options).await?;
        let stored = Files::in_store(&store, "some/set/", options).await?;
        Ok([texts(&local).await, texts(&stored).await])
    };
    for (config, split, expected) in [
        (None, "train", &["en a", "en b"][..]),
        (Some("en"), "extra", &["more", "deep"]),
        (Some("fr"), "train", &["fr train"]),
        (Some("fr"), "test", &["fr test"]),
    ] {
        let found = both(&options(config, split)).await.expect("found");
        assert_eq!(found, [expected, expected], "{config:?} {split}");
    }
    for (config, split, words) in [
        (
            None,
            "test",
            "expected files of the split 'test'; choose one of train, extra",
        ),
        (
            Some("de"),
            "train",
            "expected one configuration; name one of en, fr",
        ),
        (Some("fr"), "dev", "expected names with 'dev'"),
    ] {
        let err = both(&options(config, split))
            .await
            .expect_err(words)
            .to_string();
        assert!(err.contains(words) && !err.contains('\n'), "{err}");
    }
}

#[tokio::test]
async fn a_folder_that_lacks_a_shard_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    for shard in ["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"] {
        fs::write(folder.path().join(shard), "{\"text\": \"a\"}").expect("written");
    }
    let spec = folder.path().to_str().expect("UTF-8");
    let err = resolve_source(spec, &SourceOptions::default())
        .await
        .expect_err("one is missing");
    assert!(
        err.to_string()
            .contains("expected train-00001-of-00003.jsonl, which is not there"),
        "{err}"
    );
    let err = resolve_source(spec, &options(Some("en"), "train"))
        .await
        .expect_err("no card")
        .to_string();
    assert!(
        err.contains("a README.md with the configuration en"),
        "{err}"
    );
}

/// A file that changes after it was looked at is not read as if it had not.
#[tokio::test]
async fn a_source_that_changes_is_noticed() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a.jsonl");
    let store = Store::memory();
    fs::write(&path, "{\"text\": \"one\"}").expect("written");
    store
        .put("set/a.jsonl", "{\"text\": \"one\"}".into())
        .await
        .expect("put");
    let local = resolve_source(path.to_str().expect("UTF-8"), &SourceOptions::default())
        .await
        .expect("found");
    let stored = Files::in_store(&store, "set", &SourceOptions::default())
        .await
        .expect("found");
    fs::write(&path, "{\"text\": \"another\"}").expect("written");
    store
        .put("set/a.jsonl", "{\"text\": \"another\"}".into())
        .await
        .expect("put");
    for source in [&*local, &stored] {
        use futures::TryStreamExt as _;
        let read = async {
            source
                .open(Cursor::default())
                .await?
                .try_collect::<Vec<_>>()
                .await
        };
        let err = read.await.expect_err("it has changed");
        let chain = format!("{err}: {:?}", std::error::Error::source(&err));
        assert!(
            matches!(err, Error::Read { .. }) && chain.to_lowercase().contains("changed"),
            "{chain}"
        );
    }
}

/// Resolves a folder of files with these names, each a row of its own name.
async fn chosen(names: &[&str]) -> Result<Vec<String>, Error> {
    let store = Store::memory();
    for name in names {
        let row = match name.rsplit_once('.') {
            Some((_, "csv")) => format!("text\n{name}\n"),
            Some((_, "txt")) => format!("{name}\n"),
            _ => content(name, name),
        };
        store.put(name, row.into()).await.expect("put");
    }
    let files = Files::in_store(&store, "", &options(None, "train")).await?;
    Ok(texts(&files).await)
}

#[tokio::test]
async fn the_commonest_kind_of_file_is_the_dataset() {
    for (names, expected) in [
        (&["train.csv", "train.jsonl"][..], &["train.jsonl"][..]),
        (&["a.csv", "b.csv", "c.jsonl"], &["a.csv", "b.csv"]),
        (&["a.json", "b.jsonl", "c.txt"], &["a.json", "b.jsonl"]),
        (&["LICENSE.txt", "notes.txt"], &["notes.txt"]),
    ] {
        assert_eq!(chosen(names).await.expect("found"), expected, "{names:?}");
    }
    let err = chosen(&["a.json", "a.jsonl"]).await.expect_err("twice");
    let err = err.to_string();
    assert!(err.contains("one of a.json and a.jsonl"), "{err}");
    let err = chosen(&["LICENSE.txt"]).await.expect_err("no rows");
    assert!(matches!(err, Error::NoDataFiles { .. }), "{err}");
}
