//! Attention over pages on a GPU, and writing to them; see [`crate::paged_attention`] and [`crate::kv_scatter`].
//!
//! A sequence with at least 16 new tokens goes to tensor cores in tiles of 64, where they know the numbers (f16 on `sm_75`
//! and later, bf16 on `sm_80` and later), the head dim is 64 or 128, and a block's tokens are a power of 2. Everything
//! else goes token by token, each context in parts that different blocks of threads take.

use super::launch::{Arguments, Kernel, width};
use super::memory::Number;
use super::{Buffer, Gpu, Mat, MatMut, Result, View, ViewMut};
use crate::attention::Heads;
use crate::paged_attention::Sequences as HostSequences;

const THREADS: u32 = 128;
/// New tokens of a tile, as in `paged_prefill.cu`.
const TILE: usize = 64;
/// New tokens of a sequence that are worth a tile.
const MIN_TILE: usize = 16;
/// The largest head dim.
const MAX_HEAD_DIM: usize = 256;
/// Tokens of a part: whole turns of a block's warps, and so many at least that putting parts together pays.
const PART: usize = 128;
/// Parts of a context at most.
const MAX_PARTS: usize = 64;
/// Blocks that keep a large GPU busy.
const BUSY: usize = 528;
/// Words of a `Token` in `paged_attention.cu` and of a `Chunk` in `paged_prefill.cu`.
const TOKEN_WORDS: usize = 3;
const CHUNK_WORDS: usize = 4;

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

/// The sequences of a batch on the device: each new token with its context, and tiles of those that are many.
#[derive(Debug)]
pub struct Sequences {
    /// The tokens, those of sequences with few new ones first; then the tiles; then the block tables.
    words: Buffer<u32>,
    /// Of sequences with few new ones, and of all.
    num_tokens: [usize; 2],
    num_tiles: usize,
    /// The longest context of sequences with few new tokens, and of all.
    longest: [usize; 2],
    block_size: usize,
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
        let (mut few, mut many, mut tiles, mut tables) = (vec![], vec![], vec![], vec![]);
        let mut longest = [0; 2];
        for (s, table) in sequences.block_tables.iter().enumerate() {
            let (start, end) = (sequences.seq_starts[s], sequences.seq_starts[s + 1]);
            let len = sequences.context_lens[s];
            assert!(len >= end - start, "the context includes the queries");
            assert!(
                table.len() * block_size >= len as usize,
                "a block table of the whole context"
            );
            let first_block = u32::try_from(tables.len()).expect("fewer than 2³² blocks");
            let position = |row: u32| len - (end - row);
            let tokens = (start..end).map(|row| [first_block, position(row) + 1, row]);
            longest[1] = longest[1].max(len as usize);
            if ((end - start) as usize) < MIN_TILE {
                few.extend(tokens);
                longest[0] = longest[0].max(len as usize);
            } else {
                many.extend(tokens);
                let firsts = (start..end).step_by(TILE);
                tiles.extend(firsts.map(|row| [row, position(row), len, first_block]));
            }
            tables.extend_from_slice(table);
        }
        // The longest walks first, so that none of them starts when all others have ended.
        tiles.sort_by_key(|&[_, position, ..]| std::cmp::Reverse(position));
        let (num_few, num_tiles) = (few.len(), tiles.len());
        few.append(&mut many);
        let mut words = few.concat();
        words.extend(tiles.concat());
        words.append(&mut tables);
        Ok(Self {
            words: gpu.upload(&words)?,
            num_tokens: [num_few, few.len()],
            num_tiles,
            longest,
            block_size,
        })
    }

    fn num_rows(&self) -> usize {
        self.num_tokens[1]
    }

    fn tokens(&self) -> View<'_, u32> {
        self.words.view().part(0..self.num_rows() * TOKEN_WORDS)
    }

    fn tiles(&self) -> View<'_, u32> {
        let start = self.num_rows() * TOKEN_WORDS;
        let len = self.num_tiles * CHUNK_WORDS;
        self.words.view().part(start..start + len)
    }

    fn tables(&self) -> View<'_, u32> {
        let start = self.num_rows() * TOKEN_WORDS + self.num_tiles * CHUNK_WORDS;
        self.words.view().part(start..self.words.len())
    }
}

