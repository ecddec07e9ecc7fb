//! The gated MLP: gate and up, SwiGLU, down.

use super::linear::{AdapterRows, Linear, Trained};
use super::{Group, Loader, Pass, Saved};
use crate::error::Result;
use crate::lora::LayerAdapter;
use crate::ops::Ops;
use crate::tensor::Tensor;

/// The MLP half of a block.
#[derive(Debug, Clone)]
pub(crate) struct Mlp {
    gate_up: Linear,
    down: Linear,
}

/// What the backward pass needs; it computes the activation again rather than hold it.
#[derive(Debug)]
pub(crate) struct SavedMlp {
    /// The input, `[T, C]`.
    x: Tensor,
    low_gate_up: Option<Tensor>,
    /// `[T, 2·I]`
    gate_up: Tensor,
    low_down: Option<Tensor>,
}

impl Mlp {
    pub(crate) fn load(loader: Loader<'_>, layer: usize) -> Result<Self> {
        Ok(Self {
            gate_up: Linear::load(loader, layer, Group::GateUp)?,
            down: Linear::load(loader, layer, Group::Down)?,
        })
    }

    pub(crate) fn with_saved(&self, saved: &Saved) -> Self {
        Self {
            gate_up: self.gate_up.with_saved(saved),
            down: self.down.with_saved(saved),
        }
    }

    /// Writes an adapter into the borders of the weights.
    pub(crate) fn write_borders(
        &mut self,
        ops: &Ops,
        adapter: Option<&LayerAdapter>,
    ) -> Result<()> {
        self.gate_up.write_border(ops, adapter)?;
        self.down.write_border(ops, adapter)
    }

    /// Columns that have to be free behind the rows of the input.
    pub(crate) fn room(&self, pass: &Pass<'_>) -> usize {
        self.gate_up.room(pass)
    }

    /// The same of the output's gradient.
    pub(crate) fn gradient_room(&self, pass: &Pass<'_>) -> usize {
        self.down.room(pass)
    }

    /// `x: [T, C]` → `[T, C]`
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_>,
        x: Tensor,
        adapters: &[AdapterRows<'_>],
    ) -> Result<(Tensor, SavedMlp)> {
        // Gate and up become their own gradient.
        let room = self.gate_up.room(pass);
        let (gate_up, low_gate_up) = self.gate_up.forward(pass, &x, adapters, room)?;
        let h = pass.ops.swiglu(&gate_up, self.down.room(pass))?;
        let (y, low_down) = self.down.forward(pass, &h, adapters, 0)?;
        // It may lie behind the activation, which is not held.
        let low_down = low_down.map(Tensor::packed).transpose()?;
        Ok((
            y,
            SavedMlp {
                x,
                low_gate_up,
                gate_up,
                low_down,
            },
        ))
    }

    /// `dy: [T, C]` → the gradient of the input; adds the parameters' gradients.
    pub(crate) fn backward(
        &self,
        pass: &Pass<'_>,
        saved: SavedMlp,
        dy: &Tensor,
        trained: Trained<'_>,
    ) -> Result<Tensor> {
        let ops = pass.ops;
        let SavedMlp {
            x,
            low_gate_up,
            gate_up,
            low_down,
        } = saved;
        let (dh, dlow) = self.down.backward(pass, dy, trained)?;
        ops.swiglu_backward(&gate_up, &dh)?;
        let (dgate_up, h) = (gate_up, dh); // what they hold now
        self.down
            .backward_parameters(ops, dy, &h, (low_down.as_ref(), dlow.as_ref()), trained)?;
        drop(h);
        let (dx, dlow) = self.gate_up.backward(pass, &dgate_up, trained)?;
        self.gate_up.backward_parameters(
            ops,
            &dgate_up,
            &x,
            (low_gate_up.as_ref(), dlow.as_ref()),
            trained,
        )?;
        Ok(dx)
    }
}
