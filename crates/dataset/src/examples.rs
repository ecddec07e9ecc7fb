//! Examples as Parquet columns, and back.

use std::sync::Arc;

use arrow_array::builder::{ListBuilder, StructBuilder, UInt32Builder};
use arrow_array::cast::AsArray as _;
use arrow_array::types::UInt32Type;
use arrow_array::{ArrayRef, RecordBatch, UInt32Array};
use arrow_schema::{DataType, Field, Fields, Schema, SchemaRef};
use updraft_chat::Example;

use crate::{Result, shard};

/// Tokens of a row group: the unit that reading shuffles and fetches.
const ROW_GROUP_TOKENS: u64 = 1 << 20;
/// Rows of a row group at most.
const ROW_GROUP_ROWS: usize = 1 << 16;

/// The columns that tell an example's size without its tokens.
pub(crate) const SIZES: [&str; 2] = ["num_tokens", "trained_tokens"];
/// The columns that are the example.
pub(crate) const CONTENT: [&str; 2] = ["input_ids", "loss_spans"];

/// The schema of a model-ready shard.
pub(crate) fn schema() -> SchemaRef {
    let id = Field::new("item", DataType::UInt32, false);
    let span = Field::new("item", DataType::Struct(span_fields()), false);
    Arc::new(Schema::new(vec![
        Field::new(SIZES[0], DataType::UInt32, false),
        Field::new(SIZES[1], DataType::UInt32, false),
        Field::new(CONTENT[0], DataType::List(Arc::new(id)), false),
        Field::new(CONTENT[1], DataType::List(Arc::new(span)), false),
    ]))
}

fn span_fields() -> Fields {
    Fields::from(vec![
        Field::new("start", DataType::UInt32, false),
        Field::new("end", DataType::UInt32, false),
    ])
}

/// A shard's bytes.
pub(crate) fn encode(examples: impl Iterator<Item = Example>) -> Result<Vec<u8>> {
    let mut examples = examples.fuse();
    let groups = std::iter::from_fn(|| {
        let (mut group, mut tokens) = (Vec::new(), 0);
        for example in examples.by_ref() {
            tokens += example.len() as u64;
            group.push(example);
            if tokens >= ROW_GROUP_TOKENS || group.len() == ROW_GROUP_ROWS {
                break;
            }
        }
        (!group.is_empty()).then(|| batch(&group))
    });
    shard::encode(schema(), groups)
}

fn batch(examples: &[Example]) -> RecordBatch {
    let sizes: UInt32Array = examples
        .iter()
        .map(|example| example.len() as u32)
        .collect::<Vec<_>>()
        .into();
    let trained: UInt32Array = examples
        .iter()
        .map(Example::trained_tokens)
        .collect::<Vec<_>>()
        .into();
    let mut ids = ListBuilder::new(UInt32Builder::new()).with_field(Field::new(
        "item",
        DataType::UInt32,
        false,
    ));
    let span = Field::new("item", DataType::Struct(span_fields()), false);
    let mut spans = ListBuilder::new(StructBuilder::from_fields(span_fields(), examples.len()))
        .with_field(span);
    for example in examples {
        ids.values().append_slice(&example.input_ids);
        ids.append(true);
        for range in &example.loss_spans {
            for (field, value) in [range.start, range.end].into_iter().enumerate() {
                let builder = spans.values().field_builder::<UInt32Builder>(field);
                builder.expect("both fields are u32").append_value(value);
            }
            spans.values().append(true);
        }
        spans.append(true);
    }
    let columns: Vec<ArrayRef> = vec![
        Arc::new(sizes),
        Arc::new(trained),
        Arc::new(ids.finish()),
        Arc::new(spans.finish()),
    ];
    RecordBatch::try_new(schema(), columns).expect("every column has the schema's type and length")
}

/// The examples in a batch of the columns [`CONTENT`]; `None` if they are of another type.
pub(crate) fn decode(batch: &RecordBatch) -> Option<Vec<Example>> {
    let ids = batch.column_by_name(CONTENT[0])?.as_list_opt::<i32>()?;
    let all_ids = ids.values().as_primitive_opt::<UInt32Type>()?.values();
    let spans = batch.column_by_name(CONTENT[1])?.as_list_opt::<i32>()?;
    let all_spans = spans.values().as_struct_opt()?;
    let (starts, ends) = (
        u32s(all_spans.column_by_name("start")?)?,
        u32s(all_spans.column_by_name("end")?)?,
    );
    let range = |offsets: &[i32], row: usize| offsets[row] as usize..offsets[row + 1] as usize;
    let example = |row| Example {
        input_ids: all_ids[range(ids.value_offsets(), row)].to_vec(),
        loss_spans: range(spans.value_offsets(), row)
            .map(|span| starts[span]..ends[span])
            .collect(),
    };
    Some((0..batch.num_rows()).map(example).collect())
}

/// A column of `u32`.
pub(crate) fn u32s(column: &ArrayRef) -> Option<&[u32]> {
    Some(column.as_primitive_opt::<UInt32Type>()?.values())
}
