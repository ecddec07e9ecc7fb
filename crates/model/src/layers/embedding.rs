//! Token embeddings; frozen, so there is no backward pass.

use candle_core::Tensor;

use super::{Loader, Pass};
use crate::error::Result;

/// The embedding table, `[V, C]`.
#[derive(Debug)]
pub(crate) struct Embedding {
    pub(crate) weight: Tensor,
}

impl Embedding {
    pub(crate) fn load(loader: Loader<'_>) -> Result<Self> {
        let shape = [loader.config.vocab_size, loader.config.hidden_size];
        Ok(Self {
            weight: loader.matrix("model.embed_tokens.weight", shape)?,
        })
    }

    /// → `[T, C]`
    pub(crate) fn forward(&self, pass: &Pass<'_>) -> Result<Tensor> {
        pass.ops.gather(&self.weight, &pass.batch.ids)
    }
}
