//! Pseudo-random permutations as pure functions: no table, no state.

/// A permutation of `0..len` decided by a key.
///
/// A Feistel network over the next power of four, walked until it lands inside: the
/// position of any element costs a few multiplications, whatever the length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permutation {
    len: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

/// Four rounds make a Feistel network of good round functions look random.
const ROUNDS: usize = 4;

impl Permutation {
    /// The permutation of `0..len` for this key.
    pub fn new(len: u64, key: u64) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        let mut keys = [0; ROUNDS];
        let mut state = key;
        for round in &mut keys {
            state = mix(state ^ len);
            *round = state;
        }
        Self {
            len,
            half_bits: bits.div_ceil(2).max(1),
            keys,
        }
    }

    /// Where `index` goes.
    ///
    /// # Panics
    /// If `index` is not below the length.
    pub fn at(&self, index: u64) -> u64 {
        assert!(
            index < self.len,
            "index {index} of a permutation of {}",
            self.len
        );
        let mut at = self.round_trip(index);
        // The domain is less than four times the length, so this ends after a few steps.
        while at >= self.len {
            at = self.round_trip(at);
        }
        at
    }

    fn round_trip(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

/// One key from several numbers.
pub(crate) fn key(numbers: &[u64]) -> u64 {
    numbers.iter().fold(0, |key, &number| mix(key ^ number))
}

/// SplitMix64's step and finalizer (Steele et al. 2014).
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_a_permutation() {
        for len in (1..70).chain([255, 256, 257, 1000, 4096, 5000]) {
            let permutation = Permutation::new(len, 7);
            let mut seen: Vec<u64> = (0..len).map(|i| permutation.at(i)).collect();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..len), "{len}");
        }
    }

    #[test]
    fn the_largest_domains_do_not_overflow() {
        for len in [u64::MAX, u64::MAX - 1, 1 << 63, (1 << 63) + 1] {
            assert!(Permutation::new(len, 3).at(len - 1) < len);
        }
    }

    #[test]
    fn keys_and_places_look_random() {
        let (a, b) = (Permutation::new(10_000, 1), Permutation::new(10_000, 2));
        let same = (0..10_000).filter(|&i| a.at(i) == b.at(i)).count();
        assert!(same < 10, "{same} places agree where one is expected");
        let fixed = (0..10_000).filter(|&i| a.at(i) == i).count();
        assert!(fixed < 10, "{fixed} fixed points where one is expected");
        let distance: u64 = (1..10_000).map(|i| a.at(i).abs_diff(a.at(i - 1))).sum();
        let mean = distance as f64 / 9_999.0;
        assert!(
            (3_100.0..3_570.0).contains(&mean),
            "neighbours are {mean} apart where a third of the length is expected"
        );
    }

    /// The order of a finished run must never change under a running one.
    #[test]
    fn the_order_is_fixed_for_ever() {
        let permutation = Permutation::new(10, 42);
        assert_eq!(
            (0..10).map(|i| permutation.at(i)).collect::<Vec<_>>(),
            [0, 3, 5, 9, 7, 6, 2, 1, 8, 4]
        );
    }
}
