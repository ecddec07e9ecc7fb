//! A weight with an adapter around it, so that one product does the work of both.

use std::ops::Range;

use crate::config::Projection;
use crate::error::Result;
use crate::lora::GroupAdapter;
use crate::ops::Ops;
use crate::tensor::Tensor;

/// Ranks are filled up to a multiple of this with zeros, so that rows begin where wide loads may.
pub(crate) const RANKS: usize = 8;

/// `W̃ = [[W, s·B], [A, ·]]`: a group's weight with the `A`s of its maps below it, and their `B`s on its right, each in
/// the rows of its map and the columns of its ranks.
///
/// With `X·Aᵀ` behind the rows of `X` the forward pass is one product, `Y = [X | X·Aᵀ]·[W | s·B]ᵀ`, and with `dY·s·B`
/// behind those of `dY` so is the backward pass, `dX = [dY | dY·s·B]·[W; A]`. Apart, an adapter reads and writes all of
/// `Y` and `dX` once more. The weight itself is as it was: `s·B·A` is never added to it.
#[derive(Debug, Clone)]
pub(crate) struct Border {
    /// `[ΣD_out + room, D_in + room]`
    whole: Tensor,
    d_out: usize,
    d_in: usize,
    /// The ranks of each map, in what is otherwise zeros.
    ranks: Vec<(Projection, Range<usize>)>,
}

impl Border {
    /// A copy of a weight, `[ΣD_out, D_in]`, with room for so many ranks.
    pub(crate) fn around(ops: &Ops, weight: &Tensor, room: usize) -> Result<Self> {
        let (d_out, d_in) = (weight.rows(), weight.cols());
        let border = Self {
            whole: weight.zeros(&[d_out + room, d_in + room])?,
            d_out,
            d_in,
            ranks: Vec::new(),
        };
        ops.copy(weight, &border.weight()?)?;
        Ok(border)
    }

    /// `W`
    pub(crate) fn weight(&self) -> Result<Tensor> {
        self.block(0..self.d_out, 0..self.d_in)
    }

    /// Whether so many ranks fit.
    pub(crate) fn holds(&self, num_ranks: usize) -> bool {
        self.d_in + width(num_ranks) <= self.whole.cols()
    }

    /// Writes an adapter that fits; `columns` says which columns of `Y` are a map's.
    pub(crate) fn write(
        &mut self,
        ops: &Ops,
        adapter: &GroupAdapter,
        columns: impl Fn(Projection) -> Range<usize>,
    ) -> Result<()> {
        let ranks = adapter.pairs.iter();
        let ranks: Vec<_> = ranks
            .map(|pair| (pair.projection, pair.ranks.clone()))
            .collect();
        if self.ranks != ranks {
            self.clear(ops)?;
            self.ranks = ranks;
        }
        let below = self.d_out..self.d_out + adapter.a.rows();
        ops.copy(&adapter.a, &self.block(below, 0..self.d_in)?)?;
        for pair in &adapter.pairs {
            let right = self.d_in + pair.ranks.start..self.d_in + pair.ranks.end;
            let to = self.block(columns(pair.projection), right)?;
            ops.copy_scaled(pair.scaling, &pair.b, &to)?;
        }
        Ok(())
    }

    /// Zeros in place of an adapter whose ranks stood elsewhere.
    fn clear(&self, ops: &Ops) -> Result<()> {
        let (rows, cols) = (self.whole.rows(), self.whole.cols());
        for block in [
            self.block(self.d_out..rows, 0..self.d_in)?,
            self.block(0..self.d_out, self.d_in..cols)?,
        ] {
            ops.copy(&block.zeros_like()?, &block)?;
        }
        Ok(())
    }

    /// Columns that a pass needs behind the rows of `X` and of `dY`.
    pub(crate) fn width(&self) -> usize {
        width(self.num_ranks())
    }

    fn num_ranks(&self) -> usize {
        self.ranks.last().map_or(0, |(_, ranks)| ranks.end)
    }

    /// `x: [T, D_in]` → `y: [T, ΣD_out]` and `x·Aᵀ`, which lies behind `x`.
    pub(crate) fn forward(
        &self,
        ops: &Ops,
        x: &Tensor,
        bias: Option<&Tensor>,
        room: usize,
    ) -> Result<(Tensor, Tensor)> {
        let (wide, width) = (x.wider(self.width())?, self.width());
        let a = self.block(self.d_out..self.d_out + width, 0..self.d_in)?;
        ops.linear_beside(&wide, &a)?;
        let weight_and_b = self.block(0..self.d_out, 0..self.d_in + width)?;
        let y = ops.linear(&wide, &weight_and_b, bias, room)?;
        Ok((y, wide.narrow(1, self.d_in, self.num_ranks())?))
    }

    /// `dy: [T, ΣD_out]` → `dx: [T, D_in]` and the gradient of `x·Aᵀ`, which lies behind `dy`.
    pub(crate) fn backward(&self, ops: &Ops, dy: &Tensor) -> Result<(Tensor, Tensor)> {
        let (wide, width) = (dy.wider(self.width())?, self.width());
        let b = self.block(0..self.d_out, self.d_in..self.d_in + width)?;
        ops.linear_backward_beside(&wide, &b)?;
        let weight_and_a = self.block(0..self.d_out + width, 0..self.d_in)?;
        let dx = ops.linear_backward(&wide, &weight_and_a)?;
        Ok((dx, wide.narrow(1, self.d_out, self.num_ranks())?))
    }

    fn block(&self, rows: Range<usize>, cols: Range<usize>) -> Result<Tensor> {
        let rows = self.whole.narrow(0, rows.start, rows.len())?;
        rows.narrow(1, cols.start, cols.len())
    }
}

/// Columns that so many ranks take.
pub(crate) fn width(num_ranks: usize) -> usize {
    num_ranks.next_multiple_of(RANKS)
}
