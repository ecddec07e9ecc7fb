//! Examples held in memory, in their own order or shuffled per epoch.

use updraft_chat::Example;
use updraft_store::sha256_hex;

use super::{ExamplePlan, ExampleSource, ExampleStream};
use crate::Result;
use crate::random::SplitMix64;

/// A source over examples in memory: for tests, for small data, and the fake
/// that shows what [`ExampleSource`] asks.
#[derive(Debug, Clone)]
pub struct MemorySource {
    plan: ExamplePlan,
    examples: Vec<Example>,
    seed: Option<u64>,
}

impl MemorySource {
    /// The examples in the order given, every epoch alike. The plan's id is
    /// `name` with a hash of all token ids and loss spans: where the data, the
    /// tokenizer or the template changes, it is another source.
    pub fn new(name: impl std::fmt::Display, examples: Vec<Example>) -> Self {
        let plan = ExamplePlan {
            id: format!("{name}@{}", &content_hash(&examples)[..16]),
            lengths: examples
                .iter()
                .map(|example| example.input_ids.len() as u32)
                .collect(),
            trained_tokens: examples.iter().map(Example::trained_tokens).collect(),
        };
        Self {
            plan,
            examples,
            seed: None,
        }
    }

    /// Shuffles each epoch by `seed`.
    pub fn shuffled(mut self, seed: u64) -> Self {
        self.plan.id = format!("{}/shuffled-{seed}", self.plan.id);
        self.seed = Some(seed);
        self
    }
}

impl ExampleSource for MemorySource {
    fn plan(&self) -> &ExamplePlan {
        &self.plan
    }

    fn row(&self, epoch: u64, index: u64) -> u64 {
        match self.seed {
            Some(seed) => permute(index, self.examples.len() as u64, seed, epoch),
            None => index,
        }
    }

    fn open(&self, epoch: u64, index: u64) -> Result<ExampleStream<'_>> {
        let rows = index..self.examples.len() as u64;
        Ok(Box::new(rows.map(move |index| {
            Ok(self.examples[self.row(epoch, index) as usize].clone())
        })))
    }
}

fn content_hash(examples: &[Example]) -> String {
    let mut bytes = Vec::new();
    for example in examples {
        let spans = example
            .loss_spans
            .iter()
            .flat_map(|span| [span.start, span.end]);
        let counts = [example.input_ids.len(), example.loss_spans.len()];
        bytes.extend(
            counts
                .iter()
                .flat_map(|&count| (count as u64).to_le_bytes()),
        );
        let numbers = example.input_ids.iter().copied().chain(spans);
        bytes.extend(numbers.flat_map(u32::to_le_bytes));
    }
    sha256_hex(&bytes)
}

/// A permutation of `0..len` that needs no table: a four-round Feistel network
/// over the next power of four, walked until it falls inside.
fn permute(index: u64, len: u64, seed: u64, epoch: u64) -> u64 {
    let half_bits = (64 - len.saturating_sub(1).leading_zeros())
        .div_ceil(2)
        .max(1);
    let mask = (1u64 << half_bits) - 1;
    let mut value = index;
    loop {
        let (mut left, mut right) = (value >> half_bits, value & mask);
        for round in 0..4u64 {
            let key = seed ^ epoch.rotate_left(24) ^ round.rotate_left(56);
            let mixed = SplitMix64::new(SplitMix64::new(key).next_u64() ^ right).next_u64();
            (left, right) = (right, (left ^ mixed) & mask);
        }
        value = (left << half_bits) | right;
        if value < len {
            return value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::example;

    fn examples() -> MemorySource {
        MemorySource::new("memory", (2..12).map(example).collect())
    }

    mod in_order {
        crate::example_source_tests!(super::examples());
    }

    mod shuffled {
        crate::example_source_tests!(super::examples().shuffled(3));
    }

    #[test]
    fn another_content_is_another_id() {
        let id = |examples| MemorySource::new("data.jsonl", examples).plan.id;
        let first = id((2..12).map(example).collect());
        assert_eq!(first, id((2..12).map(example).collect()));
        assert!(first.starts_with("data.jsonl@"), "{first}");
        let changed = |change: fn(&mut Vec<Example>)| {
            let mut examples = (2..12).map(example).collect();
            change(&mut examples);
            id(examples)
        };
        assert_ne!(first, changed(|examples| examples[3].input_ids[1] ^= 1));
        assert_ne!(
            first,
            changed(|examples| examples[9].loss_spans[0].end -= 1)
        );
        assert_ne!(first, changed(|examples| examples.swap(0, 1)));
    }

    #[test]
    fn permute_is_a_permutation_of_any_length() {
        for len in [1, 2, 3, 4, 5, 16, 17, 1000] {
            let mut seen: Vec<u64> = (0..len).map(|index| permute(index, len, 1, 2)).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..len).collect::<Vec<_>>(), "length {len}");
        }
    }

    #[test]
    fn epochs_and_seeds_differ() {
        let order = |seed, epoch| {
            (0..50)
                .map(|i| permute(i, 50, seed, epoch))
                .collect::<Vec<_>>()
        };
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
        assert_eq!(order(1, 1), order(1, 1));
    }
}
