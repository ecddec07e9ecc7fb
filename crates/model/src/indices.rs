//! Numbers by which operations look things up, where those things lie: ids, positions, rows, borders of sequences, keys.

use crate::error::Result;
use crate::tensor::Tensor;

/// Ids, positions or rows of a batch; on a GPU too where the tensors are, so that they go there once.
#[derive(Debug)]
pub(crate) struct Indices<'a> {
    pub(crate) host: &'a [u32],
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    there: Option<updraft_kernels::cuda::Buffer<u32>>,
}

/// Where each sequence of a batch begins, and where the last one ends.
#[derive(Debug)]
pub(crate) struct SeqStarts<'a> {
    pub(crate) host: &'a [u32],
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    there: Option<updraft_kernels::cuda::attention::Sequences>,
}

/// A key for each row of a batch, from which what is drawn at random is drawn for each of its uses.
#[derive(Debug)]
pub(crate) struct RowKeys {
    pub(crate) host: Vec<u64>,
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    there: Option<updraft_kernels::cuda::Buffer<u64>>,
}

impl RowKeys {
    /// For tensors that lie where this one does.
    pub(crate) fn beside(tensor: &Tensor, host: Vec<u64>) -> Result<Self> {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        let there = match tensor {
            Tensor::Gpu(tensor) => Some(tensor.gpu().upload(&host)?),
            Tensor::Host(_) => None,
        };
        let _ = tensor;
        Ok(Self {
            host,
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            there,
        })
    }

    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    pub(crate) fn gpu(&self) -> Result<updraft_kernels::cuda::View<'_, u64>> {
        let there = self.there.as_ref().ok_or_else(crate::gpu::host_only)?;
        Ok(there.view())
    }
}

impl<'a> Indices<'a> {
    /// For tensors that lie where this one does.
    pub(crate) fn beside(tensor: &Tensor, host: &'a [u32]) -> Result<Self> {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        let there = match tensor {
            Tensor::Gpu(tensor) => Some(tensor.gpu().upload(host)?),
            Tensor::Host(_) => None,
        };
        let _ = tensor;
        Ok(Self {
            host,
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            there,
        })
    }

    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    pub(crate) fn gpu(&self) -> Result<updraft_kernels::cuda::View<'_, u32>> {
        let there = self.there.as_ref().ok_or_else(crate::gpu::host_only)?;
        Ok(there.view())
    }
}

impl<'a> SeqStarts<'a> {
    /// Where nothing on a GPU asks for them.
    pub(crate) fn on_host(host: &'a [u32]) -> Self {
        Self {
            host,
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            there: None,
        }
    }

    /// For tensors that lie where this one does.
    pub(crate) fn beside(tensor: &Tensor, host: &'a [u32]) -> Result<Self> {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        let there = match tensor {
            Tensor::Gpu(tensor) => {
                let gpu = tensor.gpu();
                Some(updraft_kernels::cuda::attention::Sequences::new(gpu, host)?)
            }
            Tensor::Host(_) => None,
        };
        let _ = tensor;
        Ok(Self {
            host,
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            there,
        })
    }

    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    pub(crate) fn gpu(&self) -> Result<&updraft_kernels::cuda::attention::Sequences> {
        self.there.as_ref().ok_or_else(crate::gpu::host_only)
    }
}