/// Parts of each context, and tokens of a part: more parts for fewer blocks.
fn parts(blocks: usize, longest: usize) -> (usize, usize) {
    let most = (BUSY / blocks.max(1)).clamp(1, MAX_PARTS);
    let tokens = longest.div_ceil(most).next_multiple_of(PART).max(PART);
    (longest.div_ceil(tokens).max(1), tokens)
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

/// As [`crate::paged_attention::forward`]. The same batch gives the same bits every time; those of a row may depend on how
/// many rows there are, and on how many are of its sequence.
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
    let (rows, head_dim) = (sequences.num_rows(), heads.head_dim);
    assert!(head_dim <= MAX_HEAD_DIM, "a head dim of at most 256");
    let shape = (rows, heads.num_heads * head_dim);
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
    assert_eq!(
        pages.block_size, sequences.block_size,
        "the tokens of a block"
    );
    let call = Call {
        gpu,
        heads,
        sequences,
        pages,
        q,
        out,
    };
    if call.fits_tensor_cores() {
        call.tiles()?;
        call.tokens(sequences.num_tokens[0], sequences.longest[0])
    } else {
        call.tokens(rows, sequences.longest[1])
    }
}

/// What [`forward`] was given.
struct Call<'a, T> {
    gpu: &'a Gpu,
    heads: &'a Heads<f32>,
    sequences: &'a Sequences,
    pages: &'a Pages<'a, T>,
    q: Mat<'a, T>,
    out: &'a MatMut<'a, T>,
}

impl<T: Number> Call<'_, T> {
    fn pages_are_aligned(&self) -> bool {
        let Pages { keys, values, .. } = self.pages;
        let is_aligned = |address: u64| address.is_multiple_of(16);
        is_aligned(keys.address())
            && is_aligned(values.address())
            && self.heads.head_dim.is_multiple_of(T::WIDE)
    }

    fn fits_tensor_cores(&self) -> bool {
        self.gpu.has_tensor_cores_for::<T>()
            && matches!(self.heads.head_dim, 64 | 128)
            && self.pages.block_size.is_power_of_two()
            && self.pages_are_aligned()
            && self.q.is_aligned()
            && self.out.is_aligned()
    }

    fn inputs(&self) -> Arguments {
        Arguments::new()
            .mat(self.q)
            .long(self.q.stride())
            .view(self.pages.keys)
            .view(self.pages.values)
            .view(self.sequences.tables())
    }

    /// Sequences with many new tokens.
    fn tiles(&self) -> Result<()> {
        let Self { heads, .. } = self;
        let arguments = self
            .inputs()
            .view(self.sequences.tiles())
            .int(self.pages.block_size.trailing_zeros() as usize)
            .int(heads.num_heads)
            .int(heads.group())
            .float(heads.scale)
            .out_mat(self.out)
            .long(self.out.stride());
        let name = format!("paged_prefill_{}_d{}", T::NAME, heads.head_dim);
        let grid = [self.sequences.num_tiles * heads.num_heads, 1, 1];
        let kernel = Kernel::named("paged_prefill", name).grid(grid, THREADS);
        // SAFETY: the kernel's parameters, with the shapes just compared.
        unsafe { self.gpu.launch(&kernel, arguments) }
    }

    /// The first `num` tokens, whose contexts are no longer than `longest`.
    fn tokens(&self, num: usize, longest: usize) -> Result<()> {
        let Heads {
            num_heads,
            num_kv_heads,
            head_dim,
            scale,
        } = *self.heads;
        if num == 0 {
            return Ok(());
        }
        let group = self.heads.group();
        let wide = width::<T>([self.pages_are_aligned()]);
        let heads_at_once = match group {
            _ if wide == 1 => 1,
            1 => 1,
            2..=4 => 4,
            _ => 8,
        };
        let columns = num_kv_heads * group.div_ceil(heads_at_once);
        let (num_parts, part_tokens) = parts(num * columns, longest);
        let units = match num_parts {
            1 => 0, // the kernel writes the output
            _ => num * num_heads * num_parts,
        };
        let scratch = self.gpu.alloc::<f32>(units * (2 + head_dim))?;
        let parts = scratch.view().part(0..units * 2);
        let sums = scratch.view().part(units * 2..scratch.len());
        let arguments = self
            .inputs()
            .view(self.sequences.tokens())
            .int(self.pages.block_size)
            .int(num_heads)
            .int(group)
            .int(head_dim)
            .int(head_dim.div_ceil(wide).next_power_of_two().min(32))
            .int(part_tokens)
            .float(scale)
            .view(parts)
            .view(sums)
            .out_mat(self.out)
            .long(self.out.stride());
        let base = format!("paged_attention_decode_h{heads_at_once}");
        let kernel = Kernel::wide::<T>("paged_attention", &base, wide);
        // SAFETY: the kernel's parameters, with the shapes just compared.
        unsafe {
            self.gpu
                .launch(&kernel.grid([num, columns, num_parts], THREADS), arguments)?;
        };
        if num_parts == 1 {
            return Ok(());
        }
        let arguments = Arguments::new()
            .view(self.sequences.tokens())
            .view(parts)
            .view(sums)
            .int(num_parts)
            .int(num_heads)
            .int(head_dim)
            .out_mat(self.out)
            .long(self.out.stride());
        let kernel = Kernel::of::<T>("paged_attention", "paged_attention_combine");
        // SAFETY: the kernel's parameters, with the shapes just compared.
        unsafe {
            self.gpu
                .launch(&kernel.grid([num, num_heads, 1], THREADS), arguments)
        }
    }
}

