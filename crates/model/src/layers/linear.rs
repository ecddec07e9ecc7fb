//! Linear maps that share an input, with their LoRA updates: one product for all.

use std::ops::Range;

use super::border::{self, Border};
use super::{GroupAdapter, Loader, Pass, Saved};
use crate::batch::Batch;
use crate::config::Projection;
use crate::error::Result;
use crate::indices::RowKeys;
use crate::lora::{LayerAdapter, Views};
use crate::ops::Ops;
use crate::tensor::Tensor;

/// The linear maps of a block, grouped by the input they share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Group {
    Qkv,
    O,
    GateUp,
    Down,
}

impl Group {
    pub(crate) const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    pub(crate) fn projections(self) -> &'static [Projection] {
        match self {
            Self::Qkv => &[Projection::Q, Projection::K, Projection::V],
            Self::O => &[Projection::O],
            Self::GateUp => &[Projection::Gate, Projection::Up],
            Self::Down => &[Projection::Down],
        }
    }

    pub(crate) fn of(projection: Projection) -> Self {
        match projection {
            Projection::Q | Projection::K | Projection::V => Self::Qkv,
            Projection::O => Self::O,
            Projection::Gate | Projection::Up => Self::GateUp,
            Projection::Down => Self::Down,
        }
    }
}

/// The rows of a batch that one adapter applies to.
#[derive(Debug, Clone)]
pub(crate) struct AdapterRows<'a> {
    pub(crate) adapter: &'a Views,
    pub(crate) rows: Range<usize>,
    pub(crate) dropout: Option<Dropout<'a>>,
}

impl<'a> AdapterRows<'a> {
    /// Neighbouring sequences with the same adapter make one run of rows.
    pub(crate) fn of_batch(batch: &Batch, adapters: &[&'a Views]) -> Vec<Self> {
        let mut runs: Vec<(usize, Range<usize>)> = Vec::new();
        for (s, adapter) in batch.adapters.iter().enumerate() {
            let (Some(adapter), rows) = (*adapter, batch.rows(s)) else {
                continue;
            };
            match runs.last_mut() {
                Some((last, run)) if *last == adapter && run.end == rows.start => {
                    run.end = rows.end;
                }
                _ => runs.push((adapter, rows)),
            }
        }
        runs.into_iter()
            .map(|(adapter, rows)| Self {
                adapter: adapters[adapter],
                rows,
                dropout: None,
            })
            .collect()
    }
}

/// What is dropped of the inputs of an adapter in training: of each map's alone, as in PEFT.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dropout<'a> {
    pub(crate) p: f64,
    pub(crate) keys: &'a RowKeys,
}

impl<'a> Dropout<'a> {
    /// The rows' keys, and which use of them a map's is.
    fn keys_of(&self, layer: usize, projection: Projection) -> (&'a RowKeys, u64) {
        (self.keys, (layer as u64) << 8 | projection as u64)
    }
}

/// The adapter being trained, and where its gradients add up.
#[derive(Clone, Copy)]
pub(crate) struct Trained<'a> {
    pub(crate) adapter: &'a Views,
    pub(crate) gradients: &'a Views,
    pub(crate) dropout: Option<Dropout<'a>>,
}

/// `y = x·W₀ᵀ + bias + s·(x·Aᵀ)·Bᵀ` for the maps of one group side by side.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    layer: usize,
    group: Group,
    /// `[ΣD_out, D_in]`
    weight: Tensor,
    /// `[ΣD_out]`
    bias: Option<Tensor>,
    /// The output columns of each map.
    columns: Vec<(Projection, Range<usize>)>,
    /// Where an adapter stands that is trained on a GPU; the weight is a view of it.
    border: Option<Border>,
}

impl Linear {
    pub(crate) fn load(loader: Loader<'_>, layer: usize, group: Group) -> Result<Self> {
        let (mut weights, mut biases, mut columns, mut end) =
            (Vec::new(), Vec::new(), Vec::new(), 0);
        for &projection in group.projections() {
            let (d_in, d_out) = loader.config.projection_dims(projection);
            let path = projection.path(layer);
            weights.push((format!("{path}.weight"), vec![d_out, d_in]));
            if loader.config.projection_bias(projection) {
                biases.push((format!("{path}.bias"), vec![d_out]));
            }
            columns.push((projection, end..end + d_out));
            end += d_out;
        }
        let bias = if biases.is_empty() {
            None
        } else {
            Some(loader.vectors(&biases)?)
        };
        Ok(Self {
            layer,
            group,
            weight: loader.matrices(&weights)?,
            bias,
            columns,
            border: None,
        })
    }

    /// With weights and biases, where those are trained, in place of the base's.
    pub(crate) fn with_saved(&self, saved: &Saved) -> Self {
        let bias = self.bias.as_ref();
        Self {
            weight: saved.or(&self.first("weight"), &self.weight),
            bias: bias.map(|bias| saved.or(&self.first("bias"), bias)),
            ..self.clone()
        }
    }

