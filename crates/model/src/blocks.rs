//! A decoder's blocks, and which adapter stands in the borders of their weights.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak};

use updraft_kernels::Threads;

use crate::error::Result;
use crate::layers::{Block, Loader};
use crate::lora::{Saved, Views};
use crate::ops::Ops;

/// The blocks. Passes read them, any number at once.
///
/// A pass whose one adapter is trained on a GPU has it written into the borders of the weights first, where it stays
/// until another one's, or its own with other values, takes its place. Such passes follow one another.
#[derive(Debug)]
pub(crate) struct Blocks {
    blocks: RwLock<Vec<Block>>,
    /// Whose numbers stand in the borders. Held for a whole pass by whoever relies on them, and by nobody who holds the
    /// blocks already.
    border: Mutex<Weak<Views>>,
}

/// The blocks for one pass.
pub(crate) struct Held<'a> {
    blocks: RwLockReadGuard<'a, Vec<Block>>,
    border: Option<(MutexGuard<'a, Weak<Views>>, Arc<Views>)>,
}

impl Blocks {
    /// Blocks side by side: widening a number takes longer than reading it.
    pub(crate) fn load(loader: Loader<'_>, threads: &Threads) -> Result<Self> {
        let layers = 0..loader.config.num_hidden_layers;
        let mut blocks: Vec<_> = layers.map(|layer| (layer, None)).collect();
        threads.split(blocks.as_mut_slice(), 1, |blocks| {
            for (layer, block) in blocks {
                *block = Some(Block::load(loader, *layer));
            }
        });
        let blocks = blocks
            .into_iter()
            .map(|(_, block)| block.expect("every block was visited"));
        Ok(Self::new(blocks.collect::<Result<_>>()?))
    }

    fn new(blocks: Vec<Block>) -> Self {
        Self {
            blocks: RwLock::new(blocks),
            border: Mutex::default(),
        }
    }

    /// With the weights that are trained in place of the base's.
    pub(crate) fn with_saved(&self, saved: &Saved) -> Self {
        let blocks = self.hold();
        Self::new(blocks.iter().map(|block| block.with_saved(saved)).collect())
    }

    /// For a pass with adapters beside the weights, or none.
    pub(crate) fn hold(&self) -> Held<'_> {
        Held {
            blocks: self.blocks.read().unwrap_or_else(PoisonError::into_inner),
            border: None,
        }
    }

    /// For a pass with one adapter in the borders of the weights, all of which lie on one GPU.
    pub(crate) fn hold_with(&self, ops: &Ops, adapter: &Arc<Views>) -> Result<Held<'_>> {
        let border = self.border.lock();
        let mut border = border.unwrap_or_else(PoisonError::into_inner);
        // The address is no other's, for what it points to is freed when nobody points there.
        if border.as_ptr() != Arc::as_ptr(adapter) {
            *border = Weak::new(); // until all is written, nobody's
            let blocks = self.blocks.write();
            let mut blocks = blocks.unwrap_or_else(PoisonError::into_inner);
            for (layer, block) in blocks.iter_mut().enumerate() {
                block.write_borders(ops, adapter.layer(layer))?;
            }
            *border = Arc::downgrade(adapter);
        }
        Ok(Held {
            border: Some((border, adapter.clone())),
            ..self.hold()
        })
    }
}

impl Held<'_> {
    /// The adapter that stands in the borders for as long as this is held.
    pub(crate) fn bordered(&self) -> Option<&Views> {
        self.border.as_ref().map(|(_, adapter)| &**adapter)
    }
}

impl Deref for Held<'_> {
    type Target = [Block];

    fn deref(&self) -> &[Block] {
        &self.blocks
    }
}
