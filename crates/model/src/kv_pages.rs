//! Page memory for the keys and values of sequences being served.

use candle_core::DType;

use crate::batch::{Batch, BlockTables};
use crate::config::ModelConfig;
use crate::decoder::Decoder;
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

/// One layer's pages, `[num_blocks · block_size, H_kv · D]` each.
#[derive(Debug)]
pub(crate) struct LayerPages {
    pub(crate) keys: Tensor,
    pub(crate) values: Tensor,
}

impl Decoder {
    /// Sets `num_blocks` pages of `block_size` tokens aside, in the decoder's number type, where it
    /// computes. In the host's memory the operating system hands them out as they are first written.
    ///
    /// # Errors
    /// [`Error::Batch`] if there are no pages or more slots than a `u32` counts; [`Error::Candle`]
    /// or [`Error::Gpu`] if the memory cannot be had.
    pub fn new_pages(&self, num_blocks: usize, block_size: usize) -> Result<KvPages> {
        let slots = num_blocks.saturating_mul(block_size);
        if slots == 0 || u32::try_from(slots).is_err() {
            return Err(Error::batch(format!(
                "{num_blocks} pages of {block_size} tokens"
            )));
        }
        let (config, dtype) = (self.config(), self.dtype());
        let layers = (0..config.num_hidden_layers)
            .map(|_| {
                Ok(LayerPages {
                    keys: self.zeros(&[slots, config.kv_dim()])?,
                    values: self.zeros(&[slots, config.kv_dim()])?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(KvPages {
            layers,
            num_blocks,
            block_size,
            dtype,
        })
    }
}

impl KvPages {
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
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    there: Option<There>,
}

/// The same on a GPU.
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
pub(crate) struct There {
    pub(crate) slots: updraft_kernels::cuda::Buffer<u32>,
    pub(crate) sequences: updraft_kernels::cuda::paged_attention::Sequences,
}

impl<'a> Places<'a> {
    /// The batch is validated; the tables must stay within the pages.
    pub(crate) fn new(batch: &Batch, tables: &'a BlockTables, pages: &KvPages) -> Result<Self> {
        let num_blocks = pages.num_blocks;
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
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            there: There::beside(&pages.layers[0].keys, batch, tables, &slots, &context_lens)?,
            tables,
            slots,
            context_lens,
        })
    }

    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    pub(crate) fn gpu(&self) -> Result<&There> {
        self.there.as_ref().ok_or_else(crate::gpu::host_only)
    }
}

#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
impl There {
    /// For pages on a GPU; `None` for the host's.
    fn beside(
        pages: &Tensor,
        batch: &Batch,
        tables: &BlockTables,
        slots: &[u32],
        context_lens: &[u32],
    ) -> Result<Option<Self>> {
        use updraft_kernels::cuda::paged_attention::Sequences;
        let Tensor::Gpu(pages) = pages else {
            return Ok(None);
        };
        let sequences = updraft_kernels::paged_attention::Sequences {
            seq_starts: &batch.seq_starts,
            context_lens,
            block_tables: &tables.tables,
        };
        Ok(Some(Self {
            slots: pages.gpu().upload(slots)?,
            sequences: Sequences::new(pages.gpu(), &sequences, tables.block_size)?,
        }))
    }
}
