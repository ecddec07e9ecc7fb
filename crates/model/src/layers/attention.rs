//! Self-attention: q, k and v, their norms and rotation, attention over the sequence or its pages, o.

use super::linear::{AdapterRows, Linear, Trained};
use super::rms_norm::SavedNorm;
use super::{Group, LayerPages, Loader, Pass, Places, RmsNorm, Saved};
use crate::error::Result;
use crate::lora::LayerAdapter;
use crate::ops::Ops;
use crate::tensor::Tensor;

/// The attention half of a block.
#[derive(Debug, Clone)]
pub(crate) struct Attention {
    qkv: Linear,
    o: Linear,
    /// Qwen3's norms over the heads of q and k.
    head_norms: Option<(RmsNorm, RmsNorm)>,
}

/// What the backward pass needs.
#[derive(Debug)]
pub(crate) struct SavedAttention {
    /// The input, `[T, C]`.
    x: Tensor,
    low_qkv: Option<Tensor>,
    head_norms: Option<(SavedNorm, SavedNorm)>,
    /// Normed and rotated, `[T, (H + 2·H_kv)·D]`.
    qkv: Tensor,
    /// `[T, H·D]`
    out: Tensor,
    /// Log-sum-exp of each row's scores, `[T, H]`; not known where pages were read.
    lse: Option<Tensor>,
    low_o: Option<Tensor>,
}

/// Queries, keys and values side by side, and what the backward pass needs of their making.
struct Made {
    qkv: Tensor,
    low: Option<Tensor>,
    head_norms: Option<(SavedNorm, SavedNorm)>,
}

impl Attention {
    pub(crate) fn load(loader: Loader<'_>, layer: usize) -> Result<Self> {
        let norm = |name: &str| {
            let name = format!("model.layers.{layer}.self_attn.{name}.weight");
            RmsNorm::load(loader, &name, loader.config.head_dim)
        };
        let head_norms = if loader.config.qk_norm {
            Some((norm("q_norm")?, norm("k_norm")?))
        } else {
            None
        };
        Ok(Self {
            qkv: Linear::load(loader, layer, Group::Qkv)?,
            o: Linear::load(loader, layer, Group::O)?,
            head_norms,
        })
    }

    pub(crate) fn with_saved(&self, saved: &Saved) -> Self {
        let norms = self.head_norms.as_ref();
        Self {
            qkv: self.qkv.with_saved(saved),
            o: self.o.with_saved(saved),
            head_norms: norms.map(|(q, k)| (q.with_saved(saved), k.with_saved(saved))),
        }
    }

    /// Writes an adapter into the borders of the weights.
    pub(crate) fn write_borders(
        &mut self,
        ops: &Ops,
        adapter: Option<&LayerAdapter>,
    ) -> Result<()> {
        self.qkv.write_border(ops, adapter)?;
        self.o.write_border(ops, adapter)
    }

    /// Columns that have to be free behind the rows of the input.
    pub(crate) fn room(&self, pass: &Pass<'_>) -> usize {
        self.qkv.room(pass)
    }

    /// The same of the output's gradient.
    pub(crate) fn gradient_room(&self, pass: &Pass<'_>) -> usize {
        self.o.room(pass)
    }

