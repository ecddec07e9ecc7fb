//! What the tests of every room need: random numbers, finite differences and comparisons.

use crate::{Float, Threads};

/// Numbers in `-1..1`, the same for the same seed.
pub(crate) fn random<F: Float>(len: usize, seed: u64) -> Vec<F> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    for _ in 0..8 {
        next();
    }
    (0..len).map(|_| F::from_f64(next())).collect()
}

/// One thread, and three.
pub(crate) fn thread_counts() -> [Threads; 2] {
    [Threads::single(), Threads::new(3).expect("three threads")]
}

/// Checks that `grad` is the gradient of `loss` at `at`, by central differences in f64.
pub(crate) fn check_gradient(what: &str, at: &[f64], grad: &[f64], loss: impl Fn(&[f64]) -> f64) {
    assert_eq!(at.len(), grad.len(), "{what}");
    let step = 1e-5;
    let mut moved = at.to_vec();
    for (i, &grad) in grad.iter().enumerate() {
        moved[i] = at[i] + step;
        let above = loss(&moved);
        moved[i] = at[i] - step;
        let below = loss(&moved);
        moved[i] = at[i];
        let expected = (above - below) / (2.0 * step);
        let error = (grad - expected).abs();
        assert!(
            error < 1e-7 + 1e-6 * expected.abs(),
            "{what}[{i}]: {grad}, finite differences say {expected}"
        );
    }
}

/// Checks `|actual − expected| ≤ tolerance · max|expected|` for every element.
pub(crate) fn check_close<A: Float, B: Float>(
    what: &str,
    actual: &[A],
    expected: &[B],
    tolerance: f64,
) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let largest = expected
        .iter()
        .map(|x| x.to_f64().abs())
        .fold(0.0, f64::max);
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        let error = (a.to_f64() - e.to_f64()).abs();
        assert!(
            error <= tolerance * largest,
            "{what}[{i}]: {a}, expected {e}"
        );
    }
}

/// `Σ a_i · b_i`: a loss whose gradient with respect to `a` is `b`.
pub(crate) fn weighted(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The nearest `f32`s.
pub(crate) fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&x| x as f32).collect()
}
