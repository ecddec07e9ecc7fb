//! Gradients of an adapter, laid out as the adapter is.

use candle_core::{DType, Device};

use super::adapter::Adapter;
use super::plan::{Plan, Views};
use crate::bridge::{edit_slice, read, typed};
use crate::error::Result;
use crate::tensor::Tensor;

/// The gradients of an [`Adapter`]'s parameters, one flat buffer in the same order.
///
/// They add up until [`zero`](Self::zero): over the parts of a micro-batch, over micro-batches.
#[derive(Debug)]
pub struct Gradients {
    plan: Plan,
    values: Tensor,
    views: Views,
    /// What has added up on a GPU and is not in `values` yet.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    there: std::sync::Mutex<Option<There>>,
}

/// Sums on a GPU.
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
#[derive(Debug)]
struct There {
    sums: crate::gpu::Tensor,
    views: std::sync::Arc<Views>,
}

impl Gradients {
    /// Zeros for an adapter.
    ///
    /// # Errors
    /// [`Error::Candle`](crate::Error::Candle) if the memory cannot be had.
    pub fn zeros(adapter: &Adapter) -> Result<Self> {
        Self::of_plan(adapter.plan(), adapter.dtype())
    }

    pub(crate) fn zeros_like(&self) -> Result<Self> {
        Self::of_plan(&self.plan, self.values.dtype())
    }

    fn of_plan(plan: &Plan, dtype: DType) -> Result<Self> {
        let values = Tensor::from(candle_core::Tensor::zeros(plan.len(), dtype, &Device::Cpu)?);
        Ok(Self {
            plan: plan.clone(),
            views: plan.views(&values)?,
            values,
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            there: std::sync::Mutex::default(),
        })
    }

    /// Where gradients add up on a GPU until somebody looks at them: as many times as the steps have micro-batches.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    pub(crate) fn on_gpu(
        &mut self,
        gpu: &updraft_kernels::cuda::Gpu,
    ) -> Result<std::sync::Arc<Views>> {
        let there = self.there.get_mut();
        let there = there.unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(there) = there.as_ref().filter(|there| there.sums.gpu() == gpu) {
            return Ok(there.views.clone());
        }
        self.settle()?;
        let len = self.plan.len();
        let sums = crate::gpu::Tensor::of_buffer(gpu, gpu.zeros::<f32>(len)?, &[len]);
        let views = std::sync::Arc::new(self.plan.views(&sums.clone().into())?);
        let there = There {
            sums,
            views: views.clone(),
        };
        self.there = std::sync::Mutex::new(Some(there));
        Ok(views)
    }

    /// Adds what is on a GPU, if anything is.
    fn settle(&self) -> Result<()> {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        {
            let there = self.there.lock();
            let mut there = there.unwrap_or_else(std::sync::PoisonError::into_inner);
            if let Some(There { sums, .. }) = there.take() {
                let sums = sums.to_host()?;
                edit_slice(&self.values, |values: &mut [f32]| {
                    for (value, sum) in values.iter_mut().zip(&sums) {
                        *value += sum;
                    }
                })?;
            }
        }
        Ok(())
    }

    pub(crate) fn views(&self) -> &Views {
        &self.views
    }

    /// Whether they are laid out as an adapter is.
    pub(crate) fn belong_to(&self, adapter: &Adapter) -> bool {
        self.plan.parameters == adapter.parameters() && self.values.dtype() == adapter.dtype()
    }

    /// Starts over.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) off the CPU.
    pub fn zero(&mut self) -> Result<()> {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        {
            self.there = std::sync::Mutex::default();
        }
        typed!(self.values, F => edit_slice(&self.values, |values: &mut [F]| values.fill(0.0)))
    }

    /// Adds another's.
    ///
    /// # Errors
    /// [`Error::Candle`](crate::Error::Candle) if they belong to different adapters.
    pub fn add(&mut self, other: &Self) -> Result<()> {
        if self.values.dims() != other.values.dims() {
            return Err(crate::Error::adapter("gradients of another adapter"));
        }
        self.settle()?;
        other.settle()?;
        typed!(self.values, F => {
            let other = read::<F>(&other.values)?;
            edit_slice(&self.values, |values: &mut [F]| {
                for (value, other) in values.iter_mut().zip(other.slice()) {
                    *value += *other;
                }
            })
        })
    }

    /// Changes the flat buffer in place: clipping, or a reduction over workers.
    ///
    /// # Errors
    /// [`Error::Candle`](crate::Error::Candle) if they are not F32.
    pub fn update<R>(&mut self, change: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
        self.settle()?;
        edit_slice(&self.values, change)
    }

    /// Calls `look` with the flat buffer, without a copy.
    ///
    /// # Errors
    /// [`Error::Candle`](crate::Error::Candle) if they are not F32.
    pub fn with<R>(&self, look: impl FnOnce(&[f32]) -> R) -> Result<R> {
        self.settle()?;
        Ok(look(read::<f32>(&self.values)?.slice()))
    }

    /// A copy as f64, whatever their type; for tests.
    ///
    /// # Errors
    /// [`Error::Candle`](crate::Error::Candle) if the device fails.
    pub fn to_vec(&self) -> Result<Vec<f64>> {
        self.settle()?;
        Ok(self.values.host()?.to_dtype(DType::F64)?.to_vec1()?)
    }
}
