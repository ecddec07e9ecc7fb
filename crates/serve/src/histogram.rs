//! How often a value fell below each of some bounds.

/// Counts of what was observed, by upper bounds.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    bounds: &'static [f64],
    /// Below the bound of the same index, and not below the one before.
    counts: Vec<u64>,
    count: u64,
    sum: f64,
}

impl Histogram {
    /// Nothing observed yet; the bounds rise.
    #[must_use]
    pub fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            counts: vec![0; bounds.len()],
            count: 0,
            sum: 0.0,
        }
    }

    /// For numbers of tokens, from one to a very long prompt.
    #[must_use]
    pub fn of_tokens() -> Self {
        const BOUNDS: [f64; 14] = [
            1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0,
            16384.0, 131_072.0,
        ];
        Self::new(&BOUNDS)
    }

    /// For seconds, wide enough for a tiny model and a loaded large one.
    #[must_use]
    pub fn of_seconds() -> Self {
        const BOUNDS: [f64; 14] = [
            0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0,
        ];
        Self::new(&BOUNDS)
    }

    /// Counts one value.
    pub fn observe(&mut self, value: f64) {
        if let Some(index) = self.bounds.iter().position(|bound| value <= *bound) {
            self.counts[index] += 1;
        }
        self.count += 1;
        self.sum += value;
    }

    /// Each bound with how many were at most as large.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> + '_ {
        let counts = self.counts.iter().scan(0, |below, count| {
            *below += count;
            Some(*below)
        });
        self.bounds.iter().copied().zip(counts)
    }

    /// How many were observed.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The sum of what was observed.
    #[must_use]
    pub fn sum(&self) -> f64 {
        self.sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_inclusive_and_counts_add_up() {
        let mut seen = Histogram::new(&[1.0, 2.0]);
        [0.5, 1.0, 1.5, 9.0]
            .iter()
            .for_each(|&value| seen.observe(value));
        assert_eq!(seen.cumulative().collect::<Vec<_>>(), [(1.0, 2), (2.0, 3)]);
        assert_eq!((seen.count(), seen.sum()), (4, 12.0));
    }
}
