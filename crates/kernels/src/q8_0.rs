//! Weights of eight bits: blocks of 32 integers that share a scale.
//!
//! A number is `scale · integer`, the integers from -127 to 127. A row of `K` numbers is `K / 32` blocks of 36 bytes: 9
//! bits a number.
//!
//! # Source
//! The format `q8_0` of ggml, and its rounding. There the scale is an `f16`; turning that into the `f32` that vectors
//! multiply with would take a fifth of the time of decoding one sequence on one thread.

use crate::simd::LANES;

/// Numbers in a block.
pub const NUMBERS: usize = 32;

/// The scale, little endian, then the integers.
pub type Block = [u8; 4 + NUMBERS];

/// Quantizes 32 numbers: the largest becomes 127 or -127, the others the nearest integer, halves away from zero.
///
/// ```
/// use updraft_kernels::q8_0::{quantize, widen};
///
/// let numbers = std::array::from_fn(|i| i as f32 / 31.0);
/// let errors = widen(&quantize(&numbers)).into_iter().zip(numbers).map(|(a, b)| (a - b).abs());
/// assert!(errors.fold(0.0, f32::max) < 0.501 / 127.0); // half a step
/// ```
#[must_use]
pub fn quantize(numbers: &[f32; NUMBERS]) -> Block {
    let largest = numbers.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    let scale = largest / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let mut block = [0; 4 + NUMBERS];
    block[..4].copy_from_slice(&scale.to_le_bytes());
    for (byte, x) in block[4..].iter_mut().zip(numbers) {
        *byte = ((x * inverse).round() as i8).cast_unsigned();
    }
    block
}

/// The numbers of a block.
#[must_use]
pub fn widen(block: &Block) -> [f32; NUMBERS] {
    let (scale, [low, high]) = parts(block);
    let (low, high) = (scaled(scale, low), scaled(scale, high));
    std::array::from_fn(|i| if i < LANES { low[i] } else { high[i - LANES] })
}

/// The scale, and the integers in vectors of [`LANES`].
#[inline(always)]
pub(crate) fn parts(block: &Block) -> (f32, &[[u8; LANES]; NUMBERS / LANES]) {
    let (scale, integers) = block.split_first_chunk().expect("a scale");
    let integers = integers.as_chunks().0.first_chunk();
    let integers = integers.expect("the rest of the block");
    (f32::from_le_bytes(*scale), integers)
}

#[inline(always)]
pub(crate) fn scaled(scale: f32, integers: &[u8; LANES]) -> [f32; LANES] {
    integers.map(|byte| f32::from(byte.cast_signed()) * scale)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Op, Simd, dispatch};
    use crate::testing::{random, thread_counts};
    use crate::{Mat, MatMut, Stored, embedding, linear};

    fn quantized(numbers: &[f32]) -> Vec<Block> {
        numbers.as_chunks().0.iter().map(quantize).collect()
    }

    fn widened(blocks: &[Block]) -> Vec<f32> {
        blocks.iter().flat_map(widen).collect()
    }

    #[test]
    fn a_block_holds_its_scale_and_the_nearest_integers() {
        let mut numbers = [0.0; NUMBERS];
        numbers[..6].copy_from_slice(&[127.0, -127.0, 1.5, -2.5, 0.49, 63.2]);
        let mut expected = [0; 36];
        expected[..4].copy_from_slice(&1.0_f32.to_le_bytes());
        expected[4..10].copy_from_slice(&[127, 0x81, 2, 0xFD, 0, 63]); // halves go away from zero
        assert_eq!(quantize(&numbers), expected);
        assert_eq!(quantize(&[0.0; NUMBERS]), [0; 36]);
        assert_eq!(widen(&[0; 36]), [0.0; NUMBERS]);
    }

    #[test]
    fn no_number_moves_by_more_than_half_a_step() {
        for (seed, size) in [(1, 1.0), (2, 1e-3), (3, 300.0)] {
            let numbers: Vec<f32> = random::<f32>(4096, seed).iter().map(|x| x * size).collect();
            for (numbers, block) in numbers
                .as_chunks::<NUMBERS>()
                .0
                .iter()
                .zip(quantized(&numbers))
            {
                let largest = numbers.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
                for (x, y) in numbers.iter().zip(widen(&block)) {
                    assert!((x - y).abs() <= largest / 127.0 * 0.5001);
                }
            }
        }
    }

    struct Lanes<'a>(&'a Block);

    impl Op for Lanes<'_> {
        type Output = [f32; NUMBERS];

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> [f32; NUMBERS] {
            use crate::simd::Lanes;
            let (scale, [low, high]) = parts(self.0);
            let halves = [
                simd.scale(scale, low).to_array(),
                simd.scale(scale, high).to_array(),
            ];
            std::array::from_fn(|i| halves[i / LANES][i % LANES])
        }
    }

    #[test]
    fn vectors_widen_every_integer_and_scale_as_numbers_do() {
        for scale in [1.0_f32, 1e-3, 0.1, 3e4, 1e-40, -0.7] {
            for first in (0..=255_u8).step_by(NUMBERS) {
                let mut block = [0; 36];
                block[..4].copy_from_slice(&scale.to_le_bytes());
                for (i, byte) in block[4..].iter_mut().enumerate() {
                    *byte = first + i as u8;
                }
                assert_eq!(dispatch(Lanes(&block)), widen(&block));
            }
        }
    }

    #[test]
    fn a_quantized_weight_gives_the_bits_of_the_widened_weight() {
        for (t, k, n) in [(1, 32, 45), (1, 896, 130), (7, 64, 9), (23, 96, 13)] {
            let x = random::<f32>(t * k, 1);
            let kept = quantized(&random::<f32>(n * k, 2));
            let widened = widened(&kept);
            for threads in &thread_counts() {
                let x = Mat::new(&x, t, k);
                let (mut expected, mut actual) = (vec![1.0; t * n], vec![1.0; t * n]);
                let y = MatMut::new(&mut expected, t, n);
                linear::forward_invariant(threads, 0.7, x, Mat::new(&widened, n, k), 0.5, y);
                let y = MatMut::new(&mut actual, t, n);
                let w = Mat::new(&kept, n, k / <Block as Stored<f32>>::NUMBERS);
                linear::forward_invariant(threads, 0.7, x, w, 0.5, y);
                assert_eq!(actual, expected);
            }
        }
    }

    #[test]
    fn an_embedding_is_gathered_from_blocks() {
        let kept = quantized(&random::<f32>(5 * 64, 3));
        let mut out = vec![0.0; 2 * 64];
        let table = Mat::new(&kept, 5, 2);
        embedding::forward(&crate::Threads::single(), table, &[4, 1], &mut out);
        let rows = widened(&kept);
        assert_eq!(out, [&rows[4 * 64..], &rows[64..128]].concat());
    }
}
