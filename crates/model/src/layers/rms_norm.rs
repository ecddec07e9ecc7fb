//! RMS norms over the residual stream and over single heads.

use super::{Loader, Saved, Trained};
use crate::error::Result;
use crate::indices::Indices;
use crate::ops::{Normed, Ops};
use crate::tensor::Tensor;

/// The residual stream: what has been added up, and the newest addition still apart, so that adding
/// it and norming the sum is one pass.
#[derive(Debug)]
pub(crate) struct Stream {
    /// `[T, C]`
    pub(crate) sum: Tensor,
    /// `[T, C]`
    pub(crate) delta: Option<Tensor>,
}

impl Stream {
    /// Some rows of it, in the order asked for.
    pub(crate) fn rows(&self, ops: &Ops, rows: &Indices<'_>) -> Result<Self> {
        let delta = self
            .delta
            .as_ref()
            .map(|delta| ops.gather(delta, rows))
            .transpose()?;
        Ok(Self {
            sum: ops.gather(&self.sum, rows)?,
            delta,
        })
    }
}

/// `y = x / sqrt(mean(x²) + eps) ⊙ weight`.
#[derive(Debug, Clone)]
pub(crate) struct RmsNorm {
    /// In the model's files.
    name: String,
    /// `[C]`, or `[D]` over heads
    weight: Tensor,
    eps: f64,
}

/// What the backward pass needs.
#[derive(Debug)]
pub(crate) struct SavedNorm {
    pub(crate) x: Tensor,
    inv_rms: Tensor,
}

impl RmsNorm {
    pub(crate) fn load(loader: Loader<'_>, name: &str, width: usize) -> Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            weight: loader.vector(name, width)?,
            eps: loader.config.rms_norm_eps,
        })
    }

    /// With its weight, where that is trained, in place of the base's.
    pub(crate) fn with_saved(&self, saved: &Saved) -> Self {
        Self {
            name: self.name.clone(),
            weight: saved.or(&self.name, &self.weight),
            eps: self.eps,
        }
    }

    /// Whose type and memory are the activations'.
    pub(crate) fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// Norms the stream, its newest addition included; the rows come with so much room.
    pub(crate) fn forward(
        &self,
        ops: &Ops,
        stream: &mut Stream,
        room: usize,
    ) -> Result<(Tensor, SavedNorm)> {
        let Normed { y, inv_rms } = match stream.delta.take() {
            None => ops.rms_norm(&stream.sum, &self.weight, self.eps, room)?,
            Some(delta) => {
                let sum = &stream.sum;
                let normed = ops.add_rms_norm(sum, &delta, &self.weight, self.eps, room)?;
                stream.sum = delta; // which now holds the sum; the old sum may be saved elsewhere
                normed
            }
        };
        Ok((
            y,
            SavedNorm {
                x: stream.sum.clone(),
                inv_rms,
            },
        ))
    }

    /// Adds to `dx` what comes back through the norm, and the weight's gradient if that is trained.
    pub(crate) fn backward(
        &self,
        ops: &Ops,
        saved: &SavedNorm,
        dy: &Tensor,
        dx: &Tensor,
        trained: Trained<'_>,
    ) -> Result<()> {
        if let Some(dweight) = trained.gradients.saved.get(&self.name) {
            ops.rms_norm_backward_weight(&saved.x, &saved.inv_rms, dy, dweight)?;
        }
        ops.rms_norm_backward(&saved.x, &self.weight, &saved.inv_rms, dy, dx)
    }

    /// Norms each head of `view: [T, n·D]` by itself, in place.
    pub(crate) fn forward_heads(&self, ops: &Ops, view: &Tensor) -> Result<SavedNorm> {
        let x = self.copy_heads(view)?;
        let Normed { y, inv_rms } = ops.rms_norm(&x, &self.weight, self.eps, 0)?;
        ops.copy(&y.reshape(view.dims())?, view)?;
        Ok(SavedNorm { x, inv_rms })
    }

    /// Replaces the gradient of the normed heads by that of the heads, in place.
    pub(crate) fn backward_heads(
        &self,
        ops: &Ops,
        saved: &SavedNorm,
        view: &Tensor,
        trained: Trained<'_>,
    ) -> Result<()> {
        let dy = self.copy_heads(view)?;
        let dx = dy.zeros_like()?;
        self.backward(ops, saved, &dy, &dx, trained)?;
        ops.copy(&dx.reshape(view.dims())?, view)
    }

    /// A copy with one head per row, `[T·n, D]`; never a view, which for one token it could be.
    fn copy_heads(&self, view: &Tensor) -> Result<Tensor> {
        let width = self.weight.cols();
        let copy = view.packed_copy()?;
        copy.reshape(&[view.rows() * view.cols() / width, width])
    }
}
