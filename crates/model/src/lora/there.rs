//! An adapter's values on a GPU: what an optimizer changes there, and what a decoder there reads.

use std::sync::Arc;

use candle_core::DType;
use updraft_kernels::cuda::Gpu;

use super::plan::{Plan, Views};
use crate::error::Result;
use crate::gpu::Tensor as GpuTensor;
use crate::tensor::Tensor;

/// An adapter's values on a GPU, beside those in the host's memory.
#[derive(Debug, Default)]
pub(super) struct There {
    master: Option<Master>,
    copy: Option<Copy>,
}

/// The values in f32, where an optimizer has changed them.
#[derive(Debug)]
struct Master {
    values: GpuTensor,
    /// Whether they changed since the host's memory had the same.
    is_newer: bool,
}

/// The newest values in the type that a decoder computes in. New views for each change: who keeps something made of
/// them can tell by the pointer.
#[derive(Debug)]
struct Copy {
    gpu: Gpu,
    dtype: DType,
    views: Arc<Views>,
}

impl There {
    /// The values if they are newer than the host's, which has them from now on.
    pub(super) fn take_newer(&mut self) -> Result<Option<Vec<f32>>> {
        let Some(master) = self.master.as_mut().filter(|master| master.is_newer) else {
            return Ok(None);
        };
        let values = master.values.to_host()?;
        master.is_newer = false;
        Ok(Some(values))
    }

    /// Whether the newest values are on this GPU, in f32.
    pub(super) fn has_master_on(&self, gpu: &Gpu) -> bool {
        let master = self.master.as_ref();
        master.is_some_and(|master| master.values.gpu() == gpu)
    }

    /// The values for a decoder; from the host's, which are the newest, unless they are there already.
    pub(super) fn views(
        &mut self,
        plan: &Plan,
        host: &candle_core::Tensor,
        gpu: &Gpu,
        dtype: DType,
    ) -> Result<Arc<Views>> {
        if let Some(copy) = self.copy.as_ref()
            && (&copy.gpu, copy.dtype) == (gpu, dtype)
        {
            return Ok(copy.views.clone());
        }
        let values = match &self.master {
            Some(master) if master.values.gpu() == gpu => master.values.clone(),
            _ => GpuTensor::upload(gpu, host, DType::F32)?,
        };
        let views = Arc::new(plan.views(&Tensor::Gpu(values.cast(dtype)?))?);
        self.copy = Some(Copy {
            gpu: gpu.clone(),
            dtype,
            views: views.clone(),
        });
        Ok(views)
    }

    /// The values to be changed, from the host's, which are the newest, unless they are there already.
    pub(super) fn change(&mut self, host: &candle_core::Tensor, gpu: &Gpu) -> Result<&GpuTensor> {
        self.copy = None;
        let values = match self.master.take() {
            Some(master) if master.values.gpu() == gpu => master.values,
            _ => GpuTensor::upload(gpu, host, DType::F32)?,
        };
        let is_newer = true;
        let master = self.master.insert(Master { values, is_newer });
        Ok(&master.values)
    }
}
