//! One token from each row of logits, chosen where the logits are.
//!
//! The rules, in this order, for a row whose logits are `x` and whose largest is `m`:
//! - a temperature `T` of 0 takes the largest logit, of equal ones that of the lowest id;
//! - otherwise a token weighs `exp((x - m) / T)`, and those that weigh less than `min_p` are dropped;
//! - of the rest, the `top_k` with the largest logits are kept, equal ones by the lower id;
//! - of those, the fewest likeliest whose weights reach `top_p` of their sum are kept;
//! - the token is drawn in whose share of the kept weights `uniform` falls.
//!
//! The shares lie in the order of the ids, whatever was dropped. A sampler that lines them up differently, as one that has
//! sorted the tokens does, chooses each token as often, but not the same one for the same `uniform`.
//!
//! Weights are kept as multiples of 2⁻⁴¹: what is less likely than that, next to the likeliest, is never chosen. Their sums
//! are exact, so that the same input gives the same token every time, whatever else is in the batch.

use super::launch::{Arguments, Kernel};
use super::{Gpu, MatMut, Result};

/// Threads of a block at most, and tokens that one should have at least.
const THREADS: u32 = 1024;
const TOKENS_EACH: usize = 16;
const EDIT_THREADS: u32 = 256;
/// Tokens of a vocabulary: sums of more weights would not fit in 63 bits.
const MAX_VOCAB: usize = 1 << 22;
/// What the kernel writes where no token can be chosen.
const NONE: u32 = u32::MAX;
/// The largest number below 1.
const BELOW_1: f32 = 1.0 - f32::EPSILON / 2.0;

/// How the token of one row is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 1 keeps all.
    pub top_p: f32,
    /// Share of the likeliest one's probability below which a token is dropped; 0 keeps all.
    pub min_p: f32,
    /// In `[0, 1)`: where the draw falls. 1, which a rounded number may be, counts as the number before it.
    pub uniform: f32,
}

impl Choice {
    /// As `Choice` in `sampling.cu`.
    fn words(&self) -> [u32; 5] {
        let Self {
            temperature,
            top_k,
            top_p,
            min_p,
            uniform,
        } = *self;
        assert!(temperature >= 0.0, "a temperature of at least 0");
        assert!(top_p >= 0.0, "top_p of at least 0");
        assert!(min_p >= 0.0, "min_p of at least 0");
        assert!((0.0..=1.0).contains(&uniform), "a draw in [0, 1)");
        let inverse = match temperature {
            0.0 => -1.0,
            _ => (1.0 / temperature).min(f32::MAX), // times a distance of 0 it must be 0
        };
        [
            inverse.to_bits(),
            top_k,
            top_p.to_bits(),
            min_p.min(1.0).to_bits(), // the likeliest stays
            uniform.min(BELOW_1).to_bits(),
        ]
    }
}

/// A change of one logit, in this order: `x += bias`, then `x > 0 ? x / repetition : x * repetition`, then
/// `x -= penalty`. A penalty of `f32::INFINITY` forbids the token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Edit {
    /// Which row.
    pub row: u32,
    /// The token; none of the vocabulary is no change.
    pub id: u32,
    /// What is added; 0 for nothing.
    pub bias: f32,
    /// What brings the logit nearer to that of an unlikely token, or to 0; 1 for nothing.
    pub repetition: f32,
    /// What is taken away; 0 for nothing.
    pub penalty: f32,
}

impl Edit {
    /// As `Edit` in `sampling.cu`.
    fn words(&self) -> [u32; 5] {
        let Self {
            row,
            id,
            bias,
            repetition,
            penalty,
        } = *self;
        [
            row,
            id,
            bias.to_bits(),
            repetition.to_bits(),
            penalty.to_bits(),
        ]
    }
}

/// Changes logits in place, chooses a token of each row, and waits for them. `None` where no logit is finite, or the
/// largest is infinite, which only a broken model gives; NaN is no logit.
///
/// A logit may be named by one edit only: put several changes of one into one edit.
///
/// # Shapes
/// `logits: [N, V]`, `choices: [N]` → `[N]`
///
/// # Errors
/// [`Error::Driver`](super::Error::Driver), [`Error::OutOfMemory`](super::Error::OutOfMemory).
///
/// # Panics
/// If there is not one choice for each row, a choice is out of range, an edit is of a row that there is not, or `V` is
/// over 2²².
pub fn sample(
    gpu: &Gpu,
    logits: &mut MatMut<'_, f32>,
    choices: &[Choice],
    edits: &[Edit],
) -> Result<Vec<Option<u32>>> {
    let (rows, vocab) = (logits.num_rows(), logits.num_cols());
    assert_eq!(choices.len(), rows, "one choice for each row");
    assert!(vocab < MAX_VOCAB, "fewer than 2²² tokens");
    let vocab_size = u32::try_from(vocab).expect("just compared");
    if rows == 0 {
        return Ok(Vec::new());
    }
    if !edits.is_empty() {
        let in_rows = |edit: &Edit| (edit.row as usize) < rows;
        assert!(edits.iter().all(in_rows), "edits of the rows");
        let words: Vec<_> = edits.iter().map(Edit::words).collect();
        let words = gpu.upload(&words)?;
        let arguments = Arguments::new()
            .out_mat(logits)
            .long(logits.stride())
            .unsigned(vocab_size)
            .view(words.view())
            .int(edits.len());
        let blocks = edits.len().div_ceil(EDIT_THREADS as usize);
        let kernel = Kernel::named("sampling", "sampling_edit".to_owned());
        // SAFETY: the kernel's parameters; rows were just compared, and the kernel looks at the ids.
        unsafe { gpu.launch(&kernel.grid([blocks, 1, 1], EDIT_THREADS), arguments)? };
    }
    let words: Vec<_> = choices.iter().map(Choice::words).collect();
    let words = gpu.upload(&words)?;
    let mut chosen = gpu.alloc::<u32>(rows)?;
    let arguments = Arguments::new()
        .mat(logits.as_mat())
        .long(logits.stride())
        .unsigned(vocab_size)
        .view(words.view())
        .out(&chosen.view_mut());
    let kernel = Kernel::named("sampling", "sampling_choose".to_owned());
    let kernel = kernel.row_each(rows, vocab.div_ceil(TOKENS_EACH), THREADS);
    // SAFETY: the kernel's parameters, with the shapes just compared.
    unsafe { gpu.launch(&kernel, arguments)? };
    let chosen = gpu.download(chosen.view())?;
    let tokens = chosen.into_iter().map(|id| (id != NONE).then_some(id));
    Ok(tokens.collect())
}
