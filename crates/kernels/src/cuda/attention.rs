//! Causal attention over packed sequences on a GPU; see [`crate::attention`].
//!
//! Head dims 64 and 128 go to tensor cores, in f16 on `sm_75` and later, in bf16 on `sm_80` and later; everything else takes
//! a simpler way.

use std::cmp::Reverse;

use super::launch::{Arguments, Kernel};
use super::memory::Number;
use super::{Buffer, Gpu, Mat, MatMut, Result, View, ViewMut};
use crate::attention::Heads;

/// Rows of a tile, threads of a block: as in the kernels.
const TILE: usize = 64;
const THREADS: u32 = 128;
const WARPS: usize = 4;
/// The largest head dim.
const MAX_HEAD_DIM: usize = 256;

/// The sequences of a packed batch on the device, cut into tiles.
#[derive(Debug)]
pub struct Sequences {
    /// A tile's sequence and its first row: start, end, first. Once for what walks back from a tile, over the keys that
    /// its queries see, and once for what walks on, over the queries that see its keys: each time the longest walks
    /// first, so that none of them starts when all others have ended.
    tiles: Buffer<[i32; 3]>,
    num_tokens: usize,
}

impl Sequences {
    /// Sequence `s` is the tokens `seq_starts[s]..seq_starts[s + 1]`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](super::Error::OutOfMemory), [`Error::Driver`](super::Error::Driver).
    ///
    /// # Panics
    /// If `seq_starts` does not rise from 0.
    pub fn new(gpu: &Gpu, seq_starts: &[u32]) -> Result<Self> {
        assert_eq!(
            seq_starts.first(),
            Some(&0),
            "the first sequence starts at 0"
        );
        Ok(Self {
            tiles: gpu.upload(&tiles(seq_starts))?,
            num_tokens: seq_starts[seq_starts.len() - 1] as usize,
        })
    }

    fn num_tiles(&self) -> usize {
        self.tiles.len() / 2
    }

    fn tiles(&self, walk: Walk) -> View<'_, [i32; 3]> {
        let first = match walk {
            Walk::Back => 0,
            Walk::On => self.num_tiles(),
        };
        self.tiles.view().part(first..first + self.num_tiles())
    }
}

/// Which way a tile's block goes through its sequence.
#[derive(Clone, Copy, Debug)]
enum Walk {
    /// From the sequence's start to the tile.
    Back,
    /// From the tile to the sequence's end.
    On,
}

/// The list for [`Walk::Back`], behind it that for [`Walk::On`].
fn tiles(seq_starts: &[u32]) -> Vec<[i32; 3]> {
    let number = |row: usize| i32::try_from(row).expect("fewer than 2³¹ tokens");
    let mut back = Vec::new();
    for ends in seq_starts.windows(2) {
        let (start, end) = (ends[0] as usize, ends[1] as usize);
        assert!(start <= end, "sequences follow each other");
        let firsts = (start..end).step_by(TILE);
        back.extend(firsts.map(|first| [number(start), number(end), number(first)]));
    }
    let mut on = back.clone();
    // Stable: the same every time.
    back.sort_by_key(|&[start, _, first]| Reverse(first - start));
    on.sort_by_key(|&[_, end, first]| Reverse(end - first));
    back.append(&mut on);
    back
}

/// What attention reads, after the rotary embedding; see [`crate::attention::Qkv`].
#[derive(Clone, Copy, Debug)]
pub struct Qkv<'a, T> {
    /// `[T, H · D]`
    pub q: Mat<'a, T>,
    /// `[T, H_kv · D]`
    pub k: Mat<'a, T>,
    /// `[T, H_kv · D]`, its rows as far apart as those of `k`
    pub v: Mat<'a, T>,
}

/// What the backward pass needs of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a, T> {
    /// The output, `[T, H · D]`.
    pub out: Mat<'a, T>,
    /// The log-sum-exp of the scaled scores, `[T, H]`.
    pub lse: View<'a, f32>,
}

/// The gradients of [`Qkv`], overwritten.
#[derive(Debug)]
pub struct QkvGrads<'a, T> {
    /// `[T, H · D]`
    pub dq: MatMut<'a, T>,
    /// `[T, H_kv · D]`
    pub dk: MatMut<'a, T>,
    /// `[T, H_kv · D]`, its rows as far apart as those of `dk`
    pub dv: MatMut<'a, T>,
}

