//! Several workers that train one run together.
//!
//! The steps of a run do not depend on how many workers there are: the micro-batches of a step are dealt out,
//! worker `r` of `W` takes those with `i % W == r`, and gradients and losses are added up in the order of ranks.
//! So every worker holds the same bits, and any number of workers can continue what another number began.

#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
mod gpu;
mod inbox;
mod launch;
mod local;
mod mesh;
#[cfg(feature = "nccl")]
mod nccl;
#[cfg(unix)]
mod processes;
mod tcp;

use std::fmt;

#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
pub use gpu::{DeviceCollective, DeviceGroup, GpuCollective};
pub use launch::Launch;
pub use local::{LocalCollective, local_group};
#[cfg(feature = "nccl")]
pub use nccl::NcclCollective;
#[cfg(unix)]
pub use processes::{Ended, Processes};
pub use tcp::TcpCollective;

use crate::{Error, Result};

/// The longest message of [`Collective::exchange`], in bytes.
pub const MAX_MESSAGE: usize = 64 << 10;

/// One worker's connection to the others.
///
/// All workers call the same methods in the same order; who falls out of step, or away, is an error on all of them,
/// and no later call succeeds.
pub trait Collective: fmt::Debug + Send {
    /// This worker's number, from zero.
    fn rank(&self) -> usize;

    /// How many workers there are.
    fn num_workers(&self) -> usize;

    /// Tells every worker what each has to say: the messages in the order of ranks, one's own among them. A message
    /// has at most [`MAX_MESSAGE`] bytes.
    ///
    /// # Errors
    /// [`Error::Worker`] names a worker that cannot be reached or talks of something else.
    fn exchange(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Replaces the values, as many on each worker, by their sums over all workers, added in the order of ranks: the
    /// same bits on every worker, in every run.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange).
    fn sum(&mut self, values: &mut [f32]) -> Result<()>;

    /// The power to add up what lies on GPUs, where it has that. Where it has not, gradients come to the host for
    /// [`sum`](Self::sum) and go back.
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    fn on_gpu(&mut self) -> Option<&mut dyn GpuCollective> {
        None
    }
}

/// The only worker.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }
    fn num_workers(&self) -> usize {
        1
    }
    fn exchange(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![mine.to_vec()])
    }
    fn sum(&mut self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }
}

/// Lent, so that it outlives who asks, or of whatever kind.
macro_rules! forward {
    ($pointer:ty) => {
        impl<C: Collective + ?Sized> Collective for $pointer {
            fn rank(&self) -> usize {
                (**self).rank()
            }
            fn num_workers(&self) -> usize {
                (**self).num_workers()
            }
            fn exchange(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
                (**self).exchange(mine)
            }
            fn sum(&mut self, values: &mut [f32]) -> Result<()> {
                (**self).sum(values)
            }
            #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
            fn on_gpu(&mut self) -> Option<&mut dyn GpuCollective> {
                (**self).on_gpu()
            }
        }
    };
}
forward!(&mut C);
forward!(Box<C>);

/// What a trainer asks of its workers.
impl dyn Collective + '_ {
    /// Whether the micro-batch at this place of a step is this worker's.
    pub(crate) fn takes(&self, place: usize) -> bool {
        place % self.num_workers() == self.rank()
    }

    /// Whether this worker writes what is written once.
    pub(crate) fn leads(&self) -> bool {
        self.rank() == 0
    }

    /// The sum of one number, in the order of ranks.
    pub(crate) fn sum_f64(&mut self, mine: f64) -> Result<f64> {
        let all = self.exchange(&mine.to_le_bytes())?;
        let numbers: Vec<f64> = all.iter().map(|bytes| number(bytes)).collect();
        Ok(numbers.iter().sum())
    }

    /// The first worker's numbers, on all of them.
    pub(crate) fn of_the_first<const N: usize>(&mut self, mine: [f64; N]) -> Result<[f64; N]> {
        let bytes: Vec<u8> = mine.iter().flat_map(|x| x.to_le_bytes()).collect();
        let all = self.exchange(&bytes)?;
        let first = all[0].as_chunks::<8>().0;
        Ok(std::array::from_fn(|i| {
            first.get(i).map_or(f64::NAN, |bytes| number(bytes))
        }))
    }

    /// Whether any worker says so.
    pub(crate) fn any(&mut self, mine: bool) -> Result<bool> {
        if self.num_workers() == 1 {
            return Ok(mine);
        }
        let all = self.exchange(&[u8::from(mine)])?;
        Ok(all.iter().any(|answer| answer == &[1]))
    }

    /// Checks that all workers mean the same.
    ///
    /// # Errors
    /// [`Error::WorkersDiffer`].
    pub(crate) fn agree(&mut self, what: &'static str, mine: &[u8]) -> Result<()> {
        if self.num_workers() == 1 {
            return Ok(());
        }
        let all = self.exchange(mine)?;
        match all.iter().position(|other| other != &all[0]) {
            Some(rank) => Err(Error::WorkersDiffer { what, rank }),
            None => Ok(()),
        }
    }
}

fn number(bytes: &[u8]) -> f64 {
    bytes.try_into().map_or(f64::NAN, f64::from_le_bytes)
}
