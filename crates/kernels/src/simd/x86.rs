//! The instruction sets of x86-64.

use std::arch::is_x86_feature_detected as has;
use std::arch::x86_64::{
    __m256, __m512, _mm_loadu_si128, _mm_srli_si128, _mm256_castsi256_ps, _mm256_cvtepi8_epi32,
    _mm256_cvtepi32_ps, _mm256_cvtepu16_epi32, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_mul_ps, _mm256_set1_ps, _mm256_slli_epi32, _mm512_add_ps,
    _mm512_castsi512_ps, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mul_ps, _mm512_permute_ps, _mm512_set1_ps,
    _mm512_shuffle_f32x4, _mm512_slli_epi32,
};

use half::bf16;

use super::{LANES, Lanes, Op, Simd};

/// Proof of AVX-512 as in x86-64-v4: 32 registers of 512 bits.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// Proof of AVX2 and FMA: 16 registers of 256 bits.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx512 {
    #[inline]
    pub(crate) fn find() -> Option<Self> {
        (has!("avx512f")
            && has!("avx512vl")
            && has!("avx512dq")
            && has!("avx512bw")
            && has!("avx2")
            && has!("fma"))
        .then_some(Self(()))
    }

    #[inline]
    pub(crate) fn run<O: Op>(self, op: O) -> O::Output {
        #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
        fn run<O: Op>(op: O, simd: Avx512) -> O::Output {
            op.run(simd)
        }
        // SAFETY: `self` proves the features.
        #[expect(unsafe_code, reason = "calls a function compiled for AVX-512")]
        unsafe {
            run(op, self)
        }
    }
}

impl Avx2 {
    #[inline]
    pub(crate) fn find() -> Option<Self> {
        (has!("avx2") && has!("fma")).then_some(Self(()))
    }

    #[inline]
    pub(crate) fn run<O: Op>(self, op: O) -> O::Output {
        #[target_feature(enable = "avx2,fma")]
        fn run<O: Op>(op: O, simd: Avx2) -> O::Output {
            op.run(simd)
        }
        // SAFETY: `self` proves the features.
        #[expect(unsafe_code, reason = "calls a function compiled for AVX2")]
        unsafe {
            run(op, self)
        }
    }
}

impl Simd for Avx512 {
    const WIDE: bool = true;
    type F32 = Lanes512;
    #[inline(always)]
    fn widen(self, values: &[bf16; LANES]) -> Lanes512 {
        // SAFETY: `self` proves AVX-512 and AVX2, and the pointer holds 16 numbers of 16 bits.
        #[expect(unsafe_code, reason = "AVX-512 instructions")]
        Lanes512(unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(values.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        })
    }

    #[inline(always)]
    fn scale(self, scale: f32, numbers: &[u8; LANES]) -> Lanes512 {
        // SAFETY: `self` proves AVX-512, and the pointer holds 16 numbers of 8 bits.
        #[expect(unsafe_code, reason = "AVX-512 instructions")]
        Lanes512(unsafe {
            let scale = _mm512_set1_ps(scale);
            let numbers = _mm512_cvtepi8_epi32(_mm_loadu_si128(numbers.as_ptr().cast()));
            _mm512_mul_ps(_mm512_cvtepi32_ps(numbers), scale)
        })
    }
}

impl Simd for Avx2 {
    const WIDE: bool = false;
    type F32 = Lanes256;
    #[inline(always)]
    fn widen(self, values: &[bf16; LANES]) -> Lanes256 {
        // SAFETY: `self` proves AVX2, and the pointers hold 8 numbers of 16 bits each.
        #[expect(unsafe_code, reason = "AVX2 instructions")]
        let eight = |start: usize| unsafe {
            let bits = _mm_loadu_si128(values.as_ptr().add(start).cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
        };
        Lanes256([eight(0), eight(8)])
    }

    #[inline(always)]
    fn scale(self, scale: f32, numbers: &[u8; LANES]) -> Lanes256 {
        // SAFETY: `self` proves AVX2, and the pointer holds 16 numbers of 8 bits.
        #[expect(unsafe_code, reason = "AVX2 instructions")]
        Lanes256(unsafe {
            let scale = _mm256_set1_ps(scale);
            let all = _mm_loadu_si128(numbers.as_ptr().cast());
            let (low, high) = (
                _mm256_cvtepi8_epi32(all),
                _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(all)),
            );
            [
                _mm256_mul_ps(_mm256_cvtepi32_ps(low), scale),
                _mm256_mul_ps(_mm256_cvtepi32_ps(high), scale),
            ]
        })
    }
}

