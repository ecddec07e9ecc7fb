//! Rotary position embedding on a GPU; see [`crate::rope`].

use super::launch::{Arguments, Kernel, width};
use super::memory::Number;
use super::{Buffer, Gpu, MatMut, Result, View};

/// Cosines and sines on the device, in f32 whatever they turn.
#[derive(Debug)]
pub struct Table {
    cos: Buffer<f32>,
    sin: Buffer<f32>,
    half_dim: usize,
}

impl Table {
    /// Copies a table to the device.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](super::Error::OutOfMemory), [`Error::Driver`](super::Error::Driver).
    pub fn new(gpu: &Gpu, table: &crate::rope::Table<f32>) -> Result<Self> {
        let (cos, sin) = table.cos_sin();
        Ok(Self {
            cos: gpu.upload(cos)?,
            sin: gpu.upload(sin)?,
            half_dim: table.head_dim() / 2,
        })
    }
}

/// As [`crate::rope::forward`]. Positions are the caller's promise to lie in the table.
///
/// # Shapes
/// `x: [T, H · D]`, `positions: [T]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
pub fn forward<T: Number>(
    gpu: &Gpu,
    table: &Table,
    positions: View<'_, u32>,
    x: &MatMut<'_, T>,
) -> Result<()> {
    turn(gpu, table, 1.0, positions, x)
}

/// As [`crate::rope::backward`].
///
/// # Shapes
/// `dx: [T, H · D]`, `positions: [T]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
pub fn backward<T: Number>(
    gpu: &Gpu,
    table: &Table,
    positions: View<'_, u32>,
    dx: &MatMut<'_, T>,
) -> Result<()> {
    turn(gpu, table, -1.0, positions, dx)
}

fn turn<T: Number>(
    gpu: &Gpu,
    table: &Table,
    sign: f32,
    positions: View<'_, u32>,
    x: &MatMut<'_, T>,
) -> Result<()> {
    let (rows, half) = (x.num_rows(), table.half_dim);
    assert_eq!(positions.len(), rows, "one position for each token");
    assert_eq!(x.num_cols() % (2 * half), 0, "whole heads");
    let heads = x.num_cols() / (2 * half);
    let wide = width::<T>([x.is_aligned(), half % T::WIDE == 0]);
    let kernel = Kernel::wide::<T>("rope", "rope", wide);
    let arguments = Arguments::new()
        .view(table.cos.view())
        .view(table.sin.view())
        .float(sign)
        .view(positions)
        .int(half)
        .int(heads)
        .long(x.stride())
        .out_mat(x);
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel.piece_each(rows, heads * half / wide), arguments) }
}
