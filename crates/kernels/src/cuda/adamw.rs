//! Clipping and AdamW over all trained tensors at once on a GPU; see [`crate::adamw`] and [`crate::clip`].

use super::launch::{Arguments, Kernel};
use super::memory::ViewMut;
use super::{Buffer, Gpu, Result, View};
use crate::adamw::AdamW;

/// Numbers of a chunk, as in `adamw.cu`.
const CHUNK: usize = 4096;
const THREADS: u32 = 256;

/// One trained tensor with its gradient and moments, all in f32.
#[derive(Debug)]
pub struct Trained<'a> {
    /// The parameter.
    pub param: ViewMut<'a, f32>,
    /// Its gradient.
    pub grad: View<'a, f32>,
    /// AdamW's first moment.
    pub exp_avg: ViewMut<'a, f32>,
    /// AdamW's second moment.
    pub exp_avg_sq: ViewMut<'a, f32>,
}

/// Where the tensors of a step lie, on the device.
#[derive(Debug)]
pub struct Tensors<'a> {
    /// As `Tensor` in `adamw.cu`: four addresses and a length each.
    table: Buffer<u64>,
    /// As `Chunk` in `adamw.cu`.
    chunks: Buffer<[u32; 2]>,
    partial: Buffer<f64>,
    /// As `Clip` in `adamw.cu`.
    clip: Buffer<f64>,
    lent: std::marker::PhantomData<&'a mut [f32]>,
}

/// What [`Tensors::clip`] found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// The root of the sum of all squared gradients, loss scaling taken out.
    pub norm: f64,
    /// Whether it is a number. Where it is not, [`Tensors::step`] changes nothing.
    pub is_finite: bool,
}

impl<'a> Tensors<'a> {
    /// Lists tensors on the device.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](super::Error::OutOfMemory), [`Error::Driver`](super::Error::Driver).
    ///
    /// # Panics
    /// If a tensor's lengths differ, one is of another device, or there are 2³² chunks.
    pub fn new(gpu: &Gpu, tensors: &[Trained<'a>]) -> Result<Self> {
        let (mut table, mut chunks) = (Vec::new(), Vec::new());
        for (index, tensor) in tensors.iter().enumerate() {
            let len = tensor.param.len();
            let others = [
                tensor.grad.len(),
                tensor.exp_avg.len(),
                tensor.exp_avg_sq.len(),
            ];
            assert_eq!(others, [len; 3], "the parameter's length");
            for view in [&tensor.param, &tensor.exp_avg, &tensor.exp_avg_sq] {
                view.as_view().check(gpu);
            }
            tensor.grad.check(gpu);
            table.extend([
                tensor.param.address(),
                tensor.grad.address(),
                tensor.exp_avg.address(),
                tensor.exp_avg_sq.address(),
                len as u64,
            ]);
            let number = |number: usize| u32::try_from(number).expect("less than 2³² chunks");
            chunks.extend((0..len.div_ceil(CHUNK)).map(|chunk| [number(index), number(chunk)]));
        }
        Ok(Self {
            table: gpu.upload(&table)?,
            partial: gpu.alloc(chunks.len())?,
            chunks: gpu.upload(&chunks)?,
            clip: gpu.alloc(2)?,
            lent: std::marker::PhantomData,
        })
    }

    /// Finds the norm of all gradients and what [`step`](Self::step) is to multiply them with: `unscale`, which takes
    /// loss scaling out, and clipping to `max_norm` unless that is 0 or less.
    ///
    /// # Errors
    /// [`Error::Driver`](super::Error::Driver).
    pub fn clip(&mut self, gpu: &Gpu, unscale: f64, max_norm: f64) -> Result<()> {
        let chunks = self.chunks.len();
        let sums = Arguments::new()
            .view(self.table.view())
            .view(self.chunks.view())
            .out(&self.partial.view_mut());
        let sum = Kernel::named("adamw", "adamw_sum_of_squares".to_owned());
        // SAFETY: the kernel's parameters; the table holds what `new` checked, lent for as long as this lives.
        unsafe { gpu.launch(&sum.grid([chunks, 1, 1], THREADS), sums)? };
        let arguments = Arguments::new()
            .view(self.partial.view())
            .int(chunks)
            .double(unscale)
            .double(max_norm)
            .out(&self.clip.view_mut());
        let clip = Kernel::named("adamw", "adamw_clip".to_owned());
        // SAFETY: the kernel's parameters.
        unsafe { gpu.launch(&clip.grid([1, 1, 1], THREADS), arguments) }
    }

    /// What [`clip`](Self::clip) found; waits for it.
    ///
    /// # Errors
    /// [`Error::Driver`](super::Error::Driver).
    pub fn norm(&self, gpu: &Gpu) -> Result<Norm> {
        let clip = gpu.download(self.clip.view())?;
        let is_finite = (clip[1].to_bits() >> 32) != 0;
        Ok(Norm {
            norm: clip[0],
            is_finite,
        })
    }

    /// As [`AdamW::step`] for every tensor, with the gradients as [`clip`](Self::clip) said; changes nothing where their
    /// norm is no number.
    ///
    /// # Errors
    /// [`Error::Driver`](super::Error::Driver).
    pub fn step(&mut self, gpu: &Gpu, adamw: &AdamW, step: u64) -> Result<()> {
        let chunks = self.chunks.len();
        let arguments = Arguments::new()
            .view(self.table.view())
            .view(self.chunks.view())
            .view(self.clip.view())
            .floats(adamw.factors(step));
        let kernel = Kernel::named("adamw", "adamw_step".to_owned());
        // SAFETY: the kernel's parameters; the table holds what `new` checked, lent for as long as this lives.
        unsafe { gpu.launch(&kernel.grid([chunks, 1, 1], THREADS), arguments) }
    }
}
