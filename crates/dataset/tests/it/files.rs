//! The bytes of small files of every kind.

use std::io::Write as _;
use std::sync::Arc;

use arrow_array::builder::{ListBuilder, StringBuilder, StructBuilder};
use arrow_array::{ArrayRef, BinaryArray, Int64Array, RecordBatch, StringArray};
use arrow_ipc::CompressionType;
use arrow_ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
use arrow_schema::{DataType, Field, Fields};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use serde_json::json;

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    writer.write_all(bytes).expect("memory");
    writer.finish().expect("memory")
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).expect("memory")
}

/// A byte-order mark, blank lines, CRLF, rows that are no objects or no JSON, no last line end.
pub(crate) const LINES: &str = "\u{feff}{\"text\": \"one\"}\n\n{\"text\": \"zwei ü\"}\r\n[1]\n  \n{\"text\": \n{\"text\": \"five\"}\n{\"text\": \"six\"}";

/// Brackets and quotes inside strings, nested objects, a record that is no object, one that is
/// no JSON.
pub(crate) const ARRAY: &str = r#" [ {"text": "a ] } , \" \\"}, {"text": "b", "c": [{"d": {}}]}
, 7,{"text": tru},
{"text":"e"} ] trailing"#;

/// The same without brackets.
pub(crate) const OBJECTS: &str = "{\"text\": \"a\"}\n{\n  \"text\": \"b }\"\n}{\"text\": \"c\"}";

/// Quoted delimiters, quotes and line ends, an empty field, a row that is too short.
pub(crate) const CSV: &str =
    "text,other\none,1\n\"two, \"\"quoted\"\"\nand long\",2\n,3\nshort\nlast,5";

/// Rows over several blocks, one longer than a block, one longer than a row may be.
pub(crate) fn long_lines() -> Vec<u8> {
    let mut lines = Vec::new();
    for (i, len) in [10, 700_000, 3, 17 << 20, 5, 400_000, 400_000, 2]
        .into_iter()
        .enumerate()
    {
        writeln!(lines, "{}", json!({ "i": i, "text": "x".repeat(len) })).expect("memory");
    }
    lines
}

/// The same as records, the longest over several lines.
pub(crate) fn long_records() -> Vec<u8> {
    let mut records = b"i,text\r\n".to_vec();
    for (i, len) in [10, 700_000, 3, 40 << 20, 5, 400_000, 400_000, 2]
        .into_iter()
        .enumerate()
    {
        write!(records, "{i},\"{}\"\r\n", "x,\n\"\"".repeat(len / 4)).expect("memory");
    }
    records
}

pub(crate) fn long_array() -> Vec<u8> {
    let lines = String::from_utf8(long_lines()).expect("ASCII");
    format!("[{}]", lines.trim_end().replace('\n', ",")).into_bytes()
}

/// Nested columns, nulls, one that cannot become JSON.
fn table() -> RecordBatch {
    let fields = Fields::from(vec![
        Field::new("from", DataType::Utf8, true),
        Field::new("value", DataType::Utf8, true),
    ]);
    let mut turns = ListBuilder::new(StructBuilder::from_fields(fields, 0));
    let mut ids = Vec::new();
    for row in 0..50 {
        for turn in 0..row % 4 {
            let text = |field: usize, turns: &mut ListBuilder<StructBuilder>, text: String| {
                turns
                    .values()
                    .field_builder::<StringBuilder>(field)
                    .expect("text")
                    .append_value(text);
            };
            text(0, &mut turns, ["human", "gpt"][turn % 2].to_owned());
            text(1, &mut turns, format!("row {row} turn {turn}"));
            turns.values().append(true);
        }
        turns.append(row % 7 != 3);
        ids.push((row % 5 != 0).then_some(row as i64));
    }
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("id", Arc::new(Int64Array::from(ids))),
        ("conversations", Arc::new(turns.finish())),
        ("image", Arc::new(BinaryArray::from(vec![&b"\xff"[..]; 50]))),
        ("note", Arc::new(StringArray::from(vec!["n"; 50]))),
    ];
    RecordBatch::try_from_iter(columns).expect("columns")
}

pub(crate) fn arrow_stream() -> Vec<u8> {
    let table = table();
    let mut writer = StreamWriter::try_new(Vec::new(), &table.schema()).expect("writer");
    for start in (0..50).step_by(20) {
        writer
            .write(&table.slice(start, 20.min(50 - start)))
            .expect("memory");
    }
    writer.into_inner().expect("memory")
}

pub(crate) fn arrow_file(compression: Option<CompressionType>) -> Vec<u8> {
    let table = table();
    let options = IpcWriteOptions::default()
        .try_with_compression(compression)
        .expect("it is built in");
    let mut writer =
        FileWriter::try_new_with_options(Vec::new(), &table.schema(), options).expect("writer");
    for start in (0..50).step_by(20) {
        writer
            .write(&table.slice(start, 20.min(50 - start)))
            .expect("memory");
    }
    writer.into_inner().expect("memory")
}

pub(crate) fn parquet() -> Vec<u8> {
    let batch = table();
    let groups = WriterProperties::builder()
        .set_max_row_group_row_count(Some(7))
        .build();
    let mut writer =
        ArrowWriter::try_new(Vec::new(), batch.schema(), Some(groups)).expect("writer");
    writer.write(&batch).expect("memory");
    writer.into_inner().expect("memory")
}
