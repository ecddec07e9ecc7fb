//! The number types in which a weight may be kept.

use half::bf16;

use crate::linear::{Along, normal, product, product_bf16, transposed};
use crate::simd::{LANES, Lanes, Simd};
use crate::{Float, Mat, MatMut, Threads};

/// A number type that a weight may be kept in while `F` computes: `F` itself, or `bf16` for `f32`, which takes half the
/// memory and, where reading the weight is what takes time, half the time. Sealed.
///
/// Where rows stay apart ([`forward_invariant`](crate::linear::forward_invariant)) each number is widened in the
/// registers, exactly, and the result has the bits of the same product with a weight that was widened beforehand. The
/// products of training round their input to `bf16` as well.
pub trait Weight<F>: sealed::Sealed<F> + Copy + Send + Sync + 'static {
    /// The same number as `F`.
    fn widen(self) -> F;
}

impl<F: Float> Weight<F> for F {
    #[inline(always)]
    fn widen(self) -> F {
        self
    }
}

impl Weight<f32> for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

mod sealed {
    use super::*;

    pub trait Sealed<F>: Sized {
        /// [`LANES`] numbers in the registers of `S`, widened.
        fn lanes<S: Simd>(simd: S, values: &[Self; LANES]) -> F::Lanes<S>
        where
            F: Float;

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

    impl<F: Float> Sealed<F> for F {
        #[inline(always)]
        fn lanes<S: Simd>(simd: S, values: &[F; LANES]) -> F::Lanes<S> {
            F::Lanes::load(simd, values)
        }

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

    impl Sealed<f32> for bf16 {
        #[inline(always)]
        fn lanes<S: Simd>(simd: S, values: &[bf16; LANES]) -> S::F32 {
            S::widen(simd, values)
        }

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

/// Up to [`LANES`] numbers, widened and filled up with zeros.
#[inline(always)]
pub(crate) fn load_part<F: Float, W: Weight<F>, S: Simd>(simd: S, values: &[W]) -> F::Lanes<S> {
    let mut padded = [F::ZERO; LANES];
    for (padded, value) in padded.iter_mut().zip(values) {
        *padded = value.widen();
    }
    F::Lanes::load(simd, &padded)
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
