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
    /// The sums on a GPU while they are there, in place of `values`, which are zeros then: whoever looks at those settles
    /// first.
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

#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
impl There {
    fn zeros(gpu: &updraft_kernels::cuda::Gpu, plan: &Plan) -> Result<Self> {
        let len = plan.len();
        let sums = crate::gpu::Tensor::of_buffer(gpu, gpu.zeros::<f32>(len)?, &[len]);
        Self::of(sums, plan)
    }

    fn of(sums: crate::gpu::Tensor, plan: &Plan) -> Result<Self> {
        let views = std::sync::Arc::new(plan.views(&sums.clone().into())?);
        Ok(Self { sums, views })
    }
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

    /// Where gradients add up on a GPU until somebody looks at them.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    pub(crate) fn on_gpu(
        &mut self,
        gpu: &updraft_kernels::cuda::Gpu,
    ) -> Result<std::sync::Arc<Views>> {
        Ok(self.there(gpu)?.views.clone())
    }

    /// Calls `change` with the flat buffer in a GPU's memory, where it stays until somebody looks at it here: an optimizer
    /// step, or a reduction over workers.
    ///
    /// # Errors
    /// [`Error::Candle`](crate::Error::Candle) if they are not F32; [`Error::Gpu`](crate::Error::Gpu) if the GPU fails.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    pub fn update_on_gpu<R>(
        &mut self,
        gpu: &updraft_kernels::cuda::Gpu,
        change: impl FnOnce(updraft_kernels::cuda::ViewMut<'_, f32>) -> R,
    ) -> Result<R> {
        let sums = &self.there(gpu)?.sums;
        let mut sums = sums.write::<f32>();
        Ok(change(sums.view()))
    }

    /// The sums on a GPU, from here if they are not there yet.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    fn there(&mut self, gpu: &updraft_kernels::cuda::Gpu) -> Result<&There> {
        let there = self.there.get_mut();
        let there = there.unwrap_or_else(std::sync::PoisonError::into_inner);
        if there.as_ref().is_none_or(|there| there.sums.gpu() != gpu) {
            let is_zero = self.with(|values| values.iter().all(|&value| value == 0.0))?;
            let sums = match is_zero {
                true => There::zeros(gpu, &self.plan)?,
                false => {
                    let here = self.values.host()?;
                    let sums = crate::gpu::Tensor::upload(gpu, here, DType::F32)?;
                    edit_slice(&self.values, |values: &mut [f32]| values.fill(0.0))?;
                    There::of(sums, &self.plan)?
                }
            };
            self.there = std::sync::Mutex::new(Some(sums));
        }
        let there = self.there.get_mut();
        let there = there.unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok(there.as_ref().expect("just put there"))
    }

    /// Brings the sums here, if they are on a GPU.
    fn settle(&self) -> Result<()> {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        {
            let there = self.there.lock();
            let mut there = there.unwrap_or_else(std::sync::PoisonError::into_inner);
            if let Some(There { sums, .. }) = &*there {
                let sums = sums.to_host()?;
                edit_slice(&self.values, |values: &mut [f32]| {
                    values.copy_from_slice(&sums);
                })?;
                *there = None;
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
    /// [`Error::Device`](crate::Error::Device) off the CPU; [`Error::Gpu`](crate::Error::Gpu) if a GPU fails.
    pub fn zero(&mut self) -> Result<()> {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        {
            let there = std::mem::take(&mut self.there).into_inner();
            let there = there.unwrap_or_else(std::sync::PoisonError::into_inner);
            if let Some(There { sums, views }) = there {
                let gpu = sums.gpu().clone();
                drop((sums, views)); // so that their memory serves again
                self.there = std::sync::Mutex::new(Some(There::zeros(&gpu, &self.plan)?));
                return Ok(());
            }
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
