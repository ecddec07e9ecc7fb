//! What a pass ends with: hidden states, and the logits they come to, where the decoder computes them.

use std::ops::Range;

use candle_core::DType;

use crate::error::Result;
use crate::tensor::Tensor;

/// The final, normed hidden states of a batch's logit rows, `[N, C]`, in the memory of the decoder's processor.
#[derive(Debug, Clone)]
pub struct Hidden(pub(crate) Tensor);

/// Logits, `[N, V]`, in the memory of the decoder's processor: in the decoder's number type on the CPU, in f32 on a GPU.
#[derive(Debug)]
pub struct Logits(pub(crate) Tensor);

macro_rules! rows {
    ($rows:ident) => {
        impl $rows {
            /// How many rows there are.
            pub fn num_rows(&self) -> usize {
                self.0.rows()
            }

            /// Numbers in a row.
            pub fn num_cols(&self) -> usize {
                self.0.cols()
            }

            /// Some of the rows, without a copy.
            ///
            /// # Errors
            /// [`Error::Candle`](crate::Error::Candle) if there are no such rows.
            ///
            /// # Panics
            /// If there are no such rows on a GPU.
            pub fn rows(&self, rows: Range<usize>) -> Result<Self> {
                Ok(Self(self.0.narrow(0, rows.start, rows.len())?))
            }

            /// All rows in the host's memory: without a copy where they are there already, and from a GPU in f32.
            ///
            /// # Errors
            /// [`Error::Gpu`](crate::Error::Gpu) if the GPU fails.
            pub fn to_tensor(&self) -> Result<candle_core::Tensor> {
                self.0.clone().into_host()
            }

            /// A copy of all numbers, row after row.
            ///
            /// # Errors
            /// As [`to_tensor`](Self::to_tensor).
            pub fn to_vec(&self) -> Result<Vec<f32>> {
                let tensor = self.to_tensor()?.to_dtype(DType::F32)?;
                Ok(tensor.flatten_all()?.to_vec1()?)
            }
        }
    };
}
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
impl Logits {
    /// A copy of some rows of those on a GPU, one after the other.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) for logits in the host's memory,
    /// [`Error::Gpu`](crate::Error::Gpu) if the GPU fails.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn pick(&self, rows: &[u32]) -> Result<Vec<f32>> {
        let logits = self.0.gpu()?;
        assert!(
            rows.iter().all(|&row| (row as usize) < self.num_rows()),
            "rows of the logits"
        );
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let rows = logits.gpu().upload(rows)?;
        crate::gpu::gather(logits, rows.view())?.to_host()
    }

    /// Changes some logits, then chooses a token of each row where they lie, on a GPU; `None` where no logit is finite.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) for logits in the host's memory,
    /// [`Error::Gpu`](crate::Error::Gpu) if the GPU fails.
    ///
    /// # Panics
    /// As [`updraft_kernels::cuda::sampling::sample`].
    pub fn sample(
        &mut self,
        choices: &[updraft_kernels::cuda::sampling::Choice],
        edits: &[updraft_kernels::cuda::sampling::Edit],
    ) -> Result<Vec<Option<u32>>> {
        let logits = self.0.gpu()?;
        let mut held = logits.write::<f32>();
        let tokens =
            updraft_kernels::cuda::sampling::sample(logits.gpu(), &mut held.mat(), choices, edits);
        Ok(tokens?)
    }
}

rows!(Hidden);
rows!(Logits);