/// As [`crate::attention::forward`].
///
/// # Shapes
/// `q: [T, H · D]`, `k`, `v: [T, H_kv · D]` → `out: [T, H · D]`, `lse: [T, H]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes do not agree or `D` is over 256.
pub fn forward<T: Number>(
    gpu: &Gpu,
    heads: &Heads<f32>,
    sequences: &Sequences,
    qkv: Qkv<'_, T>,
    out: &MatMut<'_, T>,
    lse: &ViewMut<'_, f32>,
) -> Result<()> {
    check(heads, sequences, &qkv, out.as_mat(), lse.len());
    let path = Path::of(gpu, heads, &qkv, &[out.as_mat()]);
    let kernel = path.kernel::<T>(heads, "forward");
    let arguments = inputs(&qkv)
        .view(sequences.tiles(Walk::Back))
        .int(heads.num_heads)
        .int(heads.group());
    let arguments = path
        .head_dim(arguments, heads)
        .float(heads.scale)
        .out_mat(out)
        .long(out.stride())
        .out(lse);
    let grid = [sequences.num_tiles() * heads.num_heads, 1, 1];
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel.grid(grid, THREADS), arguments) }
}

/// As [`crate::attention::backward`].
///
/// # Shapes
/// as [`forward`]; `dout: [T, H · D]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver), [`Error::OutOfMemory`](super::Error::OutOfMemory).
///
/// # Panics
/// If the shapes do not agree or `D` is over 256.
pub fn backward<T: Number>(
    gpu: &Gpu,
    heads: &Heads<f32>,
    sequences: &Sequences,
    qkv: Qkv<'_, T>,
    saved: Saved<'_, T>,
    dout: Mat<'_, T>,
    grads: &QkvGrads<'_, T>,
) -> Result<()> {
    check(heads, sequences, &qkv, saved.out, saved.lse.len());
    let shape = |mat: Mat<'_, T>| (mat.num_rows(), mat.num_cols());
    assert_eq!(shape(dout), shape(saved.out), "dout's shape");
    let QkvGrads { dq, dk, dv } = grads;
    assert_eq!(shape(dq.as_mat()), shape(qkv.q), "dq's shape");
    assert_eq!(shape(dk.as_mat()), shape(qkv.k), "dk's shape");
    assert_eq!(shape(dv.as_mat()), shape(qkv.v), "dv's shape");
    assert_eq!(dk.stride(), dv.stride(), "the rows of dk and dv");

    let (rows, num_heads) = (sequences.num_tokens, heads.num_heads);
    let delta = gpu.alloc::<f32>(rows * num_heads)?;
    let arguments = Arguments::new()
        .mat(saved.out)
        .long(saved.out.stride())
        .mat(dout)
        .long(dout.stride())
        .int(rows)
        .int(num_heads)
        .int(heads.head_dim)
        .view(delta.view());
    let kernel = Kernel::of::<T>("attention_simple", "attention_delta");
    let grid = [rows.div_ceil(WARPS), num_heads, 1];
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel.grid(grid, THREADS), arguments)? };

    let outputs = [dout, dq.as_mat(), dk.as_mat(), dv.as_mat()];
    let path = Path::of(gpu, heads, &qkv, &outputs);
    let inputs = |walk: Walk| {
        let arguments = inputs(&qkv)
            .mat(dout)
            .long(dout.stride())
            .view(saved.lse)
            .view(delta.view())
            .view(sequences.tiles(walk))
            .int(num_heads)
            .int(heads.group());
        path.head_dim(arguments, heads).float(heads.scale)
    };
    let shared = path.shared::<T>(gpu, heads);
    let kernel = path.kernel::<T>(heads, "backward_keys").shared(shared);
    let grid = [sequences.num_tiles() * heads.num_kv_heads, 1, 1];
    let arguments = inputs(Walk::On).out_mat(dk).out_mat(dv).long(dk.stride());
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel.grid(grid, THREADS), arguments)? };
    let kernel = path.kernel::<T>(heads, "backward_queries").shared(shared);
    let grid = [sequences.num_tiles() * num_heads, 1, 1];
    let arguments = inputs(Walk::Back).out_mat(dq).long(dq.stride());
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel.grid(grid, THREADS), arguments) }
}

/// Which kernels run.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Path {
    TensorCores,
    Simple,
}

