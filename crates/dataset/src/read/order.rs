//! The order of an epoch: shuffled, yet read in large pieces with bounded memory.
//!
//! Blocks (row groups) are put into a random order and gathered into windows of a bounded size;
//! inside a window every row may go anywhere. All of it is a pure function of the seed and the
//! epoch, so a place in the order is one number and no state is ever lost.

use crate::shuffle::{Permutation, key};

/// Consecutive rows that are read together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) first_row: u64,
    pub(crate) rows: u64,
    pub(crate) tokens: u64,
}

/// Blocks whose rows are mixed with each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Window {
    /// The place of its first row in the epoch's order.
    pub(crate) start: u64,
    pub(crate) rows: u64,
    /// Its blocks, each with the rows of the blocks before it in the window.
    pub(crate) blocks: Vec<(u64, usize)>,
    permutation: Option<Permutation>,
}

impl Window {
    /// The block and the row within it of a place within the window.
    pub(crate) fn locate(&self, place: u64) -> (usize, u64) {
        let row = self
            .permutation
            .map_or(place, |permutation| permutation.at(place));
        let at = self.blocks.partition_point(|(before, _)| *before <= row) - 1;
        (at, row - self.blocks[at].0)
    }
}

/// One epoch's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Order {
    pub(crate) windows: Vec<Window>,
}

impl Order {
    /// The order of an epoch; without a seed, the order in which the rows are stored.
    pub(crate) fn new(blocks: &[Block], window_tokens: u64, seed: Option<u64>, epoch: u64) -> Self {
        let blocks_key = seed.map(|seed| key(&[seed, epoch]));
        let permutation = blocks_key.map(|key| Permutation::new(blocks.len() as u64, key));
        let sequence = (0..blocks.len())
            .map(|i| permutation.map_or(i, |permutation| permutation.at(i as u64) as usize));
        let mut windows: Vec<Window> = Vec::new();
        let (mut start, mut tokens) = (0, 0);
        for block in sequence {
            let Block {
                rows, tokens: more, ..
            } = blocks[block];
            match windows.last_mut() {
                Some(window) if tokens + more <= window_tokens => {
                    window.blocks.push((window.rows, block));
                    window.rows += rows;
                    tokens += more;
                }
                _ => {
                    windows.push(Window {
                        start,
                        rows,
                        blocks: vec![(0, block)],
                        permutation: None,
                    });
                    tokens = more;
                }
            }
            start += rows;
        }
        for (window, number) in windows.iter_mut().zip(0..) {
            window.permutation =
                seed.map(|seed| Permutation::new(window.rows, key(&[seed, epoch, number])));
        }
        Self { windows }
    }

    /// The window that holds a place of the order, and the place within it.
    pub(crate) fn window_of(&self, place: u64) -> (usize, u64) {
        let at = self
            .windows
            .partition_point(|window| window.start <= place)
            .saturating_sub(1);
        (at, place - self.windows[at].start)
    }

    /// The row at a place of the order.
    pub(crate) fn row(&self, blocks: &[Block], place: u64) -> u64 {
        let (window, local) = self.window_of(place);
        let (block, row) = self.windows[window].locate(local);
        blocks[self.windows[window].blocks[block].1].first_row + row
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(rows: &[u64]) -> Vec<Block> {
        let mut first_row = 0;
        let block = |&rows| {
            let block = Block {
                first_row,
                rows,
                tokens: rows * 10,
            };
            first_row += rows;
            block
        };
        rows.iter().map(block).collect()
    }

    fn rows(order: &Order, blocks: &[Block]) -> Vec<u64> {
        let total = blocks.iter().map(|block| block.rows).sum();
        (0..total).map(|place| order.row(blocks, place)).collect()
    }

    #[test]
    fn every_row_comes_once_in_every_epoch() {
        let blocks = blocks(&[5, 1, 17, 30, 2, 2, 9]);
        for window_tokens in [0, 50, 200, 10_000] {
            for (seed, epoch) in [(None, 0), (Some(1), 0), (Some(1), 1), (Some(2), 7)] {
                let mut rows = rows(&Order::new(&blocks, window_tokens, seed, epoch), &blocks);
                rows.sort_unstable();
                assert!(
                    rows.into_iter().eq(0..66),
                    "windows of {window_tokens}, {seed:?}, {epoch}"
                );
            }
        }
    }

    #[test]
    fn without_a_seed_rows_come_as_stored() {
        let blocks = blocks(&[3, 4, 5]);
        assert!(
            rows(&Order::new(&blocks, 60, None, 3), &blocks)
                .into_iter()
                .eq(0..12)
        );
    }

    #[test]
    fn seeds_and_epochs_differ() {
        let blocks = blocks(&[50, 50]);
        let order = |seed, epoch| rows(&Order::new(&blocks, 10_000, Some(seed), epoch), &blocks);
        assert_eq!(order(1, 1), order(1, 1));
        assert_ne!(order(1, 1), order(1, 2));
        assert_ne!(order(1, 1), order(2, 1));
    }

    #[test]
    fn a_window_stays_within_its_tokens() {
        let blocks = blocks(&[10; 100]);
        let order = Order::new(&blocks, 450, Some(9), 0);
        assert_eq!(order.windows.len(), 25);
        assert!(order.windows.iter().all(|window| window.blocks.len() == 4));
        // A block over the limit is a window of its own.
        assert_eq!(Order::new(&blocks, 5, Some(9), 0).windows.len(), 100);
    }
}
