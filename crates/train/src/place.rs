//! Where a run trains: the threads of this machine, or one of its GPUs.

use candle_core::{DType, Device};
use updraft_model::memory::MemoryEstimate;
use updraft_model::{Compute, Decoder, LoraConfig, ModelConfig, ModelFiles, Threads};

use crate::memory::check_memory;
use crate::source::ExamplePlan;
use crate::{Result, TrainConfig};

/// An opened processor.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    Cpu,
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    Gpu(updraft_model::Gpu),
}

impl Place {
    /// Opens it.
    ///
    /// # Errors
    /// [`Error::Model`](crate::Error::Model) where there is no such GPU, or none in this build.
    pub(crate) fn open(compute: Compute) -> Result<Self> {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        if let Some(gpu) = compute.gpu()? {
            return Ok(Self::Gpu(gpu));
        }
        compute.check()?;
        Ok(Self::Cpu)
    }

    /// Whether a run fits its memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory) says what would fit.
    pub(crate) fn check_memory(
        &self,
        model: &ModelConfig,
        lora: &LoraConfig,
        data: &ExamplePlan,
        config: &TrainConfig,
        threads: &Threads,
    ) -> Result<MemoryEstimate> {
        match self {
            Self::Cpu => check_memory(model, lora, data, config, threads),
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            Self::Gpu(gpu) => crate::memory::check_gpu_memory(model, lora, data, config, gpu),
        }
    }

    /// Loads a base model there.
    pub(crate) fn decoder(
        &self,
        base: &ModelFiles,
        dtype: DType,
        threads: &Threads,
    ) -> Result<Decoder> {
        let (config, weights) = (&base.config, &base.weights);
        Ok(match self {
            Self::Cpu => Decoder::load(config, weights, dtype, &Device::Cpu, threads)?,
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            Self::Gpu(gpu) => Decoder::load_on_gpu(config, weights, dtype, gpu, threads)?,
        })
    }
}
