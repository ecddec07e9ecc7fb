//! The suites every [`Source`] and every [`Format`] passes, one function a promise.
//!
//! [`source_tests!`](crate::source_tests) and [`format_tests!`](crate::format_tests) make a
//! named test of each, so a failure names the broken promise. [`Generated`] is a source of any
//! size for tests of memory and speed.

mod generated;

use std::collections::HashSet;

use futures::TryStreamExt as _;
use serde_json::{Map, Value, json};

use crate::source::{Cursor, Row};
use crate::{Format, Source};

pub use generated::Generated;

/// One test for each promise of a [`Source`](crate::Source).
///
/// `$source` is an expression that makes the source anew; it must have at least two rows and may
/// borrow nothing. Needs `tokio` with `macros` among the caller's dependencies.
///
/// ```
/// # use updraft_dataset::MemorySource;
/// # use serde_json::json;
/// updraft_dataset::source_tests!(memory, MemorySource::new("three", [json!({"a": 1}), json!({"a": 2}), json!({})]).unwrap());
/// ```
#[macro_export]
macro_rules! source_tests {
    ($name:ident, $source:expr) => {
        mod $name {
            #[allow(unused_imports, reason = "the expression may need the names around it, or none")]
            use super::*;
            $crate::source_tests!(@each $source,
                rows_are_the_same_every_time
                every_cursor_goes_on_right_after_its_row
                origins_are_distinct_and_ascend
                the_known_number_of_rows_is_true
                a_dropped_stream_leaves_the_source_usable
            );
        }
    };
    (@each $source:expr, $($promise:ident)*) => {
        $(
            #[tokio::test]
            async fn $promise() {
                let source = $source;
                let again = $source;
                $crate::conformance::$promise(&source, &again).await;
            }
        )*
    };
}

/// One test for each promise of a [`Format`](crate::Format).
///
/// `$rows` is a list of rows in the format, as `serde_json::Value` objects.
///
/// ```
/// # use updraft_dataset::format::Text;
/// # use serde_json::json;
/// updraft_dataset::format_tests!(text, Text, [json!({"text": "once upon a time"})]);
/// ```
#[macro_export]
macro_rules! format_tests {
    ($name:ident, $format:expr, $rows:expr) => {
        mod $name {
            #[allow(unused_imports, reason = "the expression may need the names around it, or none")]
            use super::*;
            $crate::format_tests!(@each $format, $rows,
                its_rows_are_detected_and_converted
                converting_is_a_pure_function
                unknown_columns_are_left
                columns_of_the_wrong_type_are_rejected_with_a_reason
                a_row_without_its_columns_is_rejected_with_a_reason
            );
        }
    };
    (@each $format:expr, $rows:expr, $($promise:ident)*) => {
        $(
            #[test]
            fn $promise() {
                let rows: Vec<serde_json::Value> = $rows.into();
                $crate::conformance::$promise(&$format, &rows);
            }
        )*
    };
}

/// All rows of a source from a cursor on.
pub async fn rows(source: &dyn Source, from: Cursor) -> Vec<Row> {
    let batches: Vec<_> = source
        .open(from)
        .await
        .expect("the source opens")
        .try_collect()
        .await
        .expect("the source is read");
    batches
        .into_iter()
        .flat_map(crate::source::Batch::rows)
        .collect()
}

/// Equal identities, equal rows, however often they are read.
pub async fn rows_are_the_same_every_time(source: &dyn Source, again: &dyn Source) {
    assert_eq!(
        source.identity(),
        again.identity(),
        "the same source has one identity"
    );
    let first = rows(source, Cursor::default()).await;
    assert!(
        first.len() >= 2,
        "the suite needs a source of two rows or more"
    );
    assert_eq!(rows(source, Cursor::default()).await, first, "read twice");
    assert_eq!(rows(again, Cursor::default()).await, first, "made twice");
}

/// Opening at a row's `next` yields exactly the rows after it, for every row.
pub async fn every_cursor_goes_on_right_after_its_row(source: &dyn Source, again: &dyn Source) {
    let all = rows(source, Cursor::default()).await;
    for (i, row) in all.iter().enumerate() {
        assert_eq!(rows(again, row.next).await, all[i + 1..], "after row {i}");
    }
}

