//! Where one shard ends and the next begins, and a shard's Parquet bytes.
//!
//! Both depend on the rows alone, never on threads or timing, so that every run of a stage cuts
//! and writes the same shards.

use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::{ArrowColumnChunk, ArrowRowGroupWriterFactory, compute_leaves};
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::writer::SerializedFileWriter;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use updraft_store::Hashed;

use crate::{Error, Result};

/// The capacity of buffers that take many MB and go again: more than the 32 MiB over which glibc
/// always asks the system for memory and gives it back. Smaller ones it learns to keep for each
/// thread, which came to half a GB. What is not written to costs no memory.
pub(crate) const LARGE_BYTES: usize = 33 << 20;
/// Room for a file's first bytes and its footer.
const FOOTER_BYTES: usize = 64 << 10;

/// When a shard is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShardPlan {
    /// A shard has at most this many rows.
    pub max_rows: u64,
    /// A shard ends with the row that brings it to this many uncompressed bytes. More bytes:
    /// fewer objects, more memory (about four times as much while writing).
    pub max_bytes: u64,
}

impl Default for ShardPlan {
    fn default() -> Self {
        Self {
            max_rows: 1 << 20,
            max_bytes: 64 << 20,
        }
    }
}

impl ShardPlan {
    /// The most bytes a shard may be planned with.
    pub const MAX_BYTES: u64 = 256 << 20;

    pub(crate) fn validate(&self) -> Result<()> {
        let problem = if self.max_rows == 0 {
            "max_rows is 0: give at least 1"
        } else if !(1..=Self::MAX_BYTES).contains(&self.max_bytes) {
            "max_bytes is outside 1..=268435456: memory holds whole shards"
        } else {
            return Ok(());
        };
        Err(Error::InvalidOption {
            option: "shards",
            problem: problem.to_owned(),
        })
    }

    /// Whether a shard of this size is full.
    pub(crate) fn is_full(&self, rows: u64, bytes: u64) -> bool {
        rows >= self.max_rows || bytes >= self.max_bytes
    }
}

/// Encodes row groups, each on whichever core, and puts them together.
pub(crate) struct Encoder {
    schema: SchemaRef,
    factory: ArrowRowGroupWriterFactory,
}

/// An encoded row group.
pub(crate) struct Group(Vec<ArrowColumnChunk>);

impl Encoder {
    pub(crate) fn new(schema: SchemaRef) -> Result<Self> {
        let (_, factory) = file(Vec::new(), &schema)?;
        Ok(Self { schema, factory })
    }

    /// Encodes one batch as one row group.
    pub(crate) fn encode(&self, group: &RecordBatch) -> Result<Group> {
        self.columns(group).map(Group).map_err(failed)
    }

    fn columns(&self, group: &RecordBatch) -> Result<Vec<ArrowColumnChunk>, ParquetError> {
        let mut writers = self.factory.create_column_writers(0)?.into_iter();
        let mut chunks = Vec::with_capacity(writers.len());
        for (field, column) in self.schema.fields().iter().zip(group.columns()) {
            for leaf in compute_leaves(field, column)? {
                let mut writer = writers.next().expect("a writer for every leaf");
                writer.write(&leaf)?;
                chunks.push(writer.close()?);
            }
        }
        Ok(chunks)
    }

    /// The bytes of a file of these row groups.
    pub(crate) fn assemble(&self, groups: Vec<Group>) -> Result<Vec<u8>> {
        let encoded = groups.iter().flat_map(|group| &group.0);
        let bytes: u64 = encoded.map(|chunk| chunk.close().bytes_written).sum();
        let room = usize::try_from(bytes).unwrap_or(0) + FOOTER_BYTES;
        let room = room.max(LARGE_BYTES);
        let (mut file, _) = file(Vec::with_capacity(room), &self.schema)?;
        for Group(chunks) in groups {
            let mut group = file.next_row_group().map_err(failed)?;
            for chunk in chunks {
                chunk.append_to_row_group(&mut group).map_err(failed)?;
            }
            group.close().map_err(failed)?;
        }
        file.into_inner().map_err(failed)
    }
}

/// Writes one row group per batch.
pub(crate) fn encode(
    schema: SchemaRef,
    groups: impl IntoIterator<Item = RecordBatch>,
) -> Result<Vec<u8>> {
    let encoder = Encoder::new(schema)?;
    let encoded = groups.into_iter().map(|group| encoder.encode(&group));
    encoder.assemble(encoded.collect::<Result<_>>()?)
}

fn file(
    bytes: Vec<u8>,
    schema: &SchemaRef,
) -> Result<(SerializedFileWriter<Vec<u8>>, ArrowRowGroupWriterFactory)> {
    let writer = ArrowWriter::try_new(bytes, Arc::clone(schema), Some(properties()));
    writer
        .and_then(ArrowWriter::into_serialized_writer)
        .map_err(failed)
}

#[expect(clippy::needless_pass_by_value, reason = "`map_err` hands it over")]
fn failed(err: ParquetError) -> Error {
    Error::corrupt("a shard being written", err.to_string())
}

/// Texts and token ids hardly repeat as whole values: no dictionary, no statistics, but zstd.
fn properties() -> WriterProperties {
    WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_max_row_group_row_count(None)
        .set_created_by("updraft".to_owned())
        .build()
}

/// A shard's name: where it stands and what it holds.
pub(crate) fn name(index: u32, shard: &Hashed) -> String {
    format!("shard-{index:05}-{}.parquet", &shard.sha256()[..16])
}

/// The schema as manifests list it.
pub(crate) fn describe(schema: &SchemaRef) -> Value {
    let column = |field: &arrow_schema::FieldRef| json!({ "name": field.name(), "type": field.data_type().to_string(), "nullable": field.is_nullable() });
    schema.fields().iter().map(column).collect()
}
