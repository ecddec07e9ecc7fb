//! The shards of a stage as blocks: their sizes, and their examples when asked.

use futures::stream;
use futures::{StreamExt as _, TryStreamExt as _};
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::arrow::{ParquetRecordBatchStreamBuilder, ProjectionMask};
use parquet::errors::ParquetError;
use updraft_chat::Example;
use updraft_store::{FinishedStage, ObjectEntry};

use super::order::Block;
use crate::examples::{self, CONTENT, SIZES};
use crate::location::{RangedFile, Remote};
use crate::source::not_readable;
use crate::{Error, Result};

/// Shards whose sizes are read at a time.
const SHARDS_IN_FLIGHT: usize = 16;

/// A stage's shards, their footers read.
#[derive(Debug)]
pub(super) struct Shards {
    shards: Vec<Shard>,
    pub(super) blocks: Vec<Block>,
    /// The shard and row group of each block.
    places: Vec<(usize, usize)>,
    pub(super) lengths: Vec<u32>,
    pub(super) trained_tokens: Vec<u32>,
}

#[derive(Debug)]
struct Shard {
    path: String,
    file: RangedFile,
    metadata: ArrowReaderMetadata,
}

impl Shards {
    pub(super) async fn open(stage: &FinishedStage) -> Result<Self> {
        let objects = stage.manifest().await?.objects;
        let opened: Vec<_> = stream::iter(objects)
            .map(|object| Shard::open(stage, object))
            .buffered(SHARDS_IN_FLIGHT)
            .try_collect()
            .await?;
        let mut all = Self {
            shards: Vec::new(),
            blocks: Vec::new(),
            places: Vec::new(),
            lengths: Vec::new(),
            trained_tokens: Vec::new(),
        };
        for (shard, lengths, trained_tokens) in opened {
            let mut rest = &lengths[..];
            for (group, metadata) in shard.metadata.metadata().row_groups().iter().enumerate() {
                let (these, after) = rest
                    .split_at_checked(metadata.num_rows().max(0) as usize)
                    .ok_or_else(|| shard.corrupt("its row groups and its rows differ"))?;
                let first_row = (all.lengths.len() + lengths.len() - rest.len()) as u64;
                let tokens = these.iter().map(|&len| u64::from(len)).sum();
                all.blocks.push(Block {
                    first_row,
                    rows: these.len() as u64,
                    tokens,
                });
                all.places.push((all.shards.len(), group));
                rest = after;
            }
            all.lengths.extend(lengths);
            all.trained_tokens.extend(trained_tokens);
            all.shards.push(shard);
        }
        Ok(all)
    }

    /// The examples of a block.
    pub(super) async fn read(&self, block: usize) -> Result<Vec<Example>> {
        let (shard, group) = self.places[block];
        let shard = &self.shards[shard];
        let failed = |err: ParquetError| not_readable(&shard.path, err);
        let mut batches = shard
            .columns(&CONTENT)
            .with_row_groups(vec![group])
            .with_batch_size(self.blocks[block].rows as usize)
            .build()
            .map_err(failed)?;
        let mut examples = Vec::with_capacity(self.blocks[block].rows as usize);
        while let Some(batch) = batches.try_next().await.map_err(failed)? {
            examples.extend(examples::decode(&batch).ok_or_else(|| {
                shard.corrupt("its columns are not those of a model-ready shard")
            })?);
        }
        if examples.len() as u64 == self.blocks[block].rows {
            Ok(examples)
        } else {
            Err(shard.corrupt("a row group lacks rows"))
        }
    }
}

impl Shard {
    /// Opens a shard and reads the sizes of its rows.
    async fn open(
        stage: &FinishedStage,
        object: ObjectEntry,
    ) -> Result<(Self, Vec<u32>, Vec<u32>)> {
        let path = stage.path(&object.path);
        let mut file = RangedFile::new(
            Remote::Object {
                etag: None, // A shard's name holds its hash.
                store: stage.store().clone(),
                path: path.clone(),
            },
            object.bytes,
        );
        let metadata = ArrowReaderMetadata::load_async(&mut file, ArrowReaderOptions::default())
            .await
            .map_err(|err| not_readable(&path, err))?;
        let shard = Self {
            path,
            file,
            metadata,
        };
        let mut batches = shard
            .columns(&SIZES)
            .build()
            .map_err(|err| not_readable(&shard.path, err))?;
        let (mut lengths, mut trained_tokens) = (Vec::new(), Vec::new());
        while let Some(batch) = batches
            .try_next()
            .await
            .map_err(|err| not_readable(&shard.path, err))?
        {
            for (name, sizes) in SIZES.into_iter().zip([&mut lengths, &mut trained_tokens]) {
                let column = batch.column_by_name(name).and_then(examples::u32s);
                sizes.extend_from_slice(column.ok_or_else(|| {
                    shard.corrupt("its columns are not those of a model-ready shard")
                })?);
            }
        }
        if object.rows != Some(lengths.len() as u64) {
            return Err(shard.corrupt("it has another number of rows than the manifest lists"));
        }
        Ok((shard, lengths, trained_tokens))
    }

    fn columns(&self, names: &[&str]) -> ParquetRecordBatchStreamBuilder<RangedFile> {
        let builder = ParquetRecordBatchStreamBuilder::new_with_metadata(
            self.file.clone(),
            self.metadata.clone(),
        );
        let mask = ProjectionMask::columns(builder.parquet_schema(), names.iter().copied());
        builder.with_projection(mask)
    }

    fn corrupt(&self, problem: &str) -> Error {
        Error::corrupt(
            &*self.path,
            format!("{problem}: delete its folder and pretokenize again"),
        )
    }
}
