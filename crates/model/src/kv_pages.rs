//! Page memory for the keys and values of sequences being served.

use candle_core::{DType, Device};

use crate::batch::{Batch, BlockTables};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The keys and values of all layers, in pages of `block_size` tokens.
///
/// The pages are only memory: who owns which is decided by whoever fills in
/// [`BlockTables`](crate::BlockTables), usually `updraft-serve`'s block allocator. A page needs no
/// clearing before it is handed on.
#[derive(Debug)]
pub struct KvPages {
    pub(crate) layers: Vec<LayerPages>,
    num_blocks: usize,
    block_size: usize,
    dtype: DType,
}

/// One layer's pages, `[num_blocks, block_size, H_kv, D]` each.
#[derive(Debug)]
pub(crate) struct LayerPages {
    pub(crate) keys: Tensor,
    pub(crate) values: Tensor,
}

impl KvPages {
    /// Sets `num_blocks` pages of `block_size` tokens aside; the operating system hands the memory
    /// out as it is first written.
    ///
    /// # Errors
    /// [`Error::Batch`] if there are no pages or more slots than a `u32` counts; [`Error::Candle`] if the
    /// memory cannot be had.
    pub fn new(
        config: &ModelConfig,
        num_blocks: usize,
        block_size: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let slots = num_blocks.saturating_mul(block_size);
        if slots == 0 || u32::try_from(slots).is_err() {
            return Err(Error::batch(format!(
                "{num_blocks} pages of {block_size} tokens"
            )));
        }
        let shape = (
            num_blocks,
            block_size,
            config.num_key_value_heads,
            config.head_dim,
        );
        let layers = (0..config.num_hidden_layers)
            .map(|_| {
                Ok(LayerPages {
                    keys: candle_core::Tensor::zeros(shape, dtype, device)?.into(),
                    values: candle_core::Tensor::zeros(shape, dtype, device)?.into(),
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            layers,
            num_blocks,
            block_size,
            dtype,
        })
    }

    /// How many pages there are.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Tokens per page.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Their number type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// What one page takes over all layers.
    pub fn bytes_per_block(config: &ModelConfig, block_size: usize, dtype: DType) -> u64 {
        2 * (config.num_hidden_layers * block_size * config.kv_dim() * dtype.size_in_bytes()) as u64
    }
}

/// Where the tokens of a batch lie in pages, worked out once for all layers.
pub(crate) struct Places<'a> {
    pub(crate) tables: &'a BlockTables,
    /// The slot of each new token, `[T]`.
    pub(crate) slots: Vec<u32>,
    /// Each sequence's tokens in the pages, the new ones included.
    pub(crate) context_lens: Vec<u32>,
}

impl<'a> Places<'a> {
    /// The batch is validated; the tables must stay within `num_blocks` pages.
    pub(crate) fn new(batch: &Batch, tables: &'a BlockTables, num_blocks: usize) -> Result<Self> {
        let (mut slots, mut context_lens) = (Vec::with_capacity(batch.num_tokens()), Vec::new());
        for (s, table) in tables.tables.iter().enumerate() {
            if let Some(page) = table.iter().find(|&&page| page as usize >= num_blocks) {
                return Err(Error::batch(format!(
                    "sequence {s} names page {page} of {num_blocks}"
                )));
            }
            let positions = &batch.positions[batch.rows(s)];
            slots.extend(positions.iter().map(|&position| {
                let (block, offset) = (
                    position as usize / tables.block_size,
                    position as usize % tables.block_size,
                );
                table[block] * tables.block_size as u32 + offset as u32
            }));
            context_lens.push(positions.last().map_or(0, |last| last + 1));
        }
        Ok(Self {
            tables,
            slots,
            context_lens,
        })
    }
}
