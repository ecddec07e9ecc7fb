//! The power of an optimizer to work on a GPU.

use std::fmt::Debug;

use updraft_kernels::cuda::{Gpu, View, ViewMut};
use updraft_model::Parameter;

use crate::Result;

/// Steps where parameters and gradients lie: flat buffers on a GPU, in f32. What [`Optimizer::on_gpu`] finds.
///
/// # Contract
/// - [`clip`](Self::clip), [`begin_step`] and [`update_all`](Self::update_all) are, within rounding, [`begin_step`] and an
///   [`update`] of each parameter with gradients that were clipped before.
/// - [`state`], [`restore`] and [`update`] see the same moments as these: a run may go on there or here.
///
/// [`Optimizer::on_gpu`]: super::Optimizer::on_gpu
/// [`begin_step`]: super::Optimizer::begin_step
/// [`update`]: super::Optimizer::update
/// [`state`]: super::Optimizer::state
/// [`restore`]: super::Optimizer::restore
pub trait GpuOptimizer: Debug + Send + Sync {
    /// The norm of all parameters' gradients, which `unscale` takes loss scaling out of. The next step takes them
    /// unscaled, and shrunk to `max_grad_norm` if that is positive and they are larger.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) when the moments are of other parameters;
    /// [`Error::Model`](crate::Error::Model) when the GPU fails.
    fn clip(
        &mut self,
        gpu: &Gpu,
        parameters: &[Parameter],
        gradients: View<'_, f32>,
        unscale: f64,
        max_grad_norm: f64,
    ) -> Result<f64>;

    /// Moves the parameters by the gradients that were [clipped](Self::clip).
    ///
    /// # Errors
    /// [`Error::Model`](crate::Error::Model) when the GPU fails.
    ///
    /// # Panics
    /// If nothing was clipped, or these are other parameters.
    fn update_all(&mut self, values: ViewMut<'_, f32>, gradients: View<'_, f32>) -> Result<()>;
}
