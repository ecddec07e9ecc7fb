//! Attention over whole sequences and over pages.

use updraft_kernels::attention::{self, Heads, Qkv, QkvGrads};
use updraft_kernels::paged_attention::{self, Pages, Sequences};
use updraft_kernels::{Float, MatMut, kv_scatter};

use super::{Ops, no_room, on_gpu};
use crate::batch::Batch;
use crate::bridge::{Real, RopeTable, View, edit_slice, read, tensor, typed};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::indices::{Indices, SeqStarts};
use crate::kv_pages::{LayerPages, Places};
use crate::tensor::Tensor;

impl Ops {
    /// `qkv: [T, (H + 2·H_kv)·D]` → output `[T, H·D]` and log-sum-exp `[T, H]`.
    pub(crate) fn attention(
        &self,
        model: &ModelConfig,
        seq_starts: &SeqStarts<'_>,
        qkv: &Tensor,
        room: usize,
    ) -> Result<(Tensor, Tensor)> {
        on_gpu!(qkv, qkv => {
            let (out, lse) = crate::gpu::attention(model, seq_starts.gpu()?, qkv, room)?;
            Ok((Tensor::Gpu(out), Tensor::Gpu(lse)))
        });
        no_room(room);
        typed!(qkv, F => {
            let view = read::<F>(qkv)?;
            let (rows, width) = (view.mat().num_rows(), model.q_dim());
            let (mut out, mut lse) = (vec![F::ZERO; rows * width], vec![F::ZERO; rows * model.num_attention_heads]);
            let out_mat = MatMut::new(&mut out, rows, width);
            attention::forward(&self.threads, &heads(model), seq_starts.host, split(model, &view), out_mat, &mut lse);
            Ok((tensor(out, (rows, width))?, tensor(lse, (rows, model.num_attention_heads))?))
        })
    }

    /// The gradient of `qkv`.
    pub(crate) fn attention_backward(
        &self,
        model: &ModelConfig,
        seq_starts: &SeqStarts<'_>,
        qkv: &Tensor,
        (out, lse): (&Tensor, &Tensor),
        dout: &Tensor,
        room: usize,
    ) -> Result<Tensor> {
        on_gpu!(qkv, qkv => {
            let (starts, saved) = (seq_starts.gpu()?, (out.gpu()?, lse.gpu()?));
            let dqkv = crate::gpu::attention_backward(model, starts, qkv, saved, dout.gpu()?, room)?;
            Ok(Tensor::Gpu(dqkv))
        });
        no_room(room);
        typed!(qkv, F => {
            let (qkv_view, out, lse, dout) = (read::<F>(qkv)?, read::<F>(out)?, read::<F>(lse)?, read::<F>(dout)?);
            let (rows, cols) = (qkv.rows(), qkv.cols());
            let mut dqkv = vec![F::ZERO; rows * cols];
            let (dq, rest) = MatMut::new(&mut dqkv, rows, cols).split_cols(model.q_dim());
            let (dk, dv) = rest.split_cols(model.kv_dim());
            let saved = attention::Saved { out: out.mat(), lse: lse.slice() };
            let (inputs, grads) = (split(model, &qkv_view), QkvGrads { dq, dk, dv });
            attention::backward(&self.threads, &heads(model), seq_starts.host, inputs, saved, dout.mat(), grads);
            tensor(dqkv, (rows, cols))
        })
    }

    /// On a GPU, in one pass: adds the bias, turns queries and keys, and writes keys and values to their pages, if there
    /// are any.
    pub(crate) fn finish_qkv(
        &self,
        model: &ModelConfig,
        table: &RopeTable,
        positions: &Indices<'_>,
        bias: Option<&Tensor>,
        qkv: &Tensor,
        pages: Option<(&Places<'_>, &LayerPages)>,
    ) -> Result<()> {
        on_gpu!(qkv, qkv => {
            let bias = bias.map(Tensor::gpu).transpose()?;
            crate::gpu::finish_qkv(model, table.gpu()?, positions.gpu()?, bias, qkv, pages)
        });
        let _ = (model, table, positions, bias, qkv, pages);
        unreachable!("asked for on a GPU only")
    }

    /// Writes new keys and values to their pages.
    pub(crate) fn write_pages(
        &self,
        model: &ModelConfig,
        places: &Places<'_>,
        pages: &LayerPages,
        qkv: &Tensor,
    ) -> Result<()> {
        on_gpu!(qkv, qkv => crate::gpu::write_pages(model, places, pages, qkv));
        typed!(qkv, F => {
            let view = read::<F>(qkv)?;
            let Qkv { k, v, .. } = split(model, &view);
            edit_slice(&pages.keys, |keys: &mut [F]| kv_scatter::forward(k, &places.slots, keys))?;
            edit_slice(&pages.values, |values: &mut [F]| kv_scatter::forward(v, &places.slots, values))
        })
    }

    /// Attends over the pages, which hold the new keys and values already.
    pub(crate) fn paged_attention(
        &self,
        model: &ModelConfig,
        batch: &Batch,
        places: &Places<'_>,
        pages: &LayerPages,
        qkv: &Tensor,
    ) -> Result<Tensor> {
        on_gpu!(qkv, qkv => Ok(Tensor::Gpu(crate::gpu::paged_attention(model, places, pages, qkv)?)));
        typed!(qkv, F => {
            let view = read::<F>(qkv)?;
            let q = split(model, &view).q;
            let (keys, values) = (read::<F>(&pages.keys)?, read::<F>(&pages.values)?);
            let memory =
                Pages { keys: keys.slice(), values: values.slice(), block_size: places.tables.block_size };
            let sequences = Sequences {
                seq_starts: &batch.seq_starts,
                context_lens: &places.context_lens,
                block_tables: &places.tables.tables,
            };
            let (rows, width) = (q.num_rows(), model.q_dim());
            let mut out = vec![F::ZERO; rows * width];
            let out_mat = MatMut::new(&mut out, rows, width);
            paged_attention::forward(&self.threads, &heads(model), &sequences, &memory, q, out_mat);
            tensor(out, (rows, width))
        })
    }
}

fn heads<F: Float>(model: &ModelConfig) -> Heads<F> {
    Heads {
        num_heads: model.num_attention_heads,
        num_kv_heads: model.num_key_value_heads,
        head_dim: model.head_dim,
        scale: F::from_f64((model.head_dim as f64).sqrt().recip()),
    }
}

fn split<'a, F: Real>(model: &ModelConfig, qkv: &'a View<'_, F>) -> Qkv<'a, F> {
    let (q, kv) = (model.q_dim(), model.kv_dim());
    let mat = qkv.mat();
    Qkv {
        q: mat.cols(0..q),
        k: mat.cols(q..q + kv),
        v: mat.cols(q + kv..q + 2 * kv),
    }
}
