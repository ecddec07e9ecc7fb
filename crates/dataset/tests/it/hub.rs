//! A dataset on a server that answers as the Hub does.

use std::sync::Arc;

use arrow_array::{ArrayRef, BinaryArray, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use serde_json::{Value, json};
use updraft_dataset::source::{Cursor, Files, Row};
use updraft_dataset::{Error, Source, SourceOptions, conformance};
use updraft_store::hub::{HubClient, HubConfig, RepoRef};
use wiremock::matchers::{header, method, path};
use wiremock::{Mock, MockServer, Request, ResponseTemplate};

/// Serves a repository's files at one revision, with ranges.
async fn serve<B: AsRef<[u8]>>(server: &MockServer, revision: &str, files: &[(&str, B)]) {
    let sha = format!("{:0>40}", revision.len());
    let get = |at: String, answer: Value| {
        Mock::given(method("GET"))
            .and(path(at))
            .respond_with(ResponseTemplate::new(200).set_body_json(answer))
            .mount(server)
    };
    get(
        format!(
            "/api/datasets/owner/set/revision/{}",
            revision.replace('/', "%2F")
        ),
        json!({ "sha": sha }),
    )
    .await;
    let item = |(name, bytes): &(&str, B)| json!({ "type": "file", "path": name, "size": bytes.as_ref().len(), "oid": format!("oid-{name}") });
    let tree: Vec<Value> = files.iter().map(item).collect();
    get(format!("/api/datasets/owner/set/tree/{sha}"), json!(tree)).await;
    for (name, bytes) in files {
        let bytes = bytes.as_ref().to_vec();
        let answer = move |request: &Request| {
            let range = request
                .headers
                .get("range")
                .and_then(|range| range.to_str().ok()?.strip_prefix("bytes=")?.split_once('-'));
            let number = |text: &str| text.parse::<usize>().ok();
            let start = range.and_then(|range| number(range.0)).unwrap_or(0);
            let end = range
                .and_then(|range| number(range.1))
                .map_or(bytes.len(), |last| bytes.len().min(last + 1));
            ResponseTemplate::new(206)
                .insert_header("etag", "\"v1\"")
                .insert_header(
                    "content-range",
                    format!("bytes {start}-{}/{}", end - 1, bytes.len()),
                )
                .set_body_bytes(&bytes[start..end])
        };
        let at = format!("/datasets/owner/set/resolve/{sha}/{name}");
        Mock::given(method("GET"))
            .and(path(at))
            .respond_with(answer)
            .mount(server)
            .await;
    }
}

fn client(server: &MockServer) -> HubClient {
    let config = HubConfig {
        endpoint: server.uri(),
        ..HubConfig::default()
    };
    HubClient::new(config).expect("a client")
}

fn lines(rows: std::ops::Range<usize>) -> String {
    rows.map(|i| json!({ "text": format!("row {i}") }).to_string() + "\n")
        .collect()
}

async fn open(server: &MockServer, split: &str) -> Result<Files, Error> {
    let options = SourceOptions {
        split: split.to_owned(),
        ..SourceOptions::default()
    };
    open_with(server, &options).await
}

async fn open_with(server: &MockServer, options: &SourceOptions) -> Result<Files, Error> {
    Files::on_hub(
        &client(server),
        &RepoRef::dataset("owner/set").expect("a name"),
        options,
    )
    .await
}

#[tokio::test]
async fn the_files_of_the_split_are_read_at_one_commit() {
    let server = MockServer::start().await;
    let files = [
        ("README.md", "# set".to_owned()),
        ("data/train.jsonl", lines(0..20)),
        ("data/test.jsonl", lines(20..25)),
    ];
    serve(&server, "main", &files).await;
    let source = open(&server, "train").await.expect("resolved");
    assert_eq!(source.identity()["commit"], format!("{:0>40}", 4));
    let rows = conformance::rows(&source, Cursor::default()).await;
    assert_eq!(rows.len(), 20);
    assert_eq!(conformance::rows(&source, rows[11].next).await, rows[12..]);
    let err = open(&server, "validation")
        .await
        .expect_err("no such split")
        .to_string();
    assert!(
        err.contains("owner/set holds no data file: expected names with 'validation'"),
        "{err}"
    );
}

#[tokio::test]
async fn a_repository_of_scripts_is_read_from_the_hubs_export() {
    let server = MockServer::start().await;
    let script = [
        ("set.py", "import datasets".to_owned()),
        ("dataset_infos.json", "{}".to_owned()),
        ("requirements.txt", "nltk".to_owned()),
        ("LICENSE.txt", "as is".to_owned()),
    ];
    serve(&server, "main", &script).await;
    serve(&server, "v1.0", &script[..1]).await;
    let whole = [
        ("default/train/0000.jsonl", lines(0..3)),
        ("default/partial-test/0000.jsonl", lines(3..5)),
    ];
    serve(&server, "refs/convert/parquet", &whole).await;
    let source = open(&server, "train").await.expect("resolved");
    assert_eq!(conformance::rows(&source, Cursor::default()).await.len(), 3);
    let err = open(&server, "test")
        .await
        .expect_err("only a part")
        .to_string();
    assert!(err.contains("a part of it only"), "{err}");

    let old = RepoRef::dataset("owner/set").expect("a name").at("v1.0");
    let err = Files::on_hub(&client(&server), &old, &SourceOptions::default())
        .await
        .expect_err("another version")
        .to_string();
    assert!(err.contains("the Hub exports main only"), "{err}");
}

#[tokio::test]
async fn the_card_of_a_repository_is_obeyed() {
    let server = MockServer::start().await;
    let card = "---\nconfigs:\n- config_name: a\n  data_files: x/*.jsonl\n- config_name: b\n  data_files:\n  - split: train\n    path: y/1.jsonl\n---\n";
    let files = [
        ("README.md", card.to_owned()),
        ("x/1.jsonl", lines(0..2)),
        ("y/1.jsonl", lines(2..7)),
        ("y/2.jsonl", lines(7..9)),
    ];
    serve(&server, "main", &files).await;
    let with = |config: Option<&str>| SourceOptions {
        config: config.map(str::to_owned),
        ..SourceOptions::default()
    };
    let source = open_with(&server, &with(Some("b")))
        .await
        .expect("resolved");
    assert_eq!(conformance::rows(&source, Cursor::default()).await.len(), 5);
    let err = open_with(&server, &with(None))
        .await
        .expect_err("two to choose from")
        .to_string();
    assert!(
        err.contains("expected one configuration; name one of a, b"),
        "{err}"
    );
}

#[tokio::test]
async fn a_part_of_the_hubs_export_is_taken_when_asked() {
    let server = MockServer::start().await;
    serve(&server, "main", &[("set.py", "import datasets".to_owned())]).await;
    let part = [
        ("en/partial-train/0000.jsonl", lines(0..3)),
        ("fr/train/0000.jsonl", lines(3..7)),
    ];
    serve(&server, "refs/convert/parquet", &part).await;
    let options = |config: Option<&str>, partial_export| SourceOptions {
        config: config.map(str::to_owned),
        partial_export,
        ..SourceOptions::default()
    };
    for (config, partial, rows) in [("en", true, 3), ("fr", false, 4)] {
        let source = open_with(&server, &options(Some(config), partial))
            .await
            .expect(config);
        assert_eq!(
            conformance::rows(&source, Cursor::default()).await.len(),
            rows
        );
    }
    for (config, words) in [
        (None, "name one of en, fr"),
        (Some("en"), "a part of it only"),
    ] {
        let err = open_with(&server, &options(config, false))
            .await
            .expect_err(words)
            .to_string();
        assert!(err.contains(words), "{err}");
    }
}

/// Of a row group's columns only those that can be read come, and a large one in pieces.
#[tokio::test]
async fn no_column_comes_for_nothing() {
    const PIECE_BYTES: usize = 8 << 20;
    const TEXT_BYTES: usize = 5 << 20;
    let texts = ["a", "b"].map(|letter| letter.repeat(TEXT_BYTES));
    let image = vec![7; 3 << 20];
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("image", Arc::new(BinaryArray::from(vec![&*image; 2]))),
        ("text", Arc::new(StringArray::from(texts.to_vec()))),
    ];
    let batch = RecordBatch::try_from_iter(columns).expect("columns");
    let plain = WriterProperties::builder()
        .set_dictionary_enabled(false)
        .build();
    let mut writer =
        ArrowWriter::try_new(Vec::new(), batch.schema(), Some(plain)).expect("a writer");
    writer.write(&batch).expect("memory");
    let bytes = writer.into_inner().expect("memory");

    let server = MockServer::start().await;
    serve(&server, "main", &[("data/train.parquet", bytes)]).await;
    let source = open(&server, "train").await.expect("resolved");
    let rows = conformance::rows(&source, Cursor::default()).await;
    let row: &Row = &rows[1];
    assert!(row.value.as_ref().expect("a row")["text"] == texts[1]);

    let requests = server.received_requests().await.expect("recorded");
    let length = |request: &Request| {
        let range = request.headers.get("range")?.to_str().ok()?;
        let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some(last.parse::<usize>().ok()? + 1 - first.parse::<usize>().ok()?)
    };
    let lengths: Vec<usize> = requests.iter().filter_map(length).collect();
    let sum: usize = lengths.iter().sum();
    assert!(sum < 2 * TEXT_BYTES + (1 << 20), "{lengths:?}");
    assert!(
        lengths.iter().all(|&length| length <= PIECE_BYTES),
        "{lengths:?}"
    );
}

#[tokio::test]
async fn a_missing_dataset_is_named() {
    let server = MockServer::start().await;
    let missing = ResponseTemplate::new(404).insert_header("X-Error-Code", "RepoNotFound");
    Mock::given(header("accept", "*/*"))
        .respond_with(missing)
        .mount(&server)
        .await;
    let err = open(&server, "train")
        .await
        .expect_err("no such dataset")
        .to_string();
    assert!(err.contains("owner/set is not on the Hub"), "{err}");
}
