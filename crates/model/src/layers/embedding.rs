//! Token embeddings.

use super::{Loader, Pass, Saved, Trained};
use crate::config::EMBEDDING;
use crate::error::Result;
use crate::tensor::Tensor;

/// The embedding table, `[V, C]`.
#[derive(Debug, Clone)]
pub(crate) struct Embedding {
    pub(crate) weight: Tensor,
}

impl Embedding {
    pub(crate) fn load(loader: Loader<'_>) -> Result<Self> {
        let shape = [loader.config.vocab_size, loader.config.hidden_size];
        Ok(Self {
            weight: loader.matrix(EMBEDDING, shape)?,
        })
    }

    /// With its weight, where that is trained, in place of the base's.
    pub(crate) fn with_saved(&self, saved: &Saved) -> Self {
        Self {
            weight: saved.or(EMBEDDING, &self.weight),
        }
    }

    /// → `[T, C]`
    pub(crate) fn forward(&self, pass: &Pass<'_>) -> Result<Tensor> {
        pass.ops.gather(&self.weight, &pass.ids)
    }

    /// Adds the gradient of the table, if that is trained.
    pub(crate) fn backward(
        &self,
        pass: &Pass<'_>,
        dembedded: &Tensor,
        trained: Trained<'_>,
    ) -> Result<()> {
        match trained.gradients.saved.get(EMBEDDING) {
            Some(dtable) => pass.ops.add_rows(dembedded, &pass.ids, dtable),
            None => Ok(()),
        }
    }
}
