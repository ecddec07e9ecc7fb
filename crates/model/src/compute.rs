//! Which processor a decoder is loaded for, as a program's options name it.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device};
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
    /// The NVIDIA GPU of this number, as `CUDA_VISIBLE_DEVICES` counts them. Needs feature `cuda`.
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
    /// [`Error::Unsupported`] in a build without feature `cuda`, and in one with it [`Error::Gpu`] where there is no such
    /// GPU, no driver, or one too old.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    pub fn gpu(self) -> Result<Option<updraft_kernels::cuda::Gpu>> {
        match self {
            Self::Cpu => Ok(None),
            #[cfg(feature = "cuda")]
            Self::Cuda(ordinal) => Ok(Some(updraft_kernels::cuda::Gpu::new(ordinal)?)),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda(_) => Err(self.not_compiled()),
        }
    }

    /// What asking for a GPU comes to in this build.
    #[cfg(not(feature = "cuda"))]
    fn not_compiled(self) -> Error {
        Error::Unsupported {
            what: format!("device {self} in a build without feature `cuda`"),
            instead: "build with --features cuda, or say cpu",
        }
    }
}

impl Decoder {
    /// [`load`](Self::load) or [`load_on_gpu`](Self::load_on_gpu).
    ///
    /// # Errors
    /// As either, and as `Compute::gpu`.
    pub fn load_for(
        compute: Compute,
        config: &ModelConfig,
        weights: &Weights,
        dtype: DType,
        threads: &Threads,
    ) -> Result<Self> {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        if let Some(gpu) = compute.gpu()? {
            return Self::load_on_gpu(config, weights, dtype, &gpu, threads);
        }
        #[cfg(not(any(feature = "cuda", feature = "cuda-emulator")))]
        if compute != Compute::Cpu {
            return Err(compute.not_compiled());
        }
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

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_cuda_names_the_feature() {
        use crate::config::Architecture;
        let config = crate::tiny::config(Architecture::Llama);
        let weights = crate::tiny::weights(&config, 1);
        let load =
            |compute| Decoder::load_for(compute, &config, &weights, DType::F32, &Threads::single());
        let refused = load(Compute::Cuda(0)).expect_err("no GPU").to_string();
        assert!(refused.contains("--features cuda"), "{refused}");
        assert!(load(Compute::Cpu).is_ok());
    }
}
