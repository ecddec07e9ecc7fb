//! The forms in which a weight may be kept.

use half::bf16;

use crate::linear::{Along, normal, product, product_bf16, transposed};
use crate::q8_0::Block;
use crate::simd::{LANES, Lanes, Simd, load_part};
use crate::{Float, Mat, MatMut, Threads, q8_0};

/// What the rows of a weight may be made of while `F` computes: `F` itself or, for `f32`, `bf16` or [`q8_0::Block`],
/// which take a half and about a quarter of the memory and, where reading the weight is what takes time, of the time.
/// Sealed.
///
/// Where rows stay apart ([`forward_invariant`](crate::linear::forward_invariant)) each number is widened in the
/// registers, and the result has the bits of the same product with a weight that was widened beforehand.
pub trait Stored<F>: sealed::Stored<F> + Copy + Send + Sync + 'static {
    /// How many numbers one of them holds: a row of `K` numbers is `K / NUMBERS` of them.
    const NUMBERS: usize;
    /// The same numbers as `F`, into a slice of [`NUMBERS`](Self::NUMBERS).
    fn widen_into(&self, numbers: &mut [F]);
}

/// A number type that a weight may be kept in for training too: `F` itself, or `bf16` for `f32`. Sealed.
///
/// The products of training round their input to `bf16` as well.
pub trait Weight<F>: Stored<F> + sealed::Weight<F> {
    /// The same number as `F`.
    fn widen(self) -> F;
}

impl<F: Float> Stored<F> for F {
    const NUMBERS: usize = 1;
    #[inline(always)]
    fn widen_into(&self, numbers: &mut [F]) {
        numbers[0] = *self;
    }
}

impl<F: Float> Weight<F> for F {
    #[inline(always)]
    fn widen(self) -> F {
        self
    }
}

impl Stored<f32> for bf16 {
    const NUMBERS: usize = 1;
    #[inline(always)]
    fn widen_into(&self, numbers: &mut [f32]) {
        numbers[0] = self.widen();
    }
}

impl Weight<f32> for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Stored<f32> for Block {
    const NUMBERS: usize = q8_0::NUMBERS;
    fn widen_into(&self, numbers: &mut [f32]) {
        numbers.copy_from_slice(&q8_0::widen(self));
    }
}

mod sealed {
    use super::*;

    pub trait Stored<F>: Sized {
        /// As many of them as fill whole vectors: [`PARTS`](Self::PARTS) vectors of [`LANES`] numbers.
        type Chunk;
        const PARTS: usize;
        /// The whole chunks at the start of a row.
        fn chunks(row: &[Self]) -> &[Self::Chunk];
        /// One of the vectors of a chunk in the registers of `S`, widened.
        fn lanes<S: Simd>(simd: S, chunk: &Self::Chunk, part: usize) -> F::Lanes<S>
        where
            F: Float;
        /// What follows the whole chunks of a row, fewer than [`LANES`] numbers, filled up with zeros.
        fn rest<S: Simd>(simd: S, row: &[Self]) -> F::Lanes<S>
        where
            F: Float;
    }

    pub trait Weight<F>: Sized {
        /// `y = alpha · x·wᵀ + beta · y`
        fn forward(
            threads: &Threads,
            alpha: F,
            x: Mat<'_, F>,
            w: Mat<'_, Self>,
            beta: F,
            y: MatMut<'_, F>,
        );

        /// `dx = alpha · dy·w + beta · dx`
        fn backward_input(
            threads: &Threads,
            alpha: F,
            dy: Mat<'_, F>,
            w: Mat<'_, Self>,
            beta: F,
            dx: MatMut<'_, F>,
        );
    }

    impl<F: Float> Stored<F> for F {
        type Chunk = [F; LANES];
        const PARTS: usize = 1;
        #[inline(always)]
        fn chunks(row: &[F]) -> &[[F; LANES]] {
            row.as_chunks().0
        }
        #[inline(always)]
        fn lanes<S: Simd>(simd: S, chunk: &[F; LANES], _: usize) -> F::Lanes<S> {
            F::Lanes::load(simd, chunk)
        }
        #[inline(always)]
        fn rest<S: Simd>(simd: S, row: &[F]) -> F::Lanes<S> {
            load_part(simd, row.as_chunks::<LANES>().1)
        }
    }

    impl<F: Float> Weight<F> for F {
        fn forward(
            threads: &Threads,
            alpha: F,
            x: Mat<'_, F>,
            w: Mat<'_, F>,
            beta: F,
            y: MatMut<'_, F>,
        ) {
            product(threads, alpha, normal(x), transposed(w), beta, y);
        }

        fn backward_input(
            threads: &Threads,
            alpha: F,
            dy: Mat<'_, F>,
            w: Mat<'_, F>,
            beta: F,
            dx: MatMut<'_, F>,
        ) {
            product(threads, alpha, normal(dy), normal(w), beta, dx);
        }
    }

    impl Stored<f32> for bf16 {
        type Chunk = [bf16; LANES];
        const PARTS: usize = 1;
        #[inline(always)]
        fn chunks(row: &[bf16]) -> &[[bf16; LANES]] {
            row.as_chunks().0
        }
        #[inline(always)]
        fn lanes<S: Simd>(simd: S, chunk: &[bf16; LANES], _: usize) -> S::F32 {
            simd.widen(chunk)
        }
        #[inline(always)]
        fn rest<S: Simd>(simd: S, row: &[bf16]) -> S::F32 {
            load_part(simd, row.as_chunks::<LANES>().1)
        }
    }

    impl Stored<f32> for Block {
        type Chunk = Block;
        const PARTS: usize = q8_0::NUMBERS / LANES;
        #[inline(always)]
        fn chunks(row: &[Block]) -> &[Block] {
            row
        }
        #[inline(always)]
        fn lanes<S: Simd>(simd: S, block: &Block, part: usize) -> S::F32 {
            let (scale, numbers) = q8_0::parts(block);
            simd.scale(scale, &numbers[part])
        }
        #[inline(always)]
        fn rest<S: Simd>(simd: S, _: &[Block]) -> S::F32 {
            Lanes::splat(simd, 0.0)
        }
    }

    impl Weight<f32> for bf16 {
        fn forward(
            threads: &Threads,
            alpha: f32,
            x: Mat<'_, f32>,
            w: Mat<'_, bf16>,
            beta: f32,
            y: MatMut<'_, f32>,
        ) {
            product_bf16(threads, alpha, x, Along::Rows(w), beta, y);
        }

        fn backward_input(
            threads: &Threads,
            alpha: f32,
            dy: Mat<'_, f32>,
            w: Mat<'_, bf16>,
            beta: f32,
            dx: MatMut<'_, f32>,
        ) {
            product_bf16(threads, alpha, dy, Along::Cols(w), beta, dx);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bf16_widens_to_itself() {
        for bits in 0..=u16::MAX {
            let number = bf16::from_bits(bits);
            let widened: f32 = number.widen();
            assert_eq!(widened.to_bits() >> 16, u32::from(bits));
            assert!(number.is_nan() || widened == number.to_f32());
        }
    }
}
