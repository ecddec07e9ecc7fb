//! Names for blocks of tokens: what a block holds, and all that came before it.

use sha2::{Digest, Sha256};

/// What must be equal besides the tokens for two prefixes to have equal keys and values: the
/// weights that made them, and the caller's salt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefixRoot([u8; 32]);

impl PrefixRoot {
    /// Of prompts computed with this generation of an adapter, 0 being none. Requests with
    /// different salts never meet, so that nobody can time whether somebody else asked the same.
    #[must_use]
    pub fn new(generation: u64, salt: Option<&str>) -> Self {
        let mut hash = Sha256::new();
        hash.update(generation.to_le_bytes());
        hash.update([u8::from(salt.is_some())]);
        hash.update(salt.unwrap_or_default());
        Self(hash.finalize().into())
    }
}

/// A full block's tokens and everything before them, as SHA-256: nobody can make two that are
/// alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash([u8; 32]);

/// The hashes of a growing sequence's full blocks, each over the one before.
#[derive(Debug, Clone)]
pub(crate) struct PrefixChain {
    root: PrefixRoot,
    block_size: usize,
    hashes: Vec<BlockHash>,
    /// Tokens after the last full block.
    tail: Vec<u32>,
}

impl PrefixChain {
    pub(crate) fn new(root: PrefixRoot, block_size: u32, tokens: &[u32]) -> Self {
        let mut chain = Self {
            root,
            block_size: block_size as usize,
            hashes: Vec::with_capacity(tokens.len() / block_size as usize),
            tail: Vec::new(),
        };
        tokens.iter().for_each(|&token| chain.push(token));
        chain
    }

    pub(crate) fn push(&mut self, token: u32) {
        self.tail.push(token);
        if self.tail.len() < self.block_size {
            return;
        }
        let mut hash = Sha256::new();
        hash.update(self.hashes.last().map_or(self.root.0, |last| last.0));
        self.tail
            .drain(..)
            .for_each(|token| hash.update(token.to_le_bytes()));
        self.hashes.push(BlockHash(hash.finalize().into()));
    }

    pub(crate) fn hashes(&self) -> &[BlockHash] {
        &self.hashes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(root: PrefixRoot, tokens: &[u32]) -> Vec<BlockHash> {
        PrefixChain::new(root, 2, tokens).hashes().to_vec()
    }

    #[test]
    fn a_hash_stands_for_all_that_came_before() {
        let root = PrefixRoot::new(0, None);
        let whole = hashes(root, &[1, 2, 3, 4, 5]);
        assert_eq!(whole.len(), 2, "the fifth token's block is not full");
        assert_eq!(whole[..1], hashes(root, &[1, 2]));
        assert_ne!(whole[1], hashes(root, &[9, 2, 3, 4])[1], "another past");
        assert_ne!(whole[1], hashes(root, &[3, 4])[0], "another place");
    }

    #[test]
    fn generations_and_salts_never_meet() {
        let roots = [
            PrefixRoot::new(0, None),
            PrefixRoot::new(1, None),
            PrefixRoot::new(0, Some("")),
            PrefixRoot::new(0, Some("a")),
            PrefixRoot::new(1, Some("a")),
        ];
        for (index, a) in roots.iter().enumerate() {
            for b in &roots[index + 1..] {
                assert_ne!(hashes(*a, &[1, 2]), hashes(*b, &[1, 2]));
            }
        }
    }
}
