//! Runs a loop compiled for the widest vectors that this machine has, and the loops that several rooms share.
//!
//! The loops are plain Rust over [`LANES`] independent sums, so the reduction order, and with it every bit of the
//! result, is the same for all instruction sets. Without AVX2 and FMA (before 2013) `mul_add` is a library call: right,
//! but slow.

use crate::Float;

/// Independent sums of a reduction: element `i` goes to sum `i % LANES`.
pub(crate) const LANES: usize = 16;

/// A loop to run. `run` must be `#[inline(always)]`, so that it is compiled anew inside each caller's instruction set.
pub(crate) trait Op {
    type Output;
    fn run(self) -> Self::Output;
}

/// Runs `op` with the best instruction set found.
#[inline]
pub(crate) fn dispatch<O: Op>(op: O) -> O::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if has_avx512() {
            // SAFETY: the features were just found.
            #[expect(unsafe_code, reason = "calls a function compiled for AVX-512")]
            return unsafe { run_avx512(op) };
        }
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
        {
            // SAFETY: the features were just found.
            #[expect(unsafe_code, reason = "calls a function compiled for AVX2")]
            return unsafe { run_avx2(op) };
        }
    }
    op.run()
}

/// Whether [`dispatch`] uses 512-bit vectors.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx512() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx512f")
        && has!("avx512vl")
        && has!("avx512dq")
        && has!("avx512bw")
        && has!("avx2")
        && has!("fma")
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
fn run_avx512<O: Op>(op: O) -> O::Output {
    op.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2<O: Op>(op: O) -> O::Output {
    op.run()
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
pub(crate) fn dot<F: Float>(a: &[F], b: &[F]) -> F {
    let mut lanes = [F::ZERO; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] = a[i].mul_add(b[i], lanes[i]);
        }
    }
    for (lane, (&a, &b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane = a.mul_add(b, *lane);
    }
    sum_lanes(lanes)
}
