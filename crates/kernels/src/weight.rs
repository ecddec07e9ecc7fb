//! The number types in which a weight may be kept.

use half::bf16;

use crate::Float;
use crate::simd::{LANES, Lanes, Simd};

/// A number type that a weight may be kept in while `F` computes: `F` itself, or `bf16` for `f32`, which takes half the
/// memory and, where reading the weight is what takes time, half the time. Sealed.
///
/// Each number is widened in the registers, exactly, so the result has the bits of the same product with a weight that
/// was widened beforehand.
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
    }

    impl<F: Float> Sealed<F> for F {
        #[inline(always)]
        fn lanes<S: Simd>(simd: S, values: &[F; LANES]) -> F::Lanes<S> {
            F::Lanes::load(simd, values)
        }
    }

    impl Sealed<f32> for bf16 {
        #[inline(always)]
        fn lanes<S: Simd>(simd: S, values: &[bf16; LANES]) -> S::F32 {
            S::widen(simd, values)
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
