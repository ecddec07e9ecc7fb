//! Sums over workers where the numbers lie: on a GPU of each.

use std::fmt;

use updraft_kernels::cuda::{Gpu, View, ViewMut, gathered};
use updraft_model::Error as ModelError;

use super::Collective;
use crate::Result;

/// The most bytes that what is gathered from all workers takes at once.
const MOST_GATHERED: usize = 64 << 20;

/// The power of a [`Collective`] to add up what lies on GPUs, found by [`Collective::on_gpu`].
pub trait GpuCollective {
    /// As [`Collective::sum`]: added in the order of ranks, the same bits on every worker, and those of the host's sum.
    ///
    /// # Errors
    /// [`Error::Worker`](crate::Error::Worker) or [`Error::Model`](crate::Error::Model) when a worker or a GPU fails. One
    /// that is gone may not be noticed here but in the next [`exchange`](Collective::exchange).
    fn sum_on_gpu(&mut self, gpu: &Gpu, values: &mut ViewMut<'_, f32>) -> Result<()>;
}

/// GPUs, one for each worker, that hand each other numbers.
pub trait DeviceGroup: fmt::Debug + Send {
    /// Puts each worker's numbers, as many of each, into its place of everybody's `all`, in the order of ranks.
    ///
    /// # Errors
    /// [`Error::Worker`](crate::Error::Worker) or [`Error::Model`](crate::Error::Model) when a worker or a GPU fails.
    fn all_gather(
        &mut self,
        gpu: &Gpu,
        mine: View<'_, f32>,
        all: &mut ViewMut<'_, f32>,
    ) -> Result<()>;
}

/// Workers that talk through one collective and add up gradients through their GPUs.
#[derive(Debug)]
pub struct DeviceCollective<C, G> {
    host: C,
    group: G,
}

impl<C: Collective, G: DeviceGroup> DeviceCollective<C, G> {
    /// Both are of the same workers in the same order.
    pub fn new(host: C, group: G) -> Self {
        Self { host, group }
    }
}

impl<C: Collective, G: DeviceGroup> Collective for DeviceCollective<C, G> {
    fn rank(&self) -> usize {
        self.host.rank()
    }
    fn num_workers(&self) -> usize {
        self.host.num_workers()
    }
    fn exchange(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.host.exchange(mine)
    }
    fn sum(&mut self, values: &mut [f32]) -> Result<()> {
        self.host.sum(values)
    }
    fn on_gpu(&mut self) -> Option<&mut dyn GpuCollective> {
        Some(self)
    }
}

impl<C: Collective, G: DeviceGroup> GpuCollective for DeviceCollective<C, G> {
    /// Everybody gathers everything and adds it up, some of it at a time, in no more memory than the values take.
    fn sum_on_gpu(&mut self, gpu: &Gpu, values: &mut ViewMut<'_, f32>) -> Result<()> {
        let (len, workers) = (values.len(), self.num_workers());
        let piece = (len.min(MOST_GATHERED / size_of::<f32>()) / workers).max(1);
        let mut all = gpu
            .alloc::<f32>(workers * piece)
            .map_err(ModelError::from)?;
        for start in (0..len).step_by(piece) {
            let count = piece.min(len - start);
            let own = values.reborrow().part(start..start + count);
            let mut all = all.view_mut().part(0..workers * count);
            self.group.all_gather(gpu, own.as_view(), &mut all)?;
            let gathered = updraft_kernels::cuda::Mat::new(all.as_view(), workers, count);
            gathered::sum(gpu, gathered, &own).map_err(ModelError::from)?;
        }
        Ok(())
    }
}