    /// The name of the first map's weight or bias.
    fn first(&self, what: &str) -> String {
        let first = self.group.projections()[0];
        format!("{}.{what}", first.path(self.layer))
    }

    /// Writes the part of an adapter that is this group's around the weight, which moves to where there is room if there
    /// is too little.
    pub(crate) fn write_border(&mut self, ops: &Ops, adapter: Option<&LayerAdapter>) -> Result<()> {
        let Some(adapter) = self.adapter(adapter) else {
            return Ok(());
        };
        let num_ranks = adapter.a.rows();
        let mut border = match self.border.take() {
            Some(border) if border.holds(num_ranks) => border,
            _ => Border::around(ops, &self.weight, border::width(num_ranks))?,
        };
        self.weight = border.weight()?;
        border.write(ops, adapter, |projection| self.range_of(projection))?;
        self.border = Some(border);
        Ok(())
    }

    /// The border, where the pass's adapter stands in it.
    fn border(&self, pass: &Pass<'_>) -> Option<&Border> {
        let adapter = self.adapter(pass.bordered?.layer(self.layer));
        adapter.and(self.border.as_ref())
    }

    /// Columns that have to be free behind the rows of the input, and behind those of the output's gradient.
    pub(crate) fn room(&self, pass: &Pass<'_>) -> usize {
        self.border(pass).map_or(0, Border::width)
    }

    /// `x: [T, D_in]` → `[T, ΣD_out]` with so much room, and `x·Aᵀ` where one adapter covers the batch, as in training.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_>,
        x: &Tensor,
        adapters: &[AdapterRows<'_>],
        room: usize,
    ) -> Result<(Tensor, Option<Tensor>)> {
        self.forward_with(pass, x, adapters, room, self.bias.as_ref())
    }