/// 16 `f32`; only made from [`Avx512`], so the instructions exist.
#[derive(Clone, Copy)]
pub(crate) struct Lanes512(__m512);

impl Lanes<f32, Avx512> for Lanes512 {
    #[inline(always)]
    fn splat(_: Avx512, value: f32) -> Self {
        // SAFETY: the argument proves AVX-512.
        #[expect(unsafe_code, reason = "an AVX-512 instruction")]
        Self(unsafe { _mm512_set1_ps(value) })
    }
    #[inline(always)]
    fn load(_: Avx512, values: &[f32; LANES]) -> Self {
        // SAFETY: the argument proves AVX-512, and the pointer holds 16 numbers.
        #[expect(unsafe_code, reason = "an AVX-512 instruction")]
        Self(unsafe { _mm512_loadu_ps(values.as_ptr()) })
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        // SAFETY: a `Lanes512` exists, so AVX-512 does.
        #[expect(unsafe_code, reason = "an AVX-512 instruction")]
        Self(unsafe { _mm512_fmadd_ps(self.0, a.0, b.0) })
    }
    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        // SAFETY: both are 512 bits of plain numbers.
        #[expect(unsafe_code, reason = "a vector is its numbers")]
        unsafe {
            std::mem::transmute(self.0)
        }
    }
    /// The same additions as one by one, four sums in each instruction.
    #[inline(always)]
    fn sum_four([a, b, c, d]: [Self; 4]) -> [f32; 4] {
        // SAFETY: a `Lanes512` exists, so AVX-512 does.
        #[expect(unsafe_code, reason = "AVX-512 instructions")]
        let sums = Self(unsafe {
            // Lane i + lane i + 8: halves of a and b, of c and d.
            let ab = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b01_00_01_00>(a.0, b.0),
                _mm512_shuffle_f32x4::<0b11_10_11_10>(a.0, b.0),
            );
            let cd = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b01_00_01_00>(c.0, d.0),
                _mm512_shuffle_f32x4::<0b11_10_11_10>(c.0, d.0),
            );
            // Lane i + lane i + 4: a quarter each of a, b, c and d.
            let abcd = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd),
                _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd),
            );
            // Lane i + lane i + 2, then lane 0 + lane 1.
            let twos = _mm512_add_ps(abcd, _mm512_permute_ps::<0b11_10_11_10>(abcd));
            _mm512_add_ps(twos, _mm512_permute_ps::<0b01_01_01_01>(twos))
        });
        let sums = sums.to_array();
        [sums[0], sums[4], sums[8], sums[12]]
    }
}

/// 16 `f32`; only made from [`Avx2`], so the instructions exist.
#[derive(Clone, Copy)]
pub(crate) struct Lanes256([__m256; 2]);

impl Lanes<f32, Avx2> for Lanes256 {
    #[inline(always)]
    fn splat(_: Avx2, value: f32) -> Self {
        // SAFETY: the argument proves AVX2.
        #[expect(unsafe_code, reason = "an AVX instruction")]
        Self([unsafe { _mm256_set1_ps(value) }; 2])
    }
    #[inline(always)]
    fn load(_: Avx2, values: &[f32; LANES]) -> Self {
        // SAFETY: the argument proves AVX2, and the pointer holds 16 numbers.
        #[expect(unsafe_code, reason = "an AVX instruction")]
        Self(unsafe {
            [
                _mm256_loadu_ps(values.as_ptr()),
                _mm256_loadu_ps(values.as_ptr().add(8)),
            ]
        })
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        // SAFETY: a `Lanes256` exists, so AVX2 and FMA do.
        #[expect(unsafe_code, reason = "an FMA instruction")]
        Self(unsafe {
            [
                _mm256_fmadd_ps(self.0[0], a.0[0], b.0[0]),
                _mm256_fmadd_ps(self.0[1], a.0[1], b.0[1]),
            ]
        })
    }
    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        // SAFETY: both are 512 bits of plain numbers.
        #[expect(unsafe_code, reason = "a vector is its numbers")]
        unsafe {
            std::mem::transmute(self.0)
        }
    }
}
