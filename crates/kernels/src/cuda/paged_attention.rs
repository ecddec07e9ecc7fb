//! Attention over pages on a GPU, and writing to them; see [`crate::paged_attention`] and [`crate::kv_scatter`].

use super::launch::{Arguments, Kernel, width};
use super::memory::Number;
use super::{Buffer, Gpu, Mat, MatMut, Result, View, ViewMut};
use crate::attention::Heads;
use crate::paged_attention::Sequences as HostSequences;

const THREADS: u32 = 128;
/// The largest head dim.
const MAX_HEAD_DIM: usize = 256;
/// Tokens of a part at least: fewer do not pay for putting parts together.
const MIN_PART: usize = 256;
/// Parts of a context at most.
const MAX_PARTS: usize = 32;
/// Blocks that keep a large GPU busy.
const BUSY: usize = 512;

/// Copies row `t` to slot `slots[t]` of the pages. Slots are the caller's promise to lie in them.
///
/// # Shapes
/// `rows: [T, H_kv · D]`, `slots: [T]` → `pages: [num_blocks, block_size, H_kv, D]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree.
pub fn kv_scatter<T: Number>(
    gpu: &Gpu,
    rows: Mat<'_, T>,
    slots: View<'_, u32>,
    pages: &ViewMut<'_, T>,
) -> Result<()> {
    let (tokens, cols) = (rows.num_rows(), rows.num_cols());
    assert_eq!(slots.len(), tokens, "one slot for each token");
    assert_eq!(pages.len() % cols, 0, "whole slots");
    let wide = width::<T>([rows.is_aligned(), pages.address().is_multiple_of(16)]);
    let arguments = Arguments::new()
        .mat(rows)
        .view(slots)
        .int(cols)
        .long(rows.stride())
        .out(pages);
    let kernel = Kernel::wide::<T>("paged_attention", "kv_scatter", wide);
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel.piece_each(tokens, cols / wide), arguments) }
}

/// The sequences of a batch on the device, as rows with their contexts.
#[derive(Debug)]
pub struct Sequences {
    tables: Buffer<u32>,
    /// As `Context` in `paged_attention.cu`.
    contexts: Buffer<[u32; 2]>,
    longest: usize,
}

impl Sequences {
    /// Copies block tables to the device. Blocks are the caller's promise to lie in the pages.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](super::Error::OutOfMemory), [`Error::Driver`](super::Error::Driver).
    ///
    /// # Panics
    /// If the lists contradict each other or a table is too short.
    pub fn new(gpu: &Gpu, sequences: &HostSequences<'_>, block_size: usize) -> Result<Self> {
        let (mut tables, mut contexts, mut longest) = (Vec::new(), Vec::new(), 0);
        for (s, table) in sequences.block_tables.iter().enumerate() {
            let rows = sequences.seq_starts[s + 1] - sequences.seq_starts[s];
            let len = sequences.context_lens[s];
            assert!(len >= rows, "the context includes the queries");
            assert!(
                table.len() * block_size >= len as usize,
                "a block table of the whole context"
            );
            let first = u32::try_from(tables.len()).expect("fewer than 2³² blocks");
            contexts.extend((0..rows).map(|row| [first, len - rows + row + 1]));
            tables.extend_from_slice(table);
            longest = longest.max(len as usize);
        }
        Ok(Self {
            tables: gpu.upload(&tables)?,
            contexts: gpu.upload(&contexts)?,
            longest,
        })
    }

    /// Parts of each context, and tokens of a part: more parts for few rows, whole warps of keys.
    fn parts(&self, heads: usize) -> (usize, usize) {
        let blocks = (self.contexts.len() * heads).max(1);
        let parts = (BUSY / blocks).clamp(1, MAX_PARTS);
        let tokens = self.longest.div_ceil(parts).max(MIN_PART).div_ceil(32) * 32;
        (self.longest.div_ceil(tokens).max(1), tokens)
    }
}

/// One layer's page memory.
#[derive(Clone, Copy, Debug)]
pub struct Pages<'a, T> {
    /// `[num_blocks, block_size, H_kv, D]`
    pub keys: View<'a, T>,
    /// `[num_blocks, block_size, H_kv, D]`
    pub values: View<'a, T>,
    /// Tokens in a block, as the sequences were made for.
    pub block_size: usize,
}

/// As [`crate::paged_attention::forward`]. The bits of a row may depend on how many rows there are, through the number
/// of parts.
///
/// # Shapes
/// `q: [T, H · D]` → `out: [T, H · D]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver), [`Error::OutOfMemory`](super::Error::OutOfMemory).
///
/// # Panics
/// If the shapes do not agree or `D` is over 256.
pub fn forward<T: Number>(
    gpu: &Gpu,
    heads: &Heads<f32>,
    sequences: &Sequences,
    pages: &Pages<'_, T>,
    q: Mat<'_, T>,
    out: &MatMut<'_, T>,
) -> Result<()> {
    let (rows, num_heads, head_dim) = (sequences.contexts.len(), heads.num_heads, heads.head_dim);
    assert!(head_dim <= MAX_HEAD_DIM, "a head dim of at most 256");
    let shape = (rows, num_heads * head_dim);
    assert_eq!((q.num_rows(), q.num_cols()), shape, "q's shape");
    assert_eq!(
        (out.num_rows(), out.num_cols()),
        shape,
        "the output's shape"
    );
    assert_eq!(
        pages.keys.len(),
        pages.values.len(),
        "as many keys as values"
    );
    let (num_parts, part_tokens) = sequences.parts(num_heads);
    let units = rows * num_heads * num_parts;
    let parts = gpu.alloc::<f32>(units * 2)?;
    let sums = gpu.alloc::<f32>(units * head_dim)?;
    let arguments = Arguments::new()
        .mat(q)
        .long(q.stride())
        .view(pages.keys)
        .view(pages.values)
        .view(sequences.tables.view())
        .view(sequences.contexts.view())
        .int(pages.block_size)
        .int(num_heads)
        .int(heads.group())
        .int(head_dim)
        .int(part_tokens)
        .float(heads.scale)
        .view(parts.view())
        .view(sums.view());
    let kernel = Kernel::of::<T>("paged_attention", "paged_attention_partial");
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe {
        gpu.launch(
            &kernel.grid([rows, num_heads, num_parts], THREADS),
            arguments,
        )?;
    };
    let arguments = Arguments::new()
        .view(parts.view())
        .view(sums.view())
        .int(num_parts)
        .int(num_heads)
        .int(head_dim)
        .out_mat(out)
        .long(out.stride());
    let kernel = Kernel::of::<T>("paged_attention", "paged_attention_combine");
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel.grid([rows, num_heads, 1], THREADS), arguments) }
}
