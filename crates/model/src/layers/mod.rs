//! The parts of a decoder block; each file holds a forward pass and its backward pass.

mod attention;
mod block;
mod border;
mod embedding;
mod linear;
mod mlp;
mod rms_norm;

pub(crate) use block::{Block, SavedBlock};
pub(crate) use border::width as border_width;
pub(crate) use embedding::Embedding;
pub(crate) use linear::{AdapterRows, Dropout, Group, Trained};
pub(crate) use rms_norm::{RmsNorm, Stream};

use candle_core::{DType, Device};

use crate::batch::Batch;
use crate::bridge::RopeTable;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::indices::{Indices, SeqStarts};
use crate::kv_pages::{LayerPages, Places};
use crate::lora::{GroupAdapter, Saved, Views};
use crate::ops::Ops;
use crate::quantized;
use crate::tensor::Tensor;
use crate::weights::Weights;

/// Where weights come from and what they become.
#[derive(Clone, Copy)]
pub(crate) struct Loader<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) weights: &'a Weights,
    /// What the decoder computes in.
    pub(crate) dtype: DType,
    pub(crate) matrices: Matrices,
    pub(crate) place: Place<'a>,
}

/// Whose memory weights go to.
#[derive(Clone, Copy)]
pub(crate) enum Place<'a> {
    Host(&'a Device),
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    Gpu(&'a updraft_kernels::cuda::Gpu),
}

/// What frozen matrices are kept as.
#[derive(Clone, Copy)]
pub(crate) enum Matrices {
    /// In the number type that the decoder computes in.
    Computed,
    Bf16,
    /// Quantized; those whose rows are not whole blocks as [`Bf16`](Self::Bf16).
    Q8_0,
}

impl Loader<'_> {
    /// A vector, which every pass reads whole: in what the decoder computes in.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        let load = |device: &Device| self.weights.load(name, &[len], self.dtype, device);
        self.placed(load)
    }

    /// Vectors one after the other.
    pub(crate) fn vectors(&self, tensors: &[(String, Vec<usize>)]) -> Result<Tensor> {
        self.placed(|device| self.weights.load_stacked(tensors, self.dtype, device))
    }

    pub(crate) fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Tensor> {
        self.matrices(&[(name.to_owned(), shape.to_vec())])
    }

    /// Matrices one below the other.
    pub(crate) fn matrices(&self, tensors: &[(String, Vec<usize>)]) -> Result<Tensor> {
        let dtype = match self.matrices {
            Matrices::Computed => self.dtype,
            Matrices::Q8_0 if quantized::fits(tensors) => {
                return self.placed(|device| self.weights.load_q8_0(tensors, device));
            }
            Matrices::Bf16 | Matrices::Q8_0 => DType::BF16,
        };
        self.placed(|device| self.weights.load_stacked(tensors, dtype, device))
    }

    fn placed(&self, load: impl FnOnce(&Device) -> Result<candle_core::Tensor>) -> Result<Tensor> {
        match self.place {
            Place::Host(device) => Ok(load(device)?.into()),
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            Place::Gpu(gpu) => {
                let tensor = load(&Device::Cpu)?;
                let there = crate::gpu::Tensor::upload(gpu, &tensor, tensor.dtype())?;
                Ok(Tensor::Gpu(there))
            }
        }
    }
}

/// What every layer sees of one pass.
pub(crate) struct Pass<'a> {
    pub(crate) ops: &'a Ops,
    pub(crate) config: &'a ModelConfig,
    pub(crate) rope: &'a RopeTable,
    pub(crate) batch: &'a Batch,
    pub(crate) ids: Indices<'a>,
    pub(crate) positions: Indices<'a>,
    pub(crate) seq_starts: SeqStarts<'a>,
    pub(crate) logit_rows: Indices<'a>,
    /// The adapter of all rows, where it stands in the borders of the weights.
    pub(crate) bordered: Option<&'a Views>,
}
