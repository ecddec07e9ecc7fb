//! One tile of a product in `bf16` pairs, in registers: on machines with `vdpbf16ps`, and on any.

use crate::MatMut;
use crate::simd::{LANES, Op, Simd, dispatch};

use super::{NR, Pair, Panel};

/// Rounds inputs and multiplies tiles with some instruction set.
pub(super) trait Tile: Copy {
    /// Numbers to pairs, to the nearest and ties to even; an odd last number gets a zero beside it.
    fn round(self, x: &[f32], out: &mut [Pair]);
    /// The products of `M` rows of pairs with a panel, into up to [`NR`] columns of as many rows.
    fn multiply<const M: usize>(
        self,
        scale: Scale,
        x: [&[Pair]; M],
        panel: &Panel,
        y: MatMut<'_, f32>,
    );
}

/// How a sum enters the output: `y = alpha · sum + beta · y`.
#[derive(Clone, Copy)]
pub(super) struct Scale {
    pub(super) alpha: f32,
    pub(super) beta: f32,
}

impl Scale {
    #[inline(always)]
    pub(super) fn apply(self, sums: &[f32], y: &mut [f32]) {
        for (y, sum) in y.iter_mut().zip(sums) {
            let product = self.alpha * sum;
            *y = if self.beta == 0.0 {
                product
            } else {
                self.beta * *y + product
            };
        }
    }
}

struct Round<'a> {
    x: &'a [f32],
    out: &'a mut [Pair],
}

impl Op for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (vectors, rest) = self.x.as_chunks::<LANES>();
        let (pairs, last) = self.out.split_at_mut(vectors.len() * LANES / 2);
        for (out, vector) in pairs
            .as_chunks_mut::<{ LANES / 2 }>()
            .0
            .iter_mut()
            .zip(vectors)
        {
            let bits = vector.map(rounded); // all of them first, so that this is one vector
            *out = std::array::from_fn(|i| bits[2 * i] | bits[2 * i + 1] << 16);
        }
        for (out, two) in last.iter_mut().zip(rest.chunks(2)) {
            *out = rounded(two[0]) | two.get(1).map_or(0, |&x| rounded(x) << 16);
        }
    }
}

/// The bits of `bf16::from_f32`, without a branch, so that a loop over it vectorizes; a NaN stays one.
#[inline(always)]
pub(super) fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    if x.is_nan() { quiet } else { nearest }
}

/// Any machine: both halves of each pair are widened, exactly.
#[derive(Clone, Copy)]
pub(super) struct Widened;

impl Tile for Widened {
    fn round(self, x: &[f32], out: &mut [Pair]) {
        dispatch(Round { x, out });
    }

    fn multiply<const M: usize>(
        self,
        scale: Scale,
        x: [&[Pair]; M],
        panel: &Panel,
        y: MatMut<'_, f32>,
    ) {
        dispatch(WidenedTile { scale, x, panel, y });
    }
}

struct WidenedTile<'a, const M: usize> {
    scale: Scale,
    x: [&'a [Pair]; M],
    panel: &'a Panel,
    y: MatMut<'a, f32>,
}

