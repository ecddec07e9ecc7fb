//! Which blocks of the KV cache are free.

/// Hands out block numbers; the memory behind them belongs to the model.
///
/// The last block freed is the next one taken, which keeps the working set small.
#[derive(Debug)]
pub struct BlockAllocator {
    free: Vec<u32>,
    taken: Vec<bool>,
}

impl BlockAllocator {
    /// `num_blocks` free blocks, numbered from 0.
    #[must_use]
    pub fn new(num_blocks: u32) -> Self {
        Self {
            free: (0..num_blocks).rev().collect(),
            taken: vec![false; num_blocks as usize],
        }
    }

    /// Takes `count` blocks, or none at all if fewer are free.
    pub fn take(&mut self, count: usize) -> Option<Vec<u32>> {
        let rest = self.free.len().checked_sub(count)?;
        let mut blocks = self.free.split_off(rest);
        blocks.reverse();
        for &block in &blocks {
            self.taken[block as usize] = true;
        }
        Some(blocks)
    }

    /// Gives blocks back.
    ///
    /// # Panics
    /// If a block is not taken: two sequences would soon write into it.
    pub fn give_back(&mut self, blocks: Vec<u32>) {
        for block in blocks.into_iter().rev() {
            let taken = std::mem::replace(&mut self.taken[block as usize], false);
            assert!(taken, "block {block} is given back twice");
            self.free.push(block);
        }
    }

    /// Blocks nobody holds.
    #[must_use]
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// All blocks.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.taken.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_all_or_nothing() {
        let mut blocks = BlockAllocator::new(3);
        let two = blocks.take(2).expect("two of three");
        assert_eq!(two, [0, 1]);
        assert_eq!(blocks.take(2), None);
        assert_eq!(blocks.num_free(), 1);
        blocks.give_back(two);
        assert_eq!(blocks.num_free(), 3);
        assert_eq!(blocks.take(3), Some(vec![0, 1, 2]));
    }

    #[test]
    #[should_panic(expected = "given back twice")]
    fn a_double_free_is_caught() {
        let mut blocks = BlockAllocator::new(1);
        let one = blocks.take(1).expect("one");
        blocks.give_back(one.clone());
        blocks.give_back(one);
    }
}
