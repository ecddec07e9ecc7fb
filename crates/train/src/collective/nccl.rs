//! Workers whose GPUs NCCL connects.

use updraft_kernels::cuda::nccl::{Communicator, UniqueId};
use updraft_kernels::cuda::{Gpu, View, ViewMut};
use updraft_model::Error as ModelError;

use super::Collective;
use super::gpu::{DeviceCollective, DeviceGroup};
use crate::{Error, Result};

/// Workers whose gradients NCCL gathers and that talk through another collective, such as
/// [`TcpCollective`](super::TcpCollective). NCCL's own sums would be added in an order of its choice: it hands numbers
/// around, and each worker adds them in the order of ranks.
pub type NcclCollective<C> = DeviceCollective<C, Communicator>;

impl<C: Collective> NcclCollective<C> {
    /// Has the GPUs of these workers meet, each of which has one of its own.
    ///
    /// # Errors
    /// [`Error::Model`](crate::Error::Model) where there is no NCCL, or in its words;
    /// [`Error::Worker`](crate::Error::Worker) names a worker that is gone.
    pub fn join(mut host: C, gpu: &Gpu) -> Result<Self> {
        // Each one makes an id, which shows that its NCCL is there: whoever waits for one that has none waits for ever.
        let own = UniqueId::new();
        let told = own.as_ref().map_or(Vec::new(), |id| id.to_bytes().to_vec());
        let all = host.exchange(&told)?;
        own.map_err(ModelError::from)?;
        if let Some(rank) = all.iter().position(Vec::is_empty) {
            let source = std::io::Error::other("its NCCL does not start");
            return Err(Error::Worker { rank, source });
        }
        let id = all[0][..].try_into().map_err(|_| Error::Worker {
            rank: 0,
            source: std::io::Error::other("it sent no id of NCCL's"),
        })?;
        let (rank, num_workers) = (host.rank(), host.num_workers());
        let id = UniqueId::from_bytes(id);
        let group = Communicator::join(gpu, rank, num_workers, id).map_err(ModelError::from)?;
        Ok(Self::new(host, group))
    }
}

impl DeviceGroup for Communicator {
    fn all_gather(
        &mut self,
        _: &Gpu,
        mine: View<'_, f32>,
        all: &mut ViewMut<'_, f32>,
    ) -> Result<()> {
        Ok(Communicator::all_gather(self, mine, all).map_err(ModelError::from)?)
    }
}
