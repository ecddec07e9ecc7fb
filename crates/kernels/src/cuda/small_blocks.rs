//! Small blocks of a device's memory that were given back, kept for whoever asks next.
//!
//! A step of decoding makes hundreds of small tensors, and asking the driver for each takes longer than computing it.
//! Everything runs on one stream, so a block may be written again as soon as it was given back.

use std::collections::BTreeMap;

/// Larger blocks are the driver's alone.
const LARGEST: usize = 1 << 20;
/// Bytes that are kept at most.
const KEPT: usize = 64 << 20;
/// Every block's size is a power of two, and at least this.
const LEAST: usize = 512;

/// Blocks by their sizes.
#[derive(Debug, Default)]
pub(super) struct SmallBlocks {
    free: BTreeMap<usize, Vec<u64>>,
    bytes: usize,
}

impl SmallBlocks {
    /// The size of a block for so many bytes; as asked for where it is not small.
    pub(super) fn size_for(bytes: usize) -> usize {
        match bytes {
            0..=LARGEST => bytes.next_power_of_two().max(LEAST),
            large => large,
        }
    }

    /// The address of a block of this size, if there is one.
    pub(super) fn take(&mut self, size: usize) -> Option<u64> {
        let address = self.free.get_mut(&size)?.pop()?;
        self.bytes -= size;
        Some(address)
    }

    /// Keeps a block, unless it is large or enough are kept.
    pub(super) fn keep(&mut self, size: usize, address: u64) -> bool {
        if size > LARGEST || self.bytes + size > KEPT {
            return false;
        }
        self.free.entry(size).or_default().push(address);
        self.bytes += size;
        true
    }

    /// All blocks, to be given back to the driver.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = u64> + use<> {
        self.bytes = 0;
        std::mem::take(&mut self.free).into_values().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_comes_back_for_the_same_size_only() {
        let mut blocks = SmallBlocks::default();
        let size = SmallBlocks::size_for(700);
        assert_eq!(size, 1024);
        assert!(blocks.keep(size, 7));
        assert_eq!(blocks.take(SmallBlocks::size_for(300)), None);
        assert_eq!(blocks.take(SmallBlocks::size_for(1000)), Some(7));
        assert_eq!(blocks.take(size), None, "it is in use again");
    }

    #[test]
    fn large_blocks_and_too_many_are_the_drivers() {
        let mut blocks = SmallBlocks::default();
        assert_eq!(SmallBlocks::size_for(LARGEST + 1), LARGEST + 1);
        assert!(!blocks.keep(LARGEST + 1, 1));
        let kept = (0..100).filter(|&address| blocks.keep(LARGEST, address));
        assert_eq!(kept.count(), KEPT / LARGEST);
        assert_eq!(blocks.drain().count(), KEPT / LARGEST);
        assert!(blocks.keep(LARGEST, 1), "there is room again");
        assert_eq!(blocks.take(LARGEST), Some(1));
    }
}