impl Path {
    fn of<T: Number>(
        gpu: &Gpu,
        heads: &Heads<f32>,
        qkv: &Qkv<'_, T>,
        others: &[Mat<'_, T>],
    ) -> Self {
        let mut all = [qkv.q, qkv.k, qkv.v]
            .into_iter()
            .chain(others.iter().copied());
        let fits = gpu.has_tensor_cores_for::<T>()
            && matches!(heads.head_dim, 64 | 128)
            && all.all(|mat| mat.is_aligned());
        if fits {
            Self::TensorCores
        } else {
            Self::Simple
        }
    }

    fn kernel<T: Number>(self, heads: &Heads<f32>, pass: &str) -> Kernel {
        match self {
            Self::TensorCores => {
                let name = format!("attention_{pass}_{}_d{}", T::NAME, heads.head_dim);
                Kernel::named("attention", name)
            }
            Self::Simple => {
                Kernel::of::<T>("attention_simple", &format!("attention_simple_{pass}"))
            }
        }
    }

    /// The simple kernels take the head dim as an argument.
    fn head_dim(self, arguments: Arguments, heads: &Heads<f32>) -> Arguments {
        match self {
            Self::TensorCores => arguments,
            Self::Simple => arguments.int(heads.head_dim),
        }
    }

    /// Bytes of shared memory in the backward pass: two matrices' tiles of the block's own rows and, once or twice, of the
    /// other side's, these with two more numbers in f32 for each row.
    fn shared<T: Number>(self, gpu: &Gpu, heads: &Heads<f32>) -> usize {
        let row = (heads.head_dim + 8) * size_of::<T>();
        let other = if heads.head_dim == 64 { 64 } else { 32 };
        let stages = if gpu.has_async_copies() { 2 } else { 1 };
        match self {
            Self::TensorCores => 2 * TILE * row + stages * 2 * other * (row + size_of::<f32>()),
            Self::Simple => 0,
        }
    }
}

fn inputs<T: Number>(qkv: &Qkv<'_, T>) -> Arguments {
    Arguments::new()
        .mat(qkv.q)
        .mat(qkv.k)
        .mat(qkv.v)
        .long(qkv.q.stride())
        .long(qkv.k.stride())
}

fn check<T>(
    heads: &Heads<f32>,
    sequences: &Sequences,
    qkv: &Qkv<'_, T>,
    out: Mat<'_, T>,
    lse: usize,
) {
    let (rows, width) = (sequences.num_tokens, heads.num_heads * heads.head_dim);
    let kv_width = heads.num_kv_heads * heads.head_dim;
    assert!(heads.head_dim <= MAX_HEAD_DIM, "a head dim of at most 256");
    assert_eq!(
        (qkv.q.num_rows(), qkv.q.num_cols()),
        (rows, width),
        "q's shape"
    );
    assert_eq!(
        (qkv.k.num_rows(), qkv.k.num_cols()),
        (rows, kv_width),
        "k's shape"
    );
    assert_eq!(
        (qkv.v.num_rows(), qkv.v.num_cols()),
        (rows, kv_width),
        "v's shape"
    );
    assert_eq!(qkv.k.stride(), qkv.v.stride(), "the rows of k and v");
    assert_eq!(
        (out.num_rows(), out.num_cols()),
        (rows, width),
        "the output's shape"
    );
    assert_eq!(
        lse,
        rows * heads.num_heads,
        "one log-sum-exp for each row and head"
    );
}

#[cfg(all(test, feature = "cuda-emulator"))]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn the_longest_walks_come_first_whichever_way_they_go() {
        let [one, long] = [[0, 50, 0], [50, 250, 50]];
        let at = |first: i32| [50, 250, first];
        let back = [at(242), at(178), at(114), one, long];
        let on = [long, at(114), at(178), one, at(242)];
        assert_eq!(tiles(&[0, 50, 50, 250]), [back, on].concat());
    }

    /// Two blocks on a multiprocessor of `sm_80`, with the kilobyte that each takes besides; one of `sm_75`.
    #[test]
    fn shared_memory_is_no_more_than_there_is() {
        for (capability, head_dim, most) in [
            (75, 64, 64 << 10),
            (75, 128, 64 << 10),
            (80, 64, (164 << 10) / 2 - 1024),
            (80, 128, (164 << 10) / 2 - 1024),
        ] {
            let heads = Heads {
                num_heads: 1,
                num_kv_heads: 1,
                head_dim,
                scale: 1.0,
            };
            let gpu = Gpu::emulated_as(capability);
            let shared = Path::TensorCores.shared::<f16>(&gpu, &heads);
            assert!(shared <= most, "{shared} bytes of {most}");
            assert_eq!(Path::Simple.shared::<f16>(&gpu, &heads), 0);
        }
    }

    #[test]
    fn tensor_cores_are_taken_where_they_know_the_numbers() {
        fn path<T: Number>(capability: u32, head_dim: usize) -> Path {
            let gpu = Gpu::emulated_as(capability);
            let heads = Heads {
                num_heads: 1,
                num_kv_heads: 1,
                head_dim,
                scale: 1.0,
            };
            let rows = gpu.zeros::<T>(2 * head_dim).expect("memory");
            let (q, k, v) = (
                rows.mat(2, head_dim),
                rows.mat(2, head_dim),
                rows.mat(2, head_dim),
            );
            Path::of(&gpu, &heads, &Qkv { q, k, v }, &[])
        }
        assert_eq!(path::<f16>(75, 64), Path::TensorCores);
        assert_eq!(path::<bf16>(75, 64), Path::Simple);
        assert_eq!(path::<bf16>(80, 128), Path::TensorCores);
        assert_eq!(path::<f16>(90, 96), Path::Simple);
        assert_eq!(path::<f32>(90, 64), Path::Simple);
    }
}
