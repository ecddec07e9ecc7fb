//! Sums over workers of what was gathered from each of them, in the order of the workers.

use super::launch::{Arguments, Kernel};
use super::memory::{Mat, ViewMut};
use super::{Gpu, Result};

const THREADS: u32 = 256;
/// Blocks that keep any GPU busy; each goes on where another one ends.
const MOST_BLOCKS: usize = 4096;

/// `out = Σ gathered[worker]`, added from the first row to the last.
///
/// # Shapes
/// `gathered: [W, N]` without gaps, `out: [N]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver).
///
/// # Panics
/// If the shapes are others, there is no row, or rows have gaps.
pub fn sum(gpu: &Gpu, gathered: Mat<'_, f32>, out: &ViewMut<'_, f32>) -> Result<()> {
    let (workers, len) = (gathered.num_rows(), gathered.num_cols());
    assert!(workers > 0, "a worker's numbers");
    assert_eq!(gathered.stride(), len, "rows without gaps");
    assert_eq!(out.len(), len, "as many sums");
    let blocks = len.div_ceil(THREADS as usize).min(MOST_BLOCKS);
    let arguments = Arguments::new()
        .mat(gathered)
        .int(workers)
        .long(len)
        .out(out);
    let kernel = Kernel::named("gathered", "gathered_sum".to_owned());
    // SAFETY: the kernel's parameters, of the shapes that were just checked.
    unsafe { gpu.launch(&kernel.grid([blocks, 1, 1], THREADS), arguments) }
}
