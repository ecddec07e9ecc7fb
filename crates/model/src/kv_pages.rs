//! Page memory for the keys and values of sequences being served.

use candle_core::{DType, Device, Tensor};

use crate::config::ModelConfig;
use crate::error::{Error, Result};

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
                    keys: Tensor::zeros(shape, dtype, device)?,
                    values: Tensor::zeros(shape, dtype, device)?,
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
