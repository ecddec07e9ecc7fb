//! What layers hand to operations: a tensor in the host's memory or in a GPU's.

use candle_core::DType;

use crate::error::{Error, Result};

/// A tensor of one or two dimensions, or a view of some rows or columns of one; clones share its memory.
#[derive(Debug, Clone)]
pub(crate) enum Tensor {
    Host(candle_core::Tensor),
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    Gpu(crate::gpu::Tensor),
}

impl From<candle_core::Tensor> for Tensor {
    fn from(tensor: candle_core::Tensor) -> Self {
        Self::Host(tensor)
    }
}

#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
impl From<crate::gpu::Tensor> for Tensor {
    fn from(tensor: crate::gpu::Tensor) -> Self {
        Self::Gpu(tensor)
    }
}

/// The same method on either side.
macro_rules! either {
    ($tensor:expr, $inner:ident => $value:expr) => {
        match $tensor {
            Tensor::Host($inner) => $value,
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            Tensor::Gpu($inner) => $value,
        }
    };
}

impl Tensor {
    /// The tensor, if it is in the host's memory.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) if it is in a GPU's.
    pub(crate) fn host(&self) -> Result<&candle_core::Tensor> {
        match self {
            Self::Host(tensor) => Ok(tensor),
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            Self::Gpu(_) => Err(crate::gpu::host_only()),
        }
    }

    /// The tensor, if it is in a GPU's memory.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) if it is in the host's.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    pub(crate) fn gpu(&self) -> Result<&crate::gpu::Tensor> {
        match self {
            Self::Gpu(tensor) => Ok(tensor),
            Self::Host(_) => Err(crate::gpu::host_only()),
        }
    }

    /// The tensor in the host's memory, in f32 where it was on a GPU.
    pub(crate) fn into_host(self) -> Result<candle_core::Tensor> {
        match self {
            Self::Host(tensor) => Ok(tensor),
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            Self::Gpu(tensor) => {
                let (values, dims) = (tensor.to_host()?, tensor.dims().to_vec());
                let cpu = &candle_core::Device::Cpu;
                Ok(candle_core::Tensor::from_vec(values, dims, cpu)?)
            }
        }
    }

    pub(crate) fn is_on_gpu(&self) -> bool {
        match self {
            Self::Host(_) => false,
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            Self::Gpu(_) => true,
        }
    }

    pub(crate) fn dims(&self) -> &[usize] {
        either!(self, tensor => tensor.dims())
    }

    /// Numbers in a row.
    pub(crate) fn cols(&self) -> usize {
        self.dims().last().copied().unwrap_or(1)
    }

    /// Rows, of which a vector is one.
    pub(crate) fn rows(&self) -> usize {
        self.dims().iter().rev().skip(1).product()
    }

    pub(crate) fn dtype(&self) -> DType {
        either!(self, tensor => tensor.dtype())
    }

    /// Some places of a dimension, without a copy.
    pub(crate) fn narrow(&self, dim: usize, start: usize, len: usize) -> Result<Self> {
        Ok(match self {
            Self::Host(tensor) => Self::Host(tensor.narrow(dim, start, len)?),
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            Self::Gpu(tensor) => Self::Gpu(tensor.narrow(dim, start, len)),
        })
    }

    /// The rows with so many columns more, which whoever computed them left free behind them, without a copy.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) in the host's memory, where there are none.
    pub(crate) fn wider(&self, room: usize) -> Result<Self> {
        match self {
            Self::Host(_) => Err(Error::Unsupported {
                what: format!("{room} columns behind rows in the host's memory"),
                instead: "keep adapters in borders on a GPU only",
            }),
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            Self::Gpu(tensor) => Ok(Self::Gpu(tensor.wider(room))),
        }
    }

    /// The same numbers in other rows, without a copy.
    pub(crate) fn reshape(&self, dims: &[usize]) -> Result<Self> {
        Ok(match self {
            Self::Host(tensor) => Self::Host(tensor.reshape(dims)?),
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            Self::Gpu(tensor) => Self::Gpu(tensor.reshape(dims)),
        })
    }

    /// Zeros of the same type in the same memory.
    pub(crate) fn zeros(&self, dims: &[usize]) -> Result<Self> {
        Ok(match self {
            Self::Host(tensor) => Self::Host(candle_core::Tensor::zeros(
                dims,
                tensor.dtype(),
                tensor.device(),
            )?),
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            Self::Gpu(tensor) => Self::Gpu(tensor.zeros(dims)?),
        })
    }

    /// Zeros of the same shape and type.
    pub(crate) fn zeros_like(&self) -> Result<Self> {
        self.zeros(self.dims())
    }

    /// Itself where it is without gaps, else a copy, so that what lies between its rows can go.
    pub(crate) fn packed(self) -> Result<Self> {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        if let Self::Gpu(tensor) = &self
            && !tensor.is_packed()
        {
            return self.packed_copy();
        }
        Ok(self)
    }

    /// A copy without gaps.
    pub(crate) fn packed_copy(&self) -> Result<Self> {
        Ok(match self {
            Self::Host(tensor) => Self::Host(tensor.force_contiguous()?),
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            Self::Gpu(tensor) => Self::Gpu(tensor.packed_copy()?),
        })
    }
}
