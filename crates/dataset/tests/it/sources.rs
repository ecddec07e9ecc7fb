//! Every kind of file, plain and compressed, local and in a store, held to the promises of a
//! source; and bytes that are not what they claim.

use futures::TryStreamExt as _;
use std::fs;
use std::sync::Arc;

use arrow_ipc::CompressionType;
use async_trait::async_trait;
use serde_json::{Value, json};
use tempfile::TempDir;
use updraft_dataset::source::{BatchStream, Cursor, Files, Row};
use updraft_dataset::{
    Error, MemorySource, Result, Source, SourceOptions, conformance, resolve_source, source_tests,
};
use updraft_store::Store;

use crate::files::{
    ARRAY, CSV, LINES, OBJECTS, arrow_file, arrow_stream, gzip, long_array, long_lines,
    long_records, parquet, zstd,
};

/// A source over files of its own.
#[derive(Debug)]
struct InFolder {
    files: Arc<Files>,
    _folder: TempDir,
}

#[async_trait]
impl Source for InFolder {
    fn identity(&self) -> Value {
        self.files.identity()
    }

    fn label(&self) -> String {
        self.files.label()
    }

    fn num_rows(&self) -> Option<u64> {
        self.files.num_rows()
    }

    async fn open(&self, from: Cursor) -> Result<BatchStream> {
        self.files.open(from).await
    }
}

async fn folder(files: &[(&str, Vec<u8>)]) -> InFolder {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, bytes) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("inside")).expect("made");
        fs::write(path, bytes).expect("written");
    }
    let spec = match files {
        [(name, _)] => folder.path().join(name),
        _ => folder.path().to_owned(),
    };
    let spec = spec.to_str().expect("UTF-8").to_owned();
    let files = resolve_source(&spec, &SourceOptions::default())
        .await
        .expect("resolved");
    InFolder {
        files,
        _folder: folder,
    }
}

async fn file(name: &str, bytes: impl Into<Vec<u8>>) -> InFolder {
    folder(&[(name, bytes.into())]).await
}

/// The same file, but in a store.
async fn object(name: &str, bytes: impl Into<Vec<u8>>) -> Files {
    let store = Store::memory();
    store
        .put(&format!("data/{name}"), bytes.into().into())
        .await
        .expect("put");
    // A memory store's ETags count its writes, so two stores with one write agree.
    Files::in_store(&store, "data", &SourceOptions::default())
        .await
        .expect("found")
}

source_tests!(
    memory,
    MemorySource::new("three", (0..600).map(|i| json!({ "i": i }))).expect("objects")
);
source_tests!(jsonl, file("rows.jsonl", LINES).await);
source_tests!(
    jsonl_gz,
    file("rows.jsonl.gz", gzip(LINES.as_bytes())).await
);
source_tests!(
    ndjson_zst,
    file("rows.ndjson.zst", zstd(LINES.as_bytes())).await
);
source_tests!(jsonl_long, file("rows.jsonl", long_lines()).await);
source_tests!(jsonl_object, object("rows.jsonl", LINES).await);
source_tests!(
    jsonl_gz_object,
    object("rows.jsonl.gz", gzip(LINES.as_bytes())).await
);
source_tests!(json_array, file("rows.json", ARRAY).await);
source_tests!(
    json_array_gz,
    file("rows.json.gz", gzip(ARRAY.as_bytes())).await
);
source_tests!(json_array_long, file("rows.json", long_array()).await);
source_tests!(
    csv_joined,
    file("rows.csv", "a,b\n1,2\n\n\u{feff}a,b\n\u{feff}\"3\",4\n").await
);
source_tests!(csv_long, file("rows.csv", long_records()).await);
source_tests!(json_array_object, object("rows.json", ARRAY).await);
source_tests!(json_objects, file("rows.json", OBJECTS).await);
source_tests!(csv, file("rows.csv", CSV).await);
source_tests!(
    tsv_zst,
    file("rows.tsv.zst", zstd(CSV.replace(',', "\t").as_bytes())).await
);
source_tests!(csv_object, object("rows.csv", CSV).await);
source_tests!(text, file("rows.txt", "one\ntwo\n\nfour").await);
source_tests!(parquet_file, file("rows.parquet", parquet()).await);
source_tests!(arrow_stream_file, file("rows.arrow", arrow_stream()).await);
source_tests!(arrow_file_file, file("rows.arrow", arrow_file(None)).await);
source_tests!(
    arrow_file_lz4,
    file("rows.arrow", arrow_file(Some(CompressionType::LZ4_FRAME))).await
);
source_tests!(
    arrow_object_zstd,
    object("rows.arrow", arrow_file(Some(CompressionType::ZSTD))).await
);
source_tests!(
    arrow_zst,
    file("rows.arrow.zst", zstd(&arrow_stream())).await
);
source_tests!(arrow_object, object("rows.arrow", arrow_file(None)).await);
source_tests!(
    generated,
    conformance::Generated {
        rows: 600,
        row_bytes: 100
    }
);
source_tests!(parquet_object, object("rows.parquet", parquet()).await);
source_tests!(
    a_folder,
    folder(&[
        ("train/a.jsonl", LINES.into()),
        ("train/b.json", ARRAY.into()),
        ("train/c.jsonl.gz", gzip(LINES.as_bytes())),
        ("train/d.csv", CSV.into()),
        ("test/d.json", ARRAY.into()),
        ("README.md", b"# train".to_vec()),
    ])
    .await
);

