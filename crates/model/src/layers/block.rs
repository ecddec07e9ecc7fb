//! One decoder block: attention and MLP, each behind a norm, each added to the stream.

use super::attention::{Attention, SavedAttention};
use super::linear::{AdapterRows, Trained};
use super::mlp::{Mlp, SavedMlp};
use super::rms_norm::SavedNorm;
use super::{LayerPages, Loader, Pass, Places, RmsNorm, Saved, Stream};
use crate::error::Result;
use crate::lora::LayerAdapter;
use crate::ops::Ops;
use crate::tensor::Tensor;

/// One block.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    attention_norm: RmsNorm,
    attention: Attention,
    mlp_norm: RmsNorm,
    mlp: Mlp,
}

/// What a block's backward pass needs.
#[derive(Debug)]
pub(crate) struct SavedBlock {
    attention_norm: SavedNorm,
    attention: SavedAttention,
    mlp_norm: SavedNorm,
    mlp: SavedMlp,
}

impl SavedBlock {
    /// The stream the block started from, from which all else can be computed again.
    pub(crate) fn into_input(self) -> Tensor {
        self.attention_norm.x
    }
}

impl Block {
    pub(crate) fn load(loader: Loader<'_>, layer: usize) -> Result<Self> {
        let norm = |name: &str| {
            RmsNorm::load(
                loader,
                &format!("model.layers.{layer}.{name}.weight"),
                loader.config.hidden_size,
            )
        };
        Ok(Self {
            attention_norm: norm("input_layernorm")?,
            attention: Attention::load(loader, layer)?,
            mlp_norm: norm("post_attention_layernorm")?,
            mlp: Mlp::load(loader, layer)?,
        })
    }

    /// With the weights that are trained in place of the base's.
    pub(crate) fn with_saved(&self, saved: &Saved) -> Self {
        Self {
            attention_norm: self.attention_norm.with_saved(saved),
            attention: self.attention.with_saved(saved),
            mlp_norm: self.mlp_norm.with_saved(saved),
            mlp: self.mlp.with_saved(saved),
        }
    }

    /// Writes an adapter into the borders of the weights, where the passes that follow may find it.
    pub(crate) fn write_borders(
        &mut self,
        ops: &Ops,
        adapter: Option<&LayerAdapter>,
    ) -> Result<()> {
        self.attention.write_borders(ops, adapter)?;
        self.mlp.write_borders(ops, adapter)
    }

    /// Columns that have to be free behind the rows of the gradient after the block.
    pub(crate) fn gradient_room(&self, pass: &Pass<'_>) -> usize {
        let (attention, mlp) = (&self.attention, &self.mlp);
        mlp.gradient_room(pass).max(attention.gradient_room(pass))
    }

    pub(crate) fn forward(
        &self,
        pass: &Pass<'_>,
        stream: &mut Stream,
        adapters: &[AdapterRows<'_>],
        pages: Option<(&Places<'_>, &mut LayerPages)>,
    ) -> Result<SavedBlock> {
        let (ops, room) = (pass.ops, self.attention.room(pass));
        let (x, attention_norm) = self.attention_norm.forward(ops, stream, room)?;
        let (y, attention) = self.attention.forward(pass, x, adapters, pages)?;
        stream.delta = Some(y);
        let (x, mlp_norm) = self.mlp_norm.forward(ops, stream, self.mlp.room(pass))?;
        let (y, mlp) = self.mlp.forward(pass, x, adapters)?;
        stream.delta = Some(y);
        Ok(SavedBlock {
            attention_norm,
            attention,
            mlp_norm,
            mlp,
        })
    }

    /// `dstream: [T, C]` is the gradient after the block and becomes that before it, in place.
    pub(crate) fn backward(
        &self,
        pass: &Pass<'_>,
        saved: SavedBlock,
        dstream: &Tensor,
        trained: Trained<'_>,
    ) -> Result<()> {
        let dx = self.mlp.backward(pass, saved.mlp, dstream, trained)?;
        self.mlp_norm
            .backward(pass.ops, &saved.mlp_norm, &dx, dstream, trained)?;
        let dx = self
            .attention
            .backward(pass, &saved.attention, dstream, trained)?;
        self.attention_norm
            .backward(pass.ops, &saved.attention_norm, &dx, dstream, trained)
    }
}