impl<const M: usize> Op for WidenedTile<'_, M> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        let halves = |pair: Pair| {
            (
                f32::from_bits(pair << 16),
                f32::from_bits(pair & 0xFFFF_0000),
            )
        };
        for (row, x) in self.x.iter().enumerate() {
            let mut sums = [0.0; NR];
            for (&x, panel) in x.iter().zip(self.panel) {
                let (x_low, x_high) = halves(x);
                for (sum, &w) in sums.iter_mut().zip(panel) {
                    let (w_low, w_high) = halves(w);
                    *sum = x_high.mul_add(w_high, x_low.mul_add(w_low, *sum));
                }
            }
            self.scale.apply(&sums, self.y.row_mut(row));
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::is_x86_feature_detected as has;
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_loadu_ps,
        _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::{NR, Pair, Panel, Scale, Tile, Widened};
    use crate::MatMut;

    /// Proof of AVX-512 with `vdpbf16ps`.
    #[derive(Clone, Copy)]
    pub(in crate::linear::bf16) struct Avx512Bf16(());

    impl Avx512Bf16 {
        pub(in crate::linear::bf16) fn find() -> Option<Self> {
            (has!("avx512f") && has!("avx512bf16")).then_some(Self(()))
        }
    }

    impl Tile for Avx512Bf16 {
        fn round(self, x: &[f32], out: &mut [Pair]) {
            let (vectors, rest) = x.as_chunks();
            let (pairs, last) = out.split_at_mut(vectors.len() * 16);
            // SAFETY: `self` proves the features.
            #[expect(unsafe_code, reason = "calls a function compiled for AVX-512")]
            unsafe {
                round(vectors, pairs.as_chunks_mut().0);
            }
            Widened.round(rest, last);
        }

        fn multiply<const M: usize>(
            self,
            scale: Scale,
            x: [&[Pair]; M],
            panel: &Panel,
            y: MatMut<'_, f32>,
        ) {
            // SAFETY: `self` proves the features.
            #[expect(unsafe_code, reason = "calls a function compiled for AVX-512")]
            unsafe {
                tile(scale, x, panel, y);
            }
        }
    }

    /// Numbers below 1e-38 become zero, as the products take them anyway.
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn round(x: &[[f32; 32]], out: &mut [[Pair; 16]]) {
        for (x, out) in x.iter().zip(out) {
            // SAFETY: the pointers hold 32 numbers, and as many bits are written as 16 pairs have.
            #[expect(unsafe_code, reason = "AVX-512 loads; a vector is its bits")]
            unsafe {
                let (low, high) = (
                    _mm512_loadu_ps(x.as_ptr()),
                    _mm512_loadu_ps(x[16..].as_ptr()),
                );
                *out = std::mem::transmute::<__m512bh, [Pair; 16]>(_mm512_cvtne2ps_pbh(high, low));
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn tile<const M: usize>(scale: Scale, x: [&[Pair]; M], panel: &Panel, mut y: MatMut<'_, f32>) {
        let x = x.map(|x| &x[..panel.len()]);
        let mut sums = [[_mm512_setzero_ps(); 2]; M];
        for (p, row) in panel.iter().enumerate() {
            let w = [bits(&row[..16]), bits(&row[16..])];
            for m in 0..M {
                let x = pairs(_mm512_set1_epi32(x[m][p].cast_signed()));
                for n in 0..2 {
                    sums[m][n] = _mm512_dpbf16_ps(sums[m][n], x, w[n]);
                }
            }
        }
        for (row, [low, high]) in sums.into_iter().enumerate() {
            let mut sums = [0.0; NR];
            // SAFETY: the pointers take 16 numbers each.
            #[expect(unsafe_code, reason = "AVX-512 stores")]
            unsafe {
                _mm512_storeu_ps(sums.as_mut_ptr(), low);
                _mm512_storeu_ps(sums[16..].as_mut_ptr(), high);
            }
            let y = y.row_mut(row);
            // A whole row has a length that the compiler knows.
            match <&mut [f32; NR]>::try_from(&mut *y) {
                Ok(y) => scale.apply(&sums, y),
                Err(_) => scale.apply(&sums, y),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn bits(sixteen: &[Pair]) -> __m512bh {
        let sixteen: &[Pair; 16] = sixteen.try_into().expect("half of a panel's row");
        // SAFETY: the pointer holds 16 pairs.
        #[expect(unsafe_code, reason = "an AVX-512 load")]
        pairs(unsafe { _mm512_loadu_si512(sixteen.as_ptr().cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn pairs(bits: __m512i) -> __m512bh {
        // SAFETY: both are 512 bits.
        #[expect(unsafe_code, reason = "a vector is its bits")]
        unsafe {
            std::mem::transmute(bits)
        }
    }
}
