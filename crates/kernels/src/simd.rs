//! Runs a loop compiled for the widest vectors that this machine has, and the loops that several rooms share.
//!
//! Loops over elements are plain Rust, which vectorizes. Reductions run over [`LANES`] independent sums, explicit vectors
//! where several of them must stay in registers, so that the reduction order, and with it every bit of the result, is
//! the same for all instruction sets. Without AVX2 and FMA (x86 before 2013) `mul_add` is a library call: right, but
//! slow.

use half::bf16;

use crate::weight::{Stored, Weight};
use crate::{Float, q8_0};

/// Independent sums of a reduction: element `i` goes to sum `i % LANES`.
pub(crate) const LANES: usize = 16;

/// A loop to run. `run` must be `#[inline(always)]`, so that it is compiled anew for each instruction set.
pub(crate) trait Op {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Proof that this machine has an instruction set.
pub trait Simd: Copy {
    /// Whether a tile of 4 × 4 sums of [`LANES`] `f32` fits the registers.
    const WIDE: bool;
    type F32: Lanes<f32, Self>;
    /// [`LANES`] numbers, exactly.
    fn widen(self, values: &[bf16; LANES]) -> Self::F32;
    /// [`LANES`] numbers of a [`q8_0::Block`].
    fn scale(self, scale: f32, numbers: &[u8; LANES]) -> Self::F32;
}

/// [`LANES`] numbers in vector registers.
pub trait Lanes<F, S>: Copy {
    fn splat(simd: S, value: F) -> Self;
    fn load(simd: S, values: &[F; LANES]) -> Self;
    /// `self · a + b`, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    fn to_array(self) -> [F; LANES];
    /// Up to [`LANES`] numbers, filled up with zeros.
    #[inline(always)]
    fn load_part(simd: S, values: &[F]) -> Self
    where
        F: Float,
    {
        let mut padded = [F::ZERO; LANES];
        padded[..values.len()].copy_from_slice(values);
        Self::load(simd, &padded)
    }
    /// [`sum_lanes`] of each.
    #[inline(always)]
    fn sum_four(four: [Self; 4]) -> [F; 4]
    where
        F: Float,
    {
        four.map(|lanes| sum_lanes(lanes.to_array()))
    }
}

/// Runs `op` with the best instruction set found.
#[inline]
pub(crate) fn dispatch<O: Op>(op: O) -> O::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(simd) = x86::Avx512::find() {
            return simd.run(op);
        }
        if let Some(simd) = x86::Avx2::find() {
            return simd.run(op);
        }
    }
    op.run(Plain)
}

/// No instruction set beyond what the build assumes.
#[derive(Clone, Copy)]
pub(crate) struct Plain;

impl Simd for Plain {
    const WIDE: bool = false;
    type F32 = [f32; LANES];
    #[inline(always)]
    fn widen(self, values: &[bf16; LANES]) -> [f32; LANES] {
        values.map(Weight::widen)
    }
    #[inline(always)]
    fn scale(self, scale: f32, numbers: &[u8; LANES]) -> [f32; LANES] {
        q8_0::scaled(scale, numbers)
    }
}

impl<F: Float, S> Lanes<F, S> for [F; LANES] {
    #[inline(always)]
    fn splat(_: S, value: F) -> Self {
        [value; LANES]
    }
    #[inline(always)]
    fn load(_: S, values: &[F; LANES]) -> Self {
        *values
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        std::array::from_fn(|i| self[i].mul_add(a[i], b[i]))
    }
    #[inline(always)]
    fn to_array(self) -> [F; LANES] {
        self
    }
}

