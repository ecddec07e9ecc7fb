//! Columns of many types in Parquet and Arrow files: what can become JSON does, whatever stands
//! beside it.

use std::sync::Arc;

use arrow_array::builder::{BinaryBuilder, ListBuilder, StringBuilder, StructBuilder};
use arrow_array::types::Int8Type;
use arrow_array::{
    ArrayRef, BinaryArray, Date32Array, DictionaryArray, FixedSizeListArray, Float32Array,
    Int64Array, RecordBatch, StringArray, TimestampMillisecondArray,
};
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{DataType, Field, Fields};
use futures::StreamExt as _;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use serde_json::{Value, json};
use updraft_dataset::source::{Cursor, Files, Row};
use updraft_dataset::{Source as _, SourceOptions, conformance};
use updraft_store::Store;

/// A list of turns with an image each, and a null.
fn turns() -> ArrayRef {
    let fields = Fields::from(vec![
        Field::new("image", DataType::Binary, true),
        Field::new("from", DataType::Utf8, true),
        Field::new("value", DataType::Utf8, true),
    ]);
    let mut lists = ListBuilder::new(StructBuilder::from_fields(fields, 0));
    for texts in [["human", "a"], ["gpt", "b"]] {
        let turn = lists.values();
        let image: &mut BinaryBuilder = turn.field_builder(0).expect("an image");
        image.append_value([0xff]);
        for (field, text) in (1..).zip(texts) {
            let column: &mut StringBuilder = turn.field_builder(field).expect("a text");
            column.append_value(text);
        }
        turn.append(true);
    }
    lists.append(true);
    lists.append(false);
    Arc::new(lists.finish())
}

fn table() -> RecordBatch {
    let pairs = FixedSizeListArray::new(
        Arc::new(Field::new("item", DataType::Float32, true)),
        2,
        Arc::new(Float32Array::from(vec![1.0, 2.0, 3.0, 4.0])),
        None,
    );
    let words: DictionaryArray<Int8Type> = [Some("same"), None].into_iter().collect();
    let times = TimestampMillisecondArray::from(vec![1_500, 0]).with_timezone("UTC");
    let columns: Vec<(&str, ArrayRef, bool)> = vec![
        (
            "sound",
            Arc::new(BinaryArray::from(vec![&b"\xff"[..]; 2])),
            true,
        ),
        ("turns", turns(), true),
        ("pair", Arc::new(pairs), true),
        ("word", Arc::new(words), true),
        (
            "day",
            Arc::new(Date32Array::from(vec![Some(20_779), None])),
            true,
        ),
        ("time", Arc::new(times), true),
        ("n", Arc::new(Int64Array::from(vec![7, 8])), true),
    ];
    RecordBatch::try_from_iter_with_nullable(columns).expect("columns of one length")
}

fn parquet(batch: &RecordBatch) -> Vec<u8> {
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), None).expect("a writer");
    writer.write(batch).expect("memory");
    writer.into_inner().expect("memory")
}

fn arrow(batch: &RecordBatch) -> Vec<u8> {
    let mut writer = StreamWriter::try_new(Vec::new(), &batch.schema()).expect("a writer");
    writer.write(batch).expect("memory");
    writer.into_inner().expect("memory")
}

async fn files(name: &str, bytes: Vec<u8>) -> Files {
    let store = Store::memory();
    store.put(name, bytes.into()).await.expect("put");
    Files::in_store(&store, "", &SourceOptions::default())
        .await
        .expect("found")
}

#[tokio::test]
async fn an_odd_field_takes_nothing_with_it() {
    let turns = json!([{ "from": "human", "value": "a" }, { "from": "gpt", "value": "b" }]);
    let expected = [
        json!({ "turns": turns, "pair": [1.0, 2.0], "word": "same", "day": "2026-11-22", "time": "1970-01-01T00:00:01.500Z", "n": 7 }),
        json!({ "pair": [3.0, 4.0], "time": "1970-01-01T00:00:00Z", "n": 8 }),
    ];
    for (name, bytes) in [
        ("a.parquet", parquet(&table())),
        ("a.arrow", arrow(&table())),
    ] {
        let rows = conformance::rows(&files(name, bytes).await, Cursor::default()).await;
        let value = |row: Row| Value::Object(row.value.expect("a row"));
        let rows: Vec<Value> = rows.into_iter().map(value).collect();
        assert_eq!(rows, expected, "{name}");
    }
}

/// Rows of one file may be small in one group and large in the next.
#[tokio::test]
async fn batches_are_sized_by_the_group_with_the_largest_rows() {
    const SMALL: usize = 50_000;
    let small = (0..SMALL).map(|i| format!("row {i}"));
    let large = (0..8).map(|i| format!("{i}").repeat(1 << 20));
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values(small.chain(large)));
    let batch = RecordBatch::try_from_iter([("text", texts)]).expect("a column");
    let groups = WriterProperties::builder()
        .set_max_row_group_row_count(Some(SMALL))
        .build();
    let mut writer =
        ArrowWriter::try_new(Vec::new(), batch.schema(), Some(groups)).expect("a writer");
    writer.write(&batch).expect("memory");
    let source = files("a.parquet", writer.into_inner().expect("memory")).await;
    let first = Cursor {
        row: SMALL as u64,
        ..Cursor::default()
    };
    let mut batches = source.open(first).await.expect("a stream");
    let mut sizes = Vec::new();
    while let Some(batch) = batches.next().await {
        sizes.push(batch.expect("sound").rows().len());
    }
    assert_eq!(sizes, [1; 8]);
}
