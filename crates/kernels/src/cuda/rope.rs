//! Rotary position embedding on a GPU; see [`crate::rope`].

use super::launch::{Arguments, Kernel, width};
use super::memory::Number;
use super::{Buffer, Gpu, MatMut, Result, View, ViewMut};
use crate::attention::Heads;

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

/// Where the keys and values of new tokens go: [`paged_attention`](super::paged_attention)'s pages of one layer.
#[derive(Debug)]
pub struct NewPages<'a, T> {
    /// The slot of each token, `[T]`; the caller's promise to lie in the pages.
    pub slots: View<'a, u32>,
    /// `[num_blocks, block_size, H_kv, D]`
    pub keys: ViewMut<'a, T>,
    /// `[num_blocks, block_size, H_kv, D]`
    pub values: ViewMut<'a, T>,
}

/// What follows the product that makes queries, keys and values, in one pass: adds the bias, if there is one, turns
/// queries and keys as [`forward`] does, and, where there are pages, writes keys and values there and not back.
///
/// # Shapes
/// `bias: [(H + 2·H_kv) · D]`, `positions: [T]`, `qkv: [T, (H + 2·H_kv) · D]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
pub fn finish_qkv<T: Number>(
    gpu: &Gpu,
    heads: &Heads<f32>,
    table: &Table,
    positions: View<'_, u32>,
    bias: Option<View<'_, T>>,
    qkv: &MatMut<'_, T>,
    pages: Option<&NewPages<'_, T>>,
) -> Result<()> {
    let (rows, half) = (qkv.num_rows(), table.half_dim);
    let all_heads = heads.num_heads + 2 * heads.num_kv_heads;
    assert_eq!(heads.head_dim, 2 * half, "the table's head dim");
    assert_eq!(positions.len(), rows, "one position for each token");
    assert_eq!(qkv.num_cols(), all_heads * 2 * half, "qkv's columns");
    let mut aligned = vec![qkv.is_aligned(), half % T::WIDE == 0];
    if let Some(bias) = bias {
        assert_eq!(bias.len(), qkv.num_cols(), "the bias's length");
        aligned.push(bias.address().is_multiple_of(16));
    }
    if let Some(pages) = pages {
        let kv_width = heads.num_kv_heads * 2 * half;
        assert_eq!(pages.slots.len(), rows, "one slot for each token");
        assert_eq!(pages.keys.len() % kv_width, 0, "whole slots");
        assert_eq!(
            pages.keys.len(),
            pages.values.len(),
            "as many keys as values"
        );
        let views = [&pages.keys, &pages.values];
        aligned.extend(views.map(|view| view.address().is_multiple_of(16)));
    }
    let wide = width::<T>(aligned);
    let base = match pages {
        None => "finish_qkv",
        Some(_) => "finish_qkv_paged",
    };
    let arguments = match bias {
        Some(bias) => Arguments::new().view(bias),
        None => Arguments::new().null(),
    };
    let mut arguments = arguments
        .view(table.cos.view())
        .view(table.sin.view())
        .view(positions)
        .int(half)
        .int(heads.num_heads)
        .int(heads.num_kv_heads)
        .long(qkv.stride())
        .out_mat(qkv);
    if let Some(pages) = pages {
        arguments = arguments
            .view(pages.slots)
            .out(&pages.keys)
            .out(&pages.values);
    }
    let kernel = Kernel::wide::<T>("rope", base, wide);
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel.piece_each(rows, all_heads * half / wide), arguments) }
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