    /// `x: [T, C]` → `[T, C]`
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_>,
        x: Tensor,
        adapters: &[AdapterRows<'_>],
        pages: Option<(&Places<'_>, &mut LayerPages)>,
    ) -> Result<(Tensor, SavedAttention)> {
        let (ops, config) = (pass.ops, pass.config);
        let pages = pages.map(|(places, pages)| (places, &*pages));
        let Made {
            qkv,
            low: low_qkv,
            head_norms,
        } = self.qkv(pass, &x, adapters, pages)?;
        let (out, lse) = match pages {
            None => ops
                .attention(config, &pass.seq_starts, &qkv, self.o.room(pass))
                .map(|(out, lse)| (out, Some(lse)))?,
            Some((places, pages)) => (
                ops.paged_attention(config, pass.batch, places, pages, &qkv)?,
                None,
            ),
        };
        let (y, low_o) = self.o.forward(pass, &out, adapters, 0)?;
        Ok((
            y,
            SavedAttention {
                x,
                low_qkv,
                head_norms,
                qkv,
                out,
                lse,
                low_o,
            },
        ))
    }

    /// Queries, keys and values, normed and turned, and where there are pages keys and values in theirs.
    fn qkv(
        &self,
        pass: &Pass<'_>,
        x: &Tensor,
        adapters: &[AdapterRows<'_>],
        pages: Option<(&Places<'_>, &LayerPages)>,
    ) -> Result<Made> {
        let (ops, config) = (pass.ops, pass.config);
        if self.head_norms.is_none() && x.is_on_gpu() {
            let (qkv, low) = self.qkv.forward_without_bias(pass, x, adapters)?;
            ops.finish_qkv(
                config,
                pass.rope,
                &pass.positions,
                self.qkv.bias(),
                &qkv,
                pages,
            )?;
            let head_norms = None;
            return Ok(Made {
                qkv,
                low,
                head_norms,
            });
        }
        let (qkv, low) = self.qkv.forward(pass, x, adapters, 0)?;
        let head_norms = match &self.head_norms {
            None => None,
            Some((q, k)) => Some((
                q.forward_heads(ops, &q_of(pass, &qkv)?)?,
                k.forward_heads(ops, &k_of(pass, &qkv)?)?,
            )),
        };
        ops.rope(pass.rope, &pass.positions, &qk_of(pass, &qkv)?)?;
        if let Some((places, pages)) = pages {
            ops.write_pages(config, places, pages, &qkv)?;
        }
        Ok(Made {
            qkv,
            low,
            head_norms,
        })
    }

    /// `dy: [T, C]` → the gradient of the input; adds the parameters' gradients.
    pub(crate) fn backward(
        &self,
        pass: &Pass<'_>,
        saved: &SavedAttention,
        dy: &Tensor,
        trained: Trained<'_>,
    ) -> Result<Tensor> {
        let ops = pass.ops;
        let (dout, dlow_o) = self.o.backward(pass, dy, trained)?;
        self.o.backward_parameters(
            ops,
            dy,
            &saved.out,
            (saved.low_o.as_ref(), dlow_o.as_ref()),
            trained,
        )?;
        let lse = saved.lse.as_ref().expect("training reads no pages");
        let dqkv = ops.attention_backward(
            pass.config,
            &pass.seq_starts,
            &saved.qkv,
            (&saved.out, lse),
            &dout,
            self.qkv.room(pass),
        )?;
        ops.rope_backward(pass.rope, &pass.positions, &qk_of(pass, &dqkv)?)?;
        if let (Some((q, k)), Some((saved_q, saved_k))) = (&self.head_norms, &saved.head_norms) {
            q.backward_heads(ops, saved_q, &q_of(pass, &dqkv)?, trained)?;
            k.backward_heads(ops, saved_k, &k_of(pass, &dqkv)?, trained)?;
        }
        let (dx, dlow) = self.qkv.backward(pass, &dqkv, trained)?;
        self.qkv.backward_parameters(
            ops,
            &dqkv,
            &saved.x,
            (saved.low_qkv.as_ref(), dlow.as_ref()),
            trained,
        )?;
        Ok(dx)
    }
}

fn q_of(pass: &Pass<'_>, qkv: &Tensor) -> Result<Tensor> {
    qkv.narrow(1, 0, pass.config.q_dim())
}

fn k_of(pass: &Pass<'_>, qkv: &Tensor) -> Result<Tensor> {
    qkv.narrow(1, pass.config.q_dim(), pass.config.kv_dim())
}

/// Queries and keys lie side by side and have heads of one width, so they turn in one pass.
fn qk_of(pass: &Pass<'_>, qkv: &Tensor) -> Result<Tensor> {
    qkv.narrow(1, 0, pass.config.q_dim() + pass.config.kv_dim())
}