#[cfg(all(test, feature = "cuda-emulator"))]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn tiles_are_taken_where_tensor_cores_know_the_numbers_and_blocks_are_found_by_shifts() {
        fn fits<T: Number>(capability: u32, head_dim: usize, block_size: usize) -> bool {
            let gpu = Gpu::emulated_as(capability);
            let heads = Heads {
                num_heads: 1,
                num_kv_heads: 1,
                head_dim,
                scale: 1.0,
            };
            let host = HostSequences {
                seq_starts: &[0, 1],
                context_lens: &[1],
                block_tables: &[vec![0]],
            };
            let sequences = Sequences::new(&gpu, &host, block_size).expect("memory");
            let pages = gpu.zeros::<T>(2 * block_size * head_dim).expect("memory");
            let mut rows = gpu.zeros::<T>(2 * head_dim).expect("memory");
            let (q, out) = rows.mat_mut(1, 2 * head_dim).split_cols(head_dim);
            let half = block_size * head_dim;
            let call = Call {
                gpu: &gpu,
                heads: &heads,
                sequences: &sequences,
                pages: &Pages {
                    keys: pages.view().part(0..half),
                    values: pages.view().part(half..2 * half),
                    block_size,
                },
                q: q.as_mat(),
                out: &out,
            };
            call.fits_tensor_cores()
        }
        assert!(fits::<f16>(75, 64, 16));
        assert!(fits::<bf16>(80, 128, 1));
        assert!(fits::<bf16>(90, 64, 256));
        assert!(!fits::<bf16>(75, 64, 16));
        assert!(!fits::<f32>(90, 64, 16));
        assert!(!fits::<f16>(90, 96, 16));
        assert!(!fits::<f16>(90, 64, 24));
    }

    #[test]
    fn few_rows_are_cut_into_many_parts_and_many_into_one() {
        assert_eq!(parts(2, 32), (1, 128));
        assert_eq!(parts(2, 4096), (32, 128));
        assert_eq!(parts(2, 100_000), (61, 1664)); // of 64 at most, in whole turns
        assert_eq!(parts(264, 1000), (2, 512));
        assert_eq!(parts(1000, 1000), (1, 1024));
        assert_eq!(parts(0, 0), (1, 128));
    }
}
