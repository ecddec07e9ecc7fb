//! Arrow columns as JSON rows.
//!
//! A null inside a struct is left out, because Arrow cannot tell a null from an absent key.

use std::sync::Arc;

use arrow_array::cast::AsArray as _;
use arrow_array::types::{
    ArrowPrimitiveType, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type,
    UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{Array, ArrayRef, GenericListArray, OffsetSizeTrait, RecordBatch};
use arrow_schema::DataType;
use serde_json::{Map, Value};

use super::row::{Cursor, Origin, Row};

/// Consecutive rows of a file as Arrow columns.
pub(crate) struct ArrowRows {
    pub(super) file: Arc<str>,
    /// The place before the first row.
    pub(super) first: Cursor,
    /// The columns, all of them [`supported`].
    pub(crate) batch: RecordBatch,
}

impl ArrowRows {
    /// Where a row stands.
    pub(crate) fn origin(&self, row: usize) -> Origin {
        Origin {
            file: Arc::clone(&self.file),
            position: self.next(row).row,
        }
    }

    /// The place right after a row.
    pub(crate) fn next(&self, row: usize) -> Cursor {
        Cursor {
            row: self.first.row + row as u64 + 1,
            ..self.first
        }
    }

    /// One row.
    pub(crate) fn row(&self, row: usize) -> Row {
        let value = rows(&self.batch.slice(row, 1)).pop().unwrap_or_default();
        self.with_place(row, value)
    }

    /// All of them.
    pub(super) fn all(self) -> Vec<Row> {
        (0..)
            .zip(rows(&self.batch))
            .map(|(row, value)| self.with_place(row, value))
            .collect()
    }

    fn with_place(&self, row: usize, value: Map<String, Value>) -> Row {
        Row {
            origin: self.origin(row),
            next: self.next(row),
            value: Ok(value),
        }
    }
}

/// Whether values of this type can become JSON. Images, dates and decimals cannot; no format
/// here reads them.
pub(super) fn supported(data_type: &DataType) -> bool {
    match data_type {
        DataType::List(item) | DataType::LargeList(item) => supported(item.data_type()),
        DataType::Struct(fields) => fields.iter().all(|field| supported(field.data_type())),
        other => {
            other.is_integer()
                || matches!(
                    other,
                    DataType::Null | DataType::Boolean | DataType::Float32 | DataType::Float64
                )
                || matches!(
                    other,
                    DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View
                )
        }
    }
}

/// The rows of a batch whose columns are all [`supported`].
fn rows(batch: &RecordBatch) -> Vec<Map<String, Value>> {
    let mut rows = vec![Map::new(); batch.num_rows()];
    for (field, column) in batch.schema_ref().fields().iter().zip(batch.columns()) {
        fill(&mut rows, field.name(), column);
    }
    rows
}

fn fill(rows: &mut [Map<String, Value>], name: &str, column: &ArrayRef) {
    for (row, value) in rows.iter_mut().zip(values(column)) {
        if !value.is_null() {
            row.insert(name.to_owned(), value);
        }
    }
}

fn values(array: &ArrayRef) -> Vec<Value> {
    match array.data_type() {
        DataType::Utf8 => array.as_string::<i32>().iter().map(Value::from).collect(),
        DataType::LargeUtf8 => array.as_string::<i64>().iter().map(Value::from).collect(),
        DataType::Utf8View => array.as_string_view().iter().map(Value::from).collect(),
        DataType::Boolean => array.as_boolean().iter().map(Value::from).collect(),
        DataType::Int8 => numbers::<Int8Type>(array),
        DataType::Int16 => numbers::<Int16Type>(array),
        DataType::Int32 => numbers::<Int32Type>(array),
        DataType::Int64 => numbers::<Int64Type>(array),
        DataType::UInt8 => numbers::<UInt8Type>(array),
        DataType::UInt16 => numbers::<UInt16Type>(array),
        DataType::UInt32 => numbers::<UInt32Type>(array),
        DataType::UInt64 => numbers::<UInt64Type>(array),
        DataType::Float32 => numbers::<Float32Type>(array),
        DataType::Float64 => numbers::<Float64Type>(array),
        DataType::List(_) => lists(array.as_list::<i32>()),
        DataType::LargeList(_) => lists(array.as_list::<i64>()),
        DataType::Struct(_) => structs(array),
        _ => vec![Value::Null; array.len()],
    }
}

fn numbers<T: ArrowPrimitiveType>(array: &ArrayRef) -> Vec<Value>
where
    Value: From<T::Native>,
{
    array
        .as_primitive::<T>()
        .iter()
        .map(|number| number.map_or(Value::Null, Value::from))
        .collect()
}

fn lists<O: OffsetSizeTrait>(array: &GenericListArray<O>) -> Vec<Value> {
    let offsets = array.value_offsets();
    let (first, last) = (offsets[0].as_usize(), offsets[array.len()].as_usize());
    let mut items = values(&array.values().slice(first, last - first)).into_iter();
    (0..array.len())
        .map(|row| {
            let list: Vec<Value> = items
                .by_ref()
                .take(array.value_length(row).as_usize())
                .collect();
            if array.is_null(row) {
                Value::Null
            } else {
                Value::Array(list)
            }
        })
        .collect()
}

fn structs(array: &ArrayRef) -> Vec<Value> {
    let columns = array.as_struct();
    let mut maps = vec![Map::new(); array.len()];
    for (field, column) in columns.fields().iter().zip(columns.columns()) {
        fill(&mut maps, field.name(), column);
    }
    let value = |(row, map)| {
        if array.is_null(row) {
            Value::Null
        } else {
            Value::Object(map)
        }
    };
    maps.into_iter().enumerate().map(value).collect()
}