async fn rows(source: &dyn Source) -> Vec<Row> {
    conformance::rows(source, Cursor::default()).await
}

/// Rows as `position value` or `position ! reason`.
async fn shown(source: &dyn Source) -> Vec<String> {
    let show = |row: Row| match row.value {
        Ok(value) => format!("{} {}", row.origin.position, Value::Object(value)),
        Err(reason) => format!("{} ! {reason}", row.origin.position),
    };
    rows(source).await.into_iter().map(show).collect()
}

#[tokio::test]
async fn lines_are_numbered_as_an_editor_does() {
    let expected = [
        r#"1 {"text":"one"}"#,
        r#"3 {"text":"zwei ü"}"#,
        "4 ! not a JSON object but an array",
        "6 ! malformed JSON: EOF while parsing a value at line 1 column 8",
        r#"7 {"text":"five"}"#,
        r#"8 {"text":"six"}"#,
    ];
    assert_eq!(shown(&file("rows.jsonl", LINES).await).await, expected);
}

#[tokio::test]
async fn elements_of_an_array_are_found_whatever_they_hold() {
    let expected = [
        r#"1 {"text":"a ] } , \" \\"}"#,
        r#"2 {"text":"b","c":[{"d":{}}]}"#,
        "3 ! not a JSON object but a number",
        "4 ! malformed JSON: expected ident at line 1 column 13",
        r#"5 {"text":"e"}"#,
    ];
    assert_eq!(shown(&file("rows.json", ARRAY).await).await, expected);
    let expected = [
        r#"1 {"text":"a"}"#,
        r#"2 {"text":"b }"}"#,
        r#"3 {"text":"c"}"#,
    ];
    assert_eq!(shown(&file("rows.json", OBJECTS).await).await, expected);
}

#[tokio::test]
async fn csv_fields_are_the_columns_of_the_header() {
    let expected = [
        r#"1 {"text":"one","other":"1"}"#,
        r#"2 {"text":"two, \"quoted\"\nand long","other":"2"}"#,
        r#"3 {"text":"","other":"3"}"#,
        "4 ! 1 fields where the header has 2",
        r#"5 {"text":"last","other":"5"}"#,
    ];
    assert_eq!(shown(&file("rows.csv", CSV).await).await, expected);
}

#[tokio::test]
async fn empty_fields_fill_a_batch_too() {
    let source = file("rows.csv", "a,b\n".to_owned() + &",\n".repeat(50_000)).await;
    let batches = source.open(Cursor::default()).await.expect("opened");
    let lengths: Vec<usize> = batches
        .map_ok(|batch| batch.rows().len())
        .try_collect()
        .await
        .expect("read");
    assert_eq!(lengths.iter().sum::<usize>(), 50_000);
    assert!(lengths.iter().all(|&rows| rows < 5_000), "{lengths:?}");
}

