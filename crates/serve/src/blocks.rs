//! Which blocks of the KV cache are held, free, or kept for whoever asks the same again.

use std::collections::BTreeMap;

use crate::prefix::BlockHash;

/// Hands out block numbers; the memory behind them belongs to the model.
///
/// A block with a [name](Self::name) keeps its content when its last holder gives it back, until
/// the room is needed: the one that has lain idle longest goes first. Of blocks without a name the
/// last one freed is the next one taken, which keeps the working set small.
#[derive(Debug)]
pub struct BlockAllocator {
    free: Vec<u32>,
    blocks: Vec<Block>,
    named: BTreeMap<BlockHash, u32>,
    /// Named blocks that nobody holds, by when they were given back.
    idle: BTreeMap<u64, u32>,
    now: u64,
}

#[derive(Debug, Clone, Default)]
struct Block {
    holders: u32,
    name: Option<BlockHash>,
    /// When it became idle.
    idle_since: u64,
}

impl BlockAllocator {
    /// `num_blocks` free blocks, numbered from 0.
    #[must_use]
    pub fn new(num_blocks: u32) -> Self {
        Self {
            free: (0..num_blocks).rev().collect(),
            blocks: vec![Block::default(); num_blocks as usize],
            named: BTreeMap::new(),
            idle: BTreeMap::new(),
            now: 0,
        }
    }

    /// Takes `count` blocks, or none at all if fewer are free.
    pub fn take(&mut self, count: usize) -> Option<Vec<u32>> {
        if count > self.num_free() {
            return None;
        }
        let unnamed = self.free.len() - count.min(self.free.len());
        let mut blocks = self.free.split_off(unnamed);
        blocks.reverse();
        while blocks.len() < count {
            let (_, block) = self.idle.pop_first().expect("counted as free");
            let name = self.blocks[block as usize].name.take();
            self.named.remove(&name.expect("idle blocks have names"));
            blocks.push(block);
        }
        for &block in &blocks {
            self.blocks[block as usize].holders = 1;
        }
        Some(blocks)
    }

    /// Takes hold of the blocks with these names, up to the first that nobody kept.
    pub fn share(&mut self, names: &[BlockHash]) -> Vec<u32> {
        let known = names.iter().map_while(|name| self.named.get(name).copied());
        let blocks: Vec<u32> = known.collect();
        for &number in &blocks {
            let block = &mut self.blocks[number as usize];
            if block.holders == 0 {
                self.idle.remove(&block.idle_since);
            }
            block.holders += 1;
        }
        blocks
    }

    /// Names a held block by its content, from now on complete and unchanging. If another block
    /// has that content already, this one stays without a name.
    pub fn name(&mut self, block: u32, name: BlockHash) {
        let entry = &mut self.blocks[block as usize];
        if entry.name.is_none() && !self.named.contains_key(&name) {
            entry.name = Some(name);
            self.named.insert(name, block);
        }
    }

    /// Gives blocks back, in the order of their tokens: the last ones will go first.
    ///
    /// # Panics
    /// If a block is not held: two sequences would soon write into it.
    pub fn give_back(&mut self, blocks: Vec<u32>) {
        for number in blocks.into_iter().rev() {
            let block = &mut self.blocks[number as usize];
            assert!(block.holders > 0, "block {number} is given back twice");
            block.holders -= 1;
            if block.holders > 0 {
                continue;
            }
            if block.name.is_some() {
                block.idle_since = self.now;
                self.idle.insert(self.now, number);
                self.now += 1;
            } else {
                self.free.push(number);
            }
        }
    }

    /// Forgets all names, and so all content that nobody holds.
    pub fn forget_names(&mut self) {
        self.named.clear();
        self.blocks.iter_mut().for_each(|block| block.name = None);
        let idle = std::mem::take(&mut self.idle);
        self.free.extend(idle.into_values().rev());
    }

    /// Blocks nobody holds.
    #[must_use]
    pub fn num_free(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// All blocks.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prefix::{PrefixChain, PrefixRoot};

    fn names(count: u32) -> Vec<BlockHash> {
        let tokens: Vec<u32> = (0..count).collect();
        PrefixChain::new(PrefixRoot::new(0, None), 1, &tokens)
            .hashes()
            .to_vec()
    }

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

    #[test]
    fn named_blocks_are_shared_and_the_longest_idle_goes_first() {
        let (mut blocks, names) = (BlockAllocator::new(4), names(3));
        let held = blocks.take(3).expect("three of four");
        for (&block, &name) in held.iter().zip(&names) {
            blocks.name(block, name);
        }
        assert_eq!(blocks.share(&names[..2]), held[..2], "while they are held");
        blocks.give_back(held[..2].to_vec());
        blocks.give_back(held.clone());
        assert_eq!(blocks.num_free(), 4, "kept content counts as free");
        assert_eq!(blocks.share(&names), held, "after their holder has gone");
        blocks.give_back(held.clone());
        // One is free, two must be won: the chain's end goes before its start.
        assert_eq!(blocks.take(3), Some(vec![3, held[2], held[1]]));
        assert_eq!(blocks.share(&names), held[..1]);
    }

    #[test]
    fn equal_content_has_one_name() {
        let (mut blocks, names) = (BlockAllocator::new(2), names(1));
        let both = blocks.take(2).expect("two");
        blocks.name(both[0], names[0]);
        blocks.name(both[1], names[0]);
        blocks.give_back(both.clone());
        assert_eq!(blocks.share(&names), both[..1]);
        blocks.forget_names();
        assert_eq!(blocks.share(&names), [0; 0]);
        blocks.give_back(both[..1].to_vec());
        assert_eq!(blocks.num_free(), 2);
    }
}
