//! Arrow columns as JSON rows.
//!
//! A null inside a struct is left out, because Arrow cannot tell a null from an absent key.

use std::sync::Arc;

use arrow_array::cast::AsArray as _;
use arrow_array::types::{
    ArrowPrimitiveType, ArrowTemporalType, Date32Type, Date64Type, Float32Type, Float64Type,
    Int8Type, Int16Type, Int32Type, Int64Type, TimestampMicrosecondType, TimestampMillisecondType,
    TimestampNanosecondType, TimestampSecondType, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{
    Array, ArrayRef, FixedSizeListArray, GenericListArray, OffsetSizeTrait, RecordBatch,
};
use arrow_schema::{DataType, Schema, TimeUnit};
use serde_json::{Map, Value};

use super::row::{Cursor, Origin, Row};

/// Consecutive rows of a file as Arrow columns.
pub(crate) struct ArrowRows {
    pub(super) file: Arc<str>,
    /// The place before the first row.
    pub(super) first: Cursor,
    /// The columns, all of them with [something](has_supported) that can become JSON.
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

/// The leaves of a schema, in the order in which Parquet counts them.
pub(super) struct Leaves {
    /// Those that can become JSON.
    pub(super) read: Vec<usize>,
    /// The names of the others.
    left: Vec<String>,
}

impl Leaves {
    pub(super) fn of(schema: &Schema) -> Self {
        let (mut leaves, mut count) = (Vec::new(), 0);
        for field in schema.fields() {
            add_leaves(field.name().clone(), field.data_type(), &mut leaves);
        }
        let mut sorted = Self {
            read: Vec::new(),
            left: Vec::new(),
        };
        for (name, is_read, columns) in leaves {
            if is_read {
                sorted.read.push(count);
            } else {
                sorted.left.push(name);
            }
            count += columns;
        }
        sorted
    }

    /// Says which are passed over.
    pub(super) fn warn(&self, file: &str) {
        if !self.left.is_empty() {
            let columns = self.left.join(", ");
            tracing::warn!(
                file,
                columns,
                "columns that cannot become JSON are left out"
            );
        }
    }
}

/// Adds a type's leaves: what they are called, whether they are read, how many columns each has.
fn add_leaves(name: String, data_type: &DataType, leaves: &mut Vec<(String, bool, usize)>) {
    match data_type {
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => {
            add_leaves(name, item.data_type(), leaves);
        }
        DataType::Struct(fields) => {
            for field in fields {
                let name = format!("{name}.{}", field.name());
                add_leaves(name, field.data_type(), leaves);
            }
        }
        other => leaves.push((name, is_value(other), columns(other))),
    }
}

/// How many of Parquet's columns a type has.
fn columns(data_type: &DataType) -> usize {
    match data_type {
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::ListView(item)
        | DataType::LargeListView(item)
        | DataType::FixedSizeList(item, _)
        | DataType::Map(item, _) => columns(item.data_type()),
        DataType::Struct(fields) => fields.iter().map(|field| columns(field.data_type())).sum(),
        _ => 1,
    }
}

/// Whether anything of this type can become JSON.
pub(super) fn has_supported(data_type: &DataType) -> bool {
    match data_type {
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => {
            has_supported(item.data_type())
        }
        DataType::Struct(fields) => fields.iter().any(|field| has_supported(field.data_type())),
        other => is_value(other),
    }
}

/// Whether values of this type, which is no list and no struct, can become JSON: times as texts.
/// Images, sounds, decimals and maps cannot; no format here reads them.
fn is_value(data_type: &DataType) -> bool {
    match data_type {
        DataType::Dictionary(_, values) => is_value(values),
        DataType::Null
        | DataType::Boolean
        | DataType::Float32
        | DataType::Float64
        | DataType::Utf8
        | DataType::LargeUtf8
        | DataType::Utf8View
        | DataType::Timestamp(..)
        | DataType::Date32
        | DataType::Date64 => true,
        other => other.is_integer(),
    }
}

/// The rows of a batch.
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
        DataType::FixedSizeList(..) => fixed_lists(array.as_fixed_size_list()),
        DataType::Struct(_) => structs(array),
        DataType::Dictionary(_, found) if is_value(found) => words(array),
        DataType::Date32 => dates::<Date32Type>(array),
        DataType::Date64 => dates::<Date64Type>(array),
        DataType::Timestamp(TimeUnit::Second, zone) => {
            times::<TimestampSecondType>(array, zone.as_deref())
        }
        DataType::Timestamp(TimeUnit::Millisecond, zone) => {
            times::<TimestampMillisecondType>(array, zone.as_deref())
        }
        DataType::Timestamp(TimeUnit::Microsecond, zone) => {
            times::<TimestampMicrosecondType>(array, zone.as_deref())
        }
        DataType::Timestamp(TimeUnit::Nanosecond, zone) => {
            times::<TimestampNanosecondType>(array, zone.as_deref())
        }
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

fn fixed_lists(array: &FixedSizeListArray) -> Vec<Value> {
    let length = usize::try_from(array.value_length()).unwrap_or(0);
    let mut items = values(array.values()).into_iter();
    (0..array.len())
        .map(|row| {
            let list: Vec<Value> = items.by_ref().take(length).collect();
            if array.is_null(row) {
                Value::Null
            } else {
                Value::Array(list)
            }
        })
        .collect()
}

/// The values that the keys of a dictionary stand for.
fn words(array: &ArrayRef) -> Vec<Value> {
    let dictionary = array.as_any_dictionary();
    if dictionary.values().is_empty() {
        return vec![Value::Null; array.len()];
    }
    let words = values(dictionary.values());
    (dictionary.normalized_keys().into_iter().enumerate())
        .map(|(row, key)| {
            if dictionary.keys().is_null(row) {
                Value::Null
            } else {
                words[key].clone()
            }
        })
        .collect()
}

/// Days as `2026-11-22`.
fn dates<T: ArrowTemporalType>(array: &ArrayRef) -> Vec<Value>
where
    i64: From<T::Native>,
{
    let days = array.as_primitive::<T>();
    let day = |row| days.value_as_date(row).filter(|_| days.is_valid(row));
    (0..days.len())
        .map(|row| day(row).map_or(Value::Null, |day| day.to_string().into()))
        .collect()
}

/// Times as `2026-11-22T23:53:00`, with a `Z` where the column has a time zone: Arrow keeps those
/// in UTC.
fn times<T: ArrowTemporalType>(array: &ArrayRef, zone: Option<&str>) -> Vec<Value>
where
    i64: From<T::Native>,
{
    let times = array.as_primitive::<T>();
    let time = |row| times.value_as_datetime(row).filter(|_| times.is_valid(row));
    let end = if zone.is_some() { "Z" } else { "" };
    (0..times.len())
        .map(|row| time(row).map_or(Value::Null, |time| format!("{time:?}{end}").into()))
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