/// Adds the lanes up pairwise, halving until one is left.
#[inline(always)]
pub(crate) fn sum_lanes<F: Float>(mut lanes: [F; LANES]) -> F {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// `Σ a_i · b_i` in [`LANES`] sums.
#[inline(always)]
pub(crate) fn dot<F: Float, S: Simd>(simd: S, a: &[F], b: &[F]) -> F {
    let [[sum]] = dots(simd, [a], [b]);
    sum
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

/// [`dot`] of each `a` with each of up to four `b`, the same bits as one by one, at fewer loads. All rows hold as many
/// numbers.
#[inline(always)]
pub(crate) fn dots<F: Float, W: Stored<F>, S: Simd, const M: usize, const N: usize>(
    simd: S,
    a: [&[F]; M],
    b: [&[W]; N],
) -> [[F; N]; M] {
    const { assert!(N <= 4) };
    let len = a[0].len();
    let zero = F::Lanes::splat(simd, F::ZERO);
    let mut lanes = [[zero; N]; M];
    // Loops, not closures: a closure's body is compiled without the instruction set, and so cannot be inlined here.
    let mut b_lanes = [zero; N];
    let vectors = len / LANES;
    let (a_chunks, b_chunks) = (chunks(vectors, a), chunks(vectors / W::PARTS, b));
    for c in 0..vectors / W::PARTS {
        for part in 0..W::PARTS {
            for n in 0..N {
                b_lanes[n] = W::lanes(simd, &b_chunks[n][c], part);
            }
            for m in 0..M {
                let a = F::Lanes::load(simd, &a_chunks[m][c * W::PARTS + part]);
                for n in 0..N {
                    lanes[m][n] = a.mul_add(b_lanes[n], lanes[m][n]);
                }
            }
        }
    }
    if vectors * LANES < len {
        for n in 0..N {
            b_lanes[n] = W::rest(simd, b[n]);
        }
        for m in 0..M {
            let a = load_part::<F, F, S>(simd, &a[m][vectors * LANES..len]);
            for n in 0..N {
                lanes[m][n] = a.mul_add(b_lanes[n], lanes[m][n]);
            }
        }
    }
    let mut sums = [[F::ZERO; N]; M];
    for m in 0..M {
        if let Some(&four) = lanes[m].first_chunk::<4>() {
            sums[m][..4].copy_from_slice(&F::Lanes::sum_four(four));
        } else {
            for n in 0..N {
                sums[m][n] = sum_lanes(lanes[m][n].to_array());
            }
        }
    }
    sums
}

/// The first chunks of each row, so many that the compiler knows them to be there.
#[inline(always)]
fn chunks<F, W: Stored<F>, const N: usize>(count: usize, rows: [&[W]; N]) -> [&[W::Chunk]; N] {
    let mut chunks = [[].as_slice(); N];
    for n in 0..N {
        chunks[n] = &W::chunks(rows[n])[..count];
    }
    chunks
}

#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    struct Tile<'a, W>([&'a [f32]; 3], [&'a [W]; 4]);

    impl<W: Weight<f32>> Op for Tile<'_, W> {
        type Output = [[f32; 4]; 3];

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Self::Output {
            dots(simd, self.0, self.1)
        }
    }

    #[test]
    fn a_tile_has_the_bits_of_single_products_on_every_instruction_set() {
        for len in [0, 1, 15, 16, 17, 64, 131] {
            let a: [Vec<f32>; 3] = std::array::from_fn(|i| random(len, i as u64));
            let b: [Vec<f32>; 4] = std::array::from_fn(|i| random(len, 10 + i as u64));
            let tile = || {
                Tile(
                    a.each_ref().map(Vec::as_slice),
                    b.each_ref().map(Vec::as_slice),
                )
            };
            let plain = tile().run(Plain);
            for (a, row) in a.iter().zip(plain) {
                for (b, sum) in b.iter().zip(row) {
                    assert_eq!(dot(Plain, a, b).to_bits(), sum.to_bits());
                    let exact: f64 = a
                        .iter()
                        .zip(b)
                        .map(|(&a, &b)| f64::from(a) * f64::from(b))
                        .sum();
                    assert!((f64::from(sum) - exact).abs() < 1e-5);
                }
            }
            assert_eq!(dispatch(tile()), plain);
            #[cfg(target_arch = "x86_64")]
            if let Some(simd) = x86::Avx2::find() {
                assert_eq!(simd.run(tile()), plain);
            }

            let kept = b
                .each_ref()
                .map(|b| b.iter().map(|&b| bf16::from_f32(b)).collect());
            let widened = kept
                .each_ref()
                .map(|b: &Vec<bf16>| b.iter().map(|b| b.to_f32()).collect());
            let a = a.each_ref().map(Vec::as_slice);
            let plain = Tile(a, widened.each_ref().map(Vec::as_slice)).run(Plain);
            let tile = || Tile(a, kept.each_ref().map(Vec::as_slice));
            assert_eq!(tile().run(Plain), plain);
            assert_eq!(dispatch(tile()), plain);
            #[cfg(target_arch = "x86_64")]
            if let Some(simd) = x86::Avx2::find() {
                assert_eq!(simd.run(tile()), plain);
            }
        }
    }
}
