//! Random draws that are a pure function of a seed and a step.

/// The `step`-th draw of the stream `seed`, uniform in `[0, 1)` with 53 random bits.
///
/// A sequence that is preempted, batched differently or moved to another machine draws the same
/// numbers, because there is no state to lose.
///
/// # Source
/// SplitMix64 read at random positions: Steele, Lea and Flood 2014, §5.
#[must_use]
pub fn uniform(seed: u64, step: u64) -> f64 {
    const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
    let state = mix(seed).wrapping_add((step + 1).wrapping_mul(GOLDEN_GAMMA));
    (mix(state) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// SplitMix64's finalizer: every input bit reaches every output bit.
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_repeat_and_streams_differ() {
        assert_eq!(uniform(7, 3), uniform(7, 3));
        assert_ne!(uniform(7, 3), uniform(7, 4));
        assert_ne!(uniform(7, 3), uniform(8, 3));
        assert!((0..1000).all(|step| (0.0..1.0).contains(&uniform(1, step))));
    }

    #[test]
    fn draws_are_uniform() {
        let n = 100_000;
        let mut buckets = [0u32; 10];
        for step in 0..n {
            buckets[(uniform(42, step) * 10.0) as usize] += 1;
        }
        // Standard deviation of a bucket is about 95 draws; six of them never happen by chance.
        assert!(
            buckets.iter().all(|&count| count.abs_diff(10_000) < 570),
            "{buckets:?}"
        );
    }
}
