//! Clipping and AdamW over all trained tensors at once on a GPU; see [`crate::adamw`] and [`crate::clip`].

use std::ops::Range;

use super::launch::{Arguments, Kernel};
use super::memory::ViewMut;
use super::{Buffer, Gpu, Result, View};
use crate::adamw::AdamW;

/// Numbers of a chunk, at most: a block goes through one.
const CHUNK: usize = 4096;
const THREADS: u32 = 256;
/// Groups of tensors with a learning rate and a weight decay of their own, at most; as in `adamw.cu`.
pub const MAX_GROUPS: usize = 4;

/// One trained tensor of flat buffers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trained {
    /// Its elements.
    pub range: Range<usize>,
    /// Which of a step's groups it belongs to.
    pub group: usize,
}

/// What a step reads and changes: flat buffers of one layout, all in f32.
#[derive(Debug)]
pub struct Flat<'a> {
    /// The parameters.
    pub param: ViewMut<'a, f32>,
    /// Their gradients.
    pub grad: View<'a, f32>,
    /// AdamW's first moments.
    pub exp_avg: ViewMut<'a, f32>,
    /// AdamW's second moments.
    pub exp_avg_sq: ViewMut<'a, f32>,
}

/// How the flat buffers of trained tensors are divided, on the device.
#[derive(Debug)]
pub struct Tensors {
    /// As `Chunk` in `adamw.cu`: the first element; how many, and the group.
    chunks: Buffer<[u32; 4]>,
    partial: Buffer<f64>,
    /// As `Clip` in `adamw.cu`.
    clip: Buffer<f64>,
    /// Length of the flat buffers.
    len: usize,
    num_groups: usize,
}

/// What [`Tensors::clip`] found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// The root of the sum of all squared gradients, loss scaling taken out.
    pub norm: f64,
    /// Whether it is a number. Where it is not, [`Tensors::step`] changes nothing.
    pub is_finite: bool,
}

impl Tensors {
    /// Lists tensors of buffers of `len` numbers on the device.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](super::Error::OutOfMemory), [`Error::Driver`](super::Error::Driver).
    ///
    /// # Panics
    /// If tensors overlap or come in another order than in the buffers, one ends behind them, or there are more than
    /// [`MAX_GROUPS`].
    pub fn new(gpu: &Gpu, tensors: &[Trained], len: usize) -> Result<Self> {
        let (mut chunks, mut end) = (Vec::new(), 0);
        for Trained { range, group } in tensors {
            assert!(end <= range.start, "tensors in the order of the buffers");
            assert!(range.end <= len, "tensors within the buffers");
            assert!(*group < MAX_GROUPS, "at most {MAX_GROUPS} groups");
            end = range.end;
            for start in range.clone().step_by(CHUNK) {
                let (low, high) = (start as u32, (start as u64 >> 32) as u32);
                let numbers = CHUNK.min(range.end - start);
                chunks.push([low, high, numbers as u32, *group as u32]);
            }
        }
        let groups = tensors.iter().map(|tensor| tensor.group + 1);
        Ok(Self {
            partial: gpu.alloc(chunks.len())?,
            chunks: gpu.upload(&chunks)?,
            clip: gpu.alloc(2)?,
            len,
            num_groups: groups.max().unwrap_or(0),
        })
    }

    /// Finds the norm of all gradients and what [`step`](Self::step) is to multiply them with: `unscale`, which takes
    /// loss scaling out, and clipping to `max_norm` unless that is 0 or less.
    ///
    /// # Errors
    /// [`Error::Driver`](super::Error::Driver).
    ///
    /// # Panics
    /// If the gradients are not as many numbers as the tensors' buffers.
    pub fn clip(
        &mut self,
        gpu: &Gpu,
        grad: View<'_, f32>,
        unscale: f64,
        max_norm: f64,
    ) -> Result<()> {
        assert_eq!(grad.len(), self.len, "the tensors' gradients");
        let chunks = self.chunks.len();
        let sums = Arguments::new()
            .view(grad)
            .view(self.chunks.view())
            .out(&self.partial.view_mut());
        let sum = Kernel::named("adamw", "adamw_sum_of_squares".to_owned());
        // SAFETY: the kernel's parameters; the chunks are parts of `len` numbers.
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

    /// As [`AdamW::step`] for every tensor, by the rule of its group, with the gradients as [`clip`](Self::clip) said;
    /// changes nothing where their norm is no number.
    ///
    /// # Errors
    /// [`Error::Driver`](super::Error::Driver).
    ///
    /// # Panics
    /// If there is no rule for each group, rules differ in more than learning rate and weight decay, or a buffer has
    /// another length than the tensors' buffers.
    pub fn step(&mut self, gpu: &Gpu, rules: &[AdamW], step: u64, flat: &Flat<'_>) -> Result<()> {
        assert!(
            rules.len() >= self.num_groups && rules.len() <= MAX_GROUPS,
            "a rule for each group"
        );
        let lengths = [
            flat.param.len(),
            flat.grad.len(),
            flat.exp_avg.len(),
            flat.exp_avg_sq.len(),
        ];
        assert_eq!(lengths, [self.len; 4], "the tensors' buffers");
        let Some((first, others)) = rules.split_first() else {
            return Ok(()); // no tensors
        };
        let (shared, own) = first.factors(step);
        // As `Groups` in `adamw.cu`.
        let mut groups = [0.0; 2 * MAX_GROUPS];
        (groups[0], groups[MAX_GROUPS]) = (own[0], own[1]);
        for (group, rule) in (1..).zip(others) {
            let (same, own) = rule.factors(step);
            assert_eq!(same, shared, "rules that differ in learning rate and decay");
            (groups[group], groups[MAX_GROUPS + group]) = (own[0], own[1]);
        }
        let arguments = Arguments::new()
            .view(self.chunks.view())
            .view(self.clip.view())
            .floats(shared)
            .floats(groups)
            .view(flat.grad)
            .out(&flat.param)
            .out(&flat.exp_avg)
            .out(&flat.exp_avg_sq);
        let kernel = Kernel::named("adamw", "adamw_step".to_owned());
        // SAFETY: the kernel's parameters; the chunks are parts of `len` numbers, and of no more groups than rules.
        unsafe { gpu.launch(&kernel.grid([self.chunks.len(), 1, 1], THREADS), arguments) }
    }
}
