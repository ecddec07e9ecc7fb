//! Which processor a decoder is loaded for, as a program's options name it.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device};
use safetensors::Dtype;
use updraft_kernels::Threads;

use crate::config::ModelConfig;
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::weights::Weights;

/// Which processor computes: `cpu`, `cuda` for the first GPU, `cuda:1` for the second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Compute {
    /// The threads of this machine.
    #[default]
    Cpu,
    /// The NVIDIA GPU of this number, as `CUDA_VISIBLE_DEVICES` counts them. Needs feature `cuda`; with `cuda-emulator`
    /// alone it is the emulator.
    Cuda(usize),
}

impl FromStr for Compute {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let ordinal = match text {
            "cpu" => return Ok(Self::Cpu),
            "cuda" => Some(0),
            other => other
                .strip_prefix("cuda:")
                .and_then(|ordinal| ordinal.parse().ok()),
        };
        ordinal.map(Self::Cuda).ok_or_else(|| Error::Unsupported {
            what: format!("device {text:?}"),
            instead: "say cpu, cuda or cuda:1",
        })
    }
}

impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl Compute {
    /// Opens the GPU; `None` for the CPU.
    ///
    /// # Errors
    /// [`Error::Gpu`] where there is no such GPU, no driver, or one too old.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    pub fn gpu(self) -> Result<Option<updraft_kernels::cuda::Gpu>> {
        match self {
            Self::Cpu => Ok(None),
            #[cfg(feature = "cuda")]
            Self::Cuda(ordinal) => Ok(Some(updraft_kernels::cuda::Gpu::new(ordinal)?)),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda(_) => Ok(Some(updraft_kernels::cuda::Gpu::emulated())),
        }
    }

    /// The number type to train in: f32 on the CPU; on a GPU bf16, and f16 on those that came before `sm_80`.
    ///
    /// # Errors
    /// As `Compute::gpu`.
    pub fn training_dtype(self) -> Result<DType> {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        if let Some(gpu) = self.gpu()? {
            return Ok(match gpu.has_bf16() {
                true => DType::BF16,
                false => DType::F16,
            });
        }
        self.check()?;
        Ok(DType::F32)
    }

    /// Whether this build knows such a processor.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a GPU in a build without feature `cuda`.
    pub fn check(self) -> Result<()> {
        if self == Self::Cpu || cfg!(any(feature = "cuda", feature = "cuda-emulator")) {
            return Ok(());
        }
        Err(Error::Unsupported {
            what: format!("device {self} in a build without feature `cuda`"),
            instead: "build with --features cuda, or say cpu",
        })
    }
}

impl Decoder {
    /// Loads a model's weights to be served, in the number type that they are stored in where the processor computes in
    /// that: the CPU keeps bf16 and widens the rest to f32; a GPU takes f16, bf16 and f32, but bf16 as f16 before
    /// `sm_80`.
    ///
    /// # Errors
    /// As [`load`](Self::load), and as [`check`](Compute::check), and [`Error::Gpu`].
    pub fn load_as_stored(
        compute: Compute,
        config: &ModelConfig,
        weights: &Weights,
        threads: &Threads,
    ) -> Result<Self> {
        let stored = weights.matrix_dtype();
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        if let Some(gpu) = compute.gpu()? {
            let dtype = match stored {
                Some(Dtype::BF16) if gpu.has_bf16() => DType::BF16,
                Some(Dtype::BF16 | Dtype::F16) => DType::F16,
                _ => DType::F32,
            };
            return Self::load_on_gpu(config, weights, dtype, &gpu, threads);
        }
        compute.check()?;
        let dtype = match stored {
            Some(Dtype::BF16) => DType::BF16,
            _ => DType::F32,
        };
        Self::load(config, weights, dtype, &Device::Cpu, threads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_in_pytorch() {
        for (text, compute) in [
            ("cpu", Compute::Cpu),
            ("cuda:0", Compute::Cuda(0)),
            ("cuda:3", Compute::Cuda(3)),
        ] {
            assert_eq!(text.parse::<Compute>().expect("a device"), compute);
            assert_eq!(compute.to_string(), text);
        }
        assert_eq!(
            "cuda".parse::<Compute>().expect("a device"),
            Compute::Cuda(0)
        );
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "mps"] {
            let refused = text.parse::<Compute>().expect_err(text).to_string();
            assert!(refused.contains("say cpu, cuda or cuda:1"), "{refused}");
        }
    }

    #[cfg(not(any(feature = "cuda", feature = "cuda-emulator")))]
    #[test]
    fn a_build_without_cuda_names_the_feature() {
        use crate::config::Architecture;
        let config = crate::tiny::config(Architecture::Llama);
        let weights = crate::tiny::weights(&config, 1);
        let threads = Threads::single();
        let load = |compute| Decoder::load_as_stored(compute, &config, &weights, &threads);
        let refused = load(Compute::Cuda(0)).expect_err("no GPU").to_string();
        assert!(refused.contains("--features cuda"), "{refused}");
        assert!(load(Compute::Cpu).is_ok());
    }
}