/// No two rows have the same origin, and within a file positions ascend.
pub async fn origins_are_distinct_and_ascend(source: &dyn Source, _: &dyn Source) {
    let all = rows(source, Cursor::default()).await;
    let origins: HashSet<String> = all.iter().map(|row| row.origin.to_string()).collect();
    assert_eq!(origins.len(), all.len(), "each row has its own origin");
    let in_one_file = all
        .windows(2)
        .filter(|pair| pair[0].origin.file == pair[1].origin.file);
    in_one_file.for_each(|pair| {
        assert!(
            pair[0].origin.position < pair[1].origin.position,
            "{} before {}",
            pair[0].origin,
            pair[1].origin
        );
    });
}

/// `num_rows`, where it is known, is the number of rows.
pub async fn the_known_number_of_rows_is_true(source: &dyn Source, _: &dyn Source) {
    if let Some(known) = source.num_rows() {
        assert_eq!(rows(source, Cursor::default()).await.len() as u64, known);
    }
}

/// A stream may be dropped after its first batch.
pub async fn a_dropped_stream_leaves_the_source_usable(source: &dyn Source, again: &dyn Source) {
    let mut stream = source
        .open(Cursor::default())
        .await
        .expect("the source opens");
    stream.try_next().await.expect("the first batch comes");
    drop(stream);
    assert_eq!(
        rows(source, Cursor::default()).await,
        rows(again, Cursor::default()).await
    );
}

fn object(row: &Value) -> Map<String, Value> {
    row.as_object()
        .expect("the suite's rows are objects")
        .clone()
}

/// Every row given is claimed and taken.
pub fn its_rows_are_detected_and_converted(format: &dyn Format, rows: &[Value]) {
    for row in rows {
        assert!(
            format.detect(&object(row)),
            "{} does not claim {row}",
            format.name()
        );
        format
            .convert(&mut object(row))
            .unwrap_or_else(|reason| panic!("{row}: {reason}"));
    }
}

/// Equal rows become equal records.
pub fn converting_is_a_pure_function(format: &dyn Format, rows: &[Value]) {
    for row in rows {
        assert_eq!(
            format.convert(&mut object(row)),
            format.convert(&mut object(row)),
            "{row}"
        );
    }
}

/// A column the format does not know stays in the row and changes nothing.
pub fn unknown_columns_are_left(format: &dyn Format, rows: &[Value]) {
    for row in rows {
        let (mut plain, mut more) = (object(row), object(row));
        more.insert("x_unknown".to_owned(), json!([1, { "a": null }]));
        assert!(format.detect(&more), "an unknown column hides {row}");
        assert_eq!(
            format.convert(&mut plain),
            format.convert(&mut more),
            "{row}"
        );
        assert_eq!(
            more.get("x_unknown"),
            Some(&json!([1, { "a": null }])),
            "{row}"
        );
    }
}

/// Whatever stands in a column, converting does not panic, and a reason is never empty.
pub fn columns_of_the_wrong_type_are_rejected_with_a_reason(format: &dyn Format, rows: &[Value]) {
    let odd = [
        json!(null),
        json!(7),
        json!(true),
        json!([]),
        json!({}),
        json!([null]),
        json!([[]]),
        json!([{}]),
        json!([{ "role": 1 }]),
        json!([{ "from": "x" }]),
    ];
    for row in rows {
        for column in object(row).keys() {
            for value in &odd {
                let mut row = object(row);
                row.insert(column.clone(), value.clone());
                format.detect(&row);
                if let Err(reason) = format.convert(&mut row) {
                    assert!(!reason.is_empty(), "{column} = {value}");
                }
            }
        }
    }
}

/// A row of another shape is neither claimed nor taken.
pub fn a_row_without_its_columns_is_rejected_with_a_reason(format: &dyn Format, _: &[Value]) {
    for row in [json!({}), json!({ "x_unknown": "text" })] {
        assert!(
            !format.detect(&object(&row)),
            "{} claims {row}",
            format.name()
        );
        let reason = format
            .convert(&mut object(&row))
            .expect_err("there is nothing to convert");
        assert!(!reason.is_empty());
    }
}
