//! Where one shard ends and the next begins, and a shard's Parquet bytes.
//!
//! Both depend on the rows alone, never on threads or timing, so that every run of a stage cuts
//! and writes the same shards.

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use updraft_store::sha256_hex;

use crate::{Error, Result};

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

/// Writes one row group per batch.
pub(crate) fn encode(
    schema: SchemaRef,
    groups: impl IntoIterator<Item = RecordBatch>,
) -> Result<Vec<u8>> {
    let failed = |err: ParquetError| Error::corrupt("a shard being written", err.to_string());
    let mut writer =
        ArrowWriter::try_new(Vec::new(), schema, Some(properties())).map_err(failed)?;
    for group in groups {
        writer.write(&group).map_err(failed)?;
        writer.flush().map_err(failed)?;
    }
    writer.into_inner().map_err(failed)
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
pub(crate) fn name(index: u32, bytes: &[u8]) -> String {
    format!("shard-{index:05}-{}.parquet", &sha256_hex(bytes)[..16])
}

/// The schema as manifests list it.
pub(crate) fn describe(schema: &SchemaRef) -> Value {
    let column = |field: &arrow_schema::FieldRef| json!({ "name": field.name(), "type": field.data_type().to_string(), "nullable": field.is_nullable() });
    schema.fields().iter().map(column).collect()
}