#[tokio::test]
async fn equal_columns_of_a_csv_get_numbers() {
    let twice = "a,b,a,a.1,a\n1,2,3,4,5\n6,7,8,9,\"5\"\" long\"";
    let expected = [
        r#"1 {"a":"1","b":"2","a.1":"3","a.1.1":"4","a.2":"5"}"#,
        r#"2 {"a":"6","b":"7","a.1":"8","a.1.1":"9","a.2":"5\" long"}"#,
    ];
    assert_eq!(shown(&file("rows.csv", twice).await).await, expected);
    let many = format!("{}\n{}\n", ",".repeat(20_000), ",".repeat(20_000));
    assert_eq!(rows(&file("rows.csv", many).await).await.len(), 1);
    // A quote inside a field without quotes is text, in the last record too.
    let inch = "a\n1\n5\" pipe";
    let expected = [r#"1 {"a":"1"}"#, r#"2 {"a":"5\" pipe"}"#];
    assert_eq!(shown(&file("rows.csv", inch).await).await, expected);
}

#[tokio::test]
async fn a_row_over_the_limit_is_a_reject_and_the_next_ones_come() {
    for source in [
        file("rows.csv", long_records()).await,
        file("rows.jsonl", long_lines()).await,
        file("rows.json", long_array()).await,
    ] {
        let values: Vec<_> = rows(&source)
            .await
            .into_iter()
            .map(|row| row.value)
            .collect();
        assert_eq!(values.len(), 8);
        for (i, value) in values.into_iter().enumerate() {
            match value {
                Ok(row) => assert_eq!(
                    (i != 3, row["i"].to_string().trim_matches('"')),
                    (true, &*i.to_string())
                ),
                Err(reason) => assert_eq!((i, reason.as_str()), (3, "longer than 16 MB")),
            }
        }
    }
}

#[tokio::test]
async fn arrow_rows_are_parquets_rows() {
    let values = async |source: InFolder| -> Vec<Value> {
        let value = |row: Row| Value::Object(row.value.expect("a row"));
        rows(&source).await.into_iter().map(value).collect()
    };
    let expected = values(file("rows.parquet", parquet()).await).await;
    assert_eq!(
        values(file("rows.arrow", arrow_stream()).await).await,
        expected
    );
    for compression in [
        None,
        Some(CompressionType::LZ4_FRAME),
        Some(CompressionType::ZSTD),
    ] {
        let bytes = arrow_file(compression);
        assert_eq!(values(file("rows.arrow", bytes).await).await, expected);
    }
}

#[tokio::test]
async fn parquet_rows_keep_nesting_and_leave_nulls_out() {
    let rows = rows(&file("rows.parquet", parquet()).await).await;
    let value = |i: usize| Value::Object(rows[i].value.clone().expect("a row"));
    assert_eq!(rows.len(), 50);
    assert_eq!(
        value(10),
        json!({ "note": "n" }),
        "a null list and a null number"
    );
    let turns = json!([{ "from": "human", "value": "row 22 turn 0" }, { "from": "gpt", "value": "row 22 turn 1" }]);
    assert_eq!(
        value(22),
        json!({ "id": 22, "conversations": turns, "note": "n" })
    );
}

/// Opens, reads to the end and expects an error that holds `words`.
async fn check_error(name: &str, bytes: impl Into<Vec<u8>>, words: &str) {
    use futures::TryStreamExt as _;
    let source = file(name, bytes).await;
    let read = async {
        source
            .open(Cursor::default())
            .await?
            .try_for_each(|_| async { Ok(()) })
            .await
    };
    let err: Error = read.await.expect_err(name);
    let text = format!("{err}: {:?}", std::error::Error::source(&err));
    assert!(text.contains(words) && text.contains(name), "{text}");
}

#[tokio::test]
async fn damaged_files_are_errors_that_name_the_file() {
    let half = |bytes: Vec<u8>| bytes[..bytes.len() / 2].to_vec();
    check_error("rows.jsonl.gz", half(gzip(LINES.as_bytes())), "damaged").await;
    check_error("rows.json", r#"[{"a": 1}, {"a"#, "has no end").await;
    check_error("rows.json", r#"[{"a": 1}"#, "has no end").await;
    check_error("rows.parquet", "PAR1 no more", "damaged").await;
    check_error("rows.parquet", half(parquet()), "damaged").await;
    check_error("rows.arrow", half(arrow_stream()), "damaged").await;
    check_error(
        "rows.arrow",
        "ARROW1\0\0\u{7f}\u{7f}\u{7f}\u{7f}",
        "damaged",
    )
    .await;
    let unclosed = "a,b\n1,2\n3,\"4\n5,6\n";
    check_error("rows.csv", unclosed, "a quote in record 2 is never closed").await;
    let endless = format!("a,b\n\"{}", "x".repeat(40 << 20));
    check_error("rows.csv", endless, "a quote in record 1 is never closed").await;
}

async fn check_unresolved(spec: &str, words: &str) {
    let err = resolve_source(spec, &SourceOptions::default())
        .await
        .expect_err(spec);
    assert!(
        err.to_string().contains(words) && err.to_string().contains(spec),
        "{err}"
    );
    assert_eq!(err.to_string().lines().count(), 1);
}

#[tokio::test]
async fn what_is_not_there_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
    check_unresolved(&path("missing.jsonl"), "does not exist").await;
    check_unresolved(&path(""), "holds no data file").await;
    fs::write(path("notes.docx"), "x").expect("written");
    check_unresolved(&path("notes.docx"), "unknown format").await;
    fs::write(path("test.jsonl"), "{}").expect("written");
    check_unresolved(&path(""), "no data file: expected names with 'train'").await;
}