    /// [`forward`](Self::forward) but for the bias, which whoever asks adds.
    pub(crate) fn forward_without_bias(
        &self,
        pass: &Pass<'_>,
        x: &Tensor,
        adapters: &[AdapterRows<'_>],
    ) -> Result<(Tensor, Option<Tensor>)> {
        self.forward_with(pass, x, adapters, 0, None)
    }

    /// `[ΣD_out]`
    pub(crate) fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    fn forward_with(
        &self,
        pass: &Pass<'_>,
        x: &Tensor,
        adapters: &[AdapterRows<'_>],
        room: usize,
        bias: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let ops = pass.ops;
        if let Some(border) = self.border(pass) {
            let (y, low) = border.forward(ops, x, bias, room)?;
            return Ok((y, Some(low)));
        }
        let y = ops.linear(x, &self.weight, bias, room)?;
        let mut low = None;
        for AdapterRows {
            adapter,
            rows,
            dropout,
        } in adapters
        {
            let Some(adapter) = self.adapter(adapter.layer(self.layer)) else {
                continue;
            };
            let x = x.narrow(0, rows.start, rows.len())?;
            let y = y.narrow(0, rows.start, rows.len())?;
            let down = self.down(ops, &x, adapter, *dropout)?;
            for pair in &adapter.pairs {
                let y = self.columns_of(pair.projection, &y)?;
                ops.add_linear(pair.scaling, &narrow(&down, &pair.ranks)?, &pair.b, &y)?;
            }
            low = Some(down);
        }
        Ok((y, low))
    }

    /// `x·Aᵀ` of all maps side by side, `[T, ΣR]`.
    fn down(
        &self,
        ops: &Ops,
        x: &Tensor,
        adapter: &GroupAdapter,
        dropout: Option<Dropout<'_>>,
    ) -> Result<Tensor> {
        let Some(dropout) = dropout else {
            return ops.linear(x, &adapter.a, None, 0);
        };
        let down = x.zeros(&[x.rows(), adapter.a.rows()])?;
        for pair in &adapter.pairs {
            let keys = dropout.keys_of(self.layer, pair.projection);
            let kept = ops.dropout(dropout.p, keys, x)?;
            let own = ops.linear(&kept, &rows(&adapter.a, &pair.ranks)?, None, 0)?;
            ops.copy(&own, &narrow(&down, &pair.ranks)?)?;
        }
        Ok(down)
    }

    /// `dy: [T, ΣD_out]` → `dx: [T, D_in]`, and the gradient of `x·Aᵀ` that
    /// [`backward_parameters`](Self::backward_parameters) needs.
    pub(crate) fn backward(
        &self,
        pass: &Pass<'_>,
        dy: &Tensor,
        trained: Trained<'_>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let ops = pass.ops;
        if let Some(border) = self.border(pass) {
            let (dx, dlow) = border.backward(ops, dy)?;
            return Ok((dx, Some(dlow)));
        }
        let dx = ops.linear_backward(dy, &self.weight)?;
        let dlow = self.backward_low(ops, dy, trained)?;
        if let (Some(dlow), Some(adapter)) =
            (&dlow, self.adapter(trained.adapter.layer(self.layer)))
        {
            match trained.dropout {
                None => ops.linear_backward_into(1.0, dlow, &adapter.a, 1.0, &dx)?,
                Some(dropout) => self.backward_dropped(ops, dropout, dlow, adapter, &dx)?,
            }
        }
        Ok((dx, dlow))
    }

    /// Adds the gradient that goes through the adapter to `dx`, where each map dropped its own.
    fn backward_dropped(
        &self,
        ops: &Ops,
        dropout: Dropout<'_>,
        dlow: &Tensor,
        adapter: &GroupAdapter,
        dx: &Tensor,
    ) -> Result<()> {
        for pair in &adapter.pairs {
            let a = rows(&adapter.a, &pair.ranks)?;
            let dkept = ops.linear_backward(&narrow(dlow, &pair.ranks)?, &a)?;
            let keys = dropout.keys_of(self.layer, pair.projection);
            ops.dropout_backward(dropout.p, keys, &dkept, dx)?;
        }
        Ok(())
    }

    /// The gradient of `x·Aᵀ`: `s·dy·B`, `[T, ΣR]`.
    fn backward_low(&self, ops: &Ops, dy: &Tensor, trained: Trained<'_>) -> Result<Option<Tensor>> {
        let Some(adapter) = self.adapter(trained.adapter.layer(self.layer)) else {
            return Ok(None);
        };
        let dlow = dy.zeros(&[dy.rows(), adapter.a.rows()])?;
        for pair in &adapter.pairs {
            let dy = self.columns_of(pair.projection, dy)?;
            ops.linear_backward_into(
                pair.scaling,
                &dy,
                &pair.b,
                0.0,
                &narrow(&dlow, &pair.ranks)?,
            )?;
        }
        Ok(Some(dlow))
    }

    /// Adds the gradients of what is trained: of `A` and `B`, where `low` is the forward pass's
    /// `x·Aᵀ`, or of weight and bias.
    pub(crate) fn backward_parameters(
        &self,
        ops: &Ops,
        dy: &Tensor,
        x: &Tensor,
        (low, dlow): (Option<&Tensor>, Option<&Tensor>),
        trained: Trained<'_>,
    ) -> Result<()> {
        let saved = &trained.gradients.saved;
        if !saved.is_empty() {
            self.backward_saved(ops, dy, x, saved)?;
        }
        let gradients = self.adapter(trained.gradients.layer(self.layer));
        let (Some(gradients), Some(low), Some(dlow)) = (gradients, low, dlow) else {
            return Ok(());
        };
        match trained.dropout {
            None => ops.add_weight_gradient(1.0, dlow, x, &gradients.a)?,
            Some(dropout) => {
                for pair in &gradients.pairs {
                    let keys = dropout.keys_of(self.layer, pair.projection);
                    let kept = ops.dropout(dropout.p, keys, x)?;
                    let (dlow, da) = (narrow(dlow, &pair.ranks)?, rows(&gradients.a, &pair.ranks)?);
                    ops.add_weight_gradient(1.0, &dlow, &kept, &da)?;
                }
            }
        }
        for pair in &gradients.pairs {
            let dy = self.columns_of(pair.projection, dy)?;
            ops.add_weight_gradient(pair.scaling, &dy, &narrow(low, &pair.ranks)?, &pair.b)?;
        }
        Ok(())
    }

    /// Adds the gradients of weight and bias.
    fn backward_saved(&self, ops: &Ops, dy: &Tensor, x: &Tensor, saved: &Saved) -> Result<()> {
        if let Some(dweight) = saved.get(&self.first("weight")) {
            ops.add_weight_gradient(1.0, dy, x, dweight)?;
        }
        match saved.get(&self.first("bias")) {
            Some(dbias) => ops.add_bias_gradient(dy, dbias),
            None => Ok(()),
        }
    }

    fn adapter<'a>(&self, layer: Option<&'a LayerAdapter>) -> Option<&'a GroupAdapter> {
        layer.and_then(|groups| groups[self.group as usize].as_ref())
    }

    /// The columns of `y: [T, ΣD_out]` that belong to one map.
    fn columns_of(&self, projection: Projection, y: &Tensor) -> Result<Tensor> {
        narrow(y, &self.range_of(projection))
    }

    fn range_of(&self, projection: Projection) -> Range<usize> {
        let mut columns = self.columns.iter();
        let (_, range) = columns
            .find(|(own, _)| *own == projection)
            .expect("a pair is planned within its group");
        range.clone()
    }
}

fn rows(matrix: &Tensor, rows: &Range<usize>) -> Result<Tensor> {
    matrix.narrow(0, rows.start, rows.len())
}

fn narrow(matrix: &Tensor, columns: &Range<usize>) -> Result<Tensor> {
    matrix.narrow(1, columns.start, columns.len())
}
