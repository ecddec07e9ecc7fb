//! The kernels as operations on tensors; what each computes is said where `Ops` says it for the CPU.
//!
//! Weights have the type of the activations; gradients of parameters add up in f32.

use updraft_kernels::attention::Heads;
use updraft_kernels::cuda::attention::{Qkv, QkvGrads, Saved, Sequences};
use updraft_kernels::cuda::{self as kernels, Gpu, View, rope::Table};

use super::tensor::{Element, Tensor, typed};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::kv_pages::{LayerPages, Places};

pub(crate) fn gather(table: &Tensor, ids: View<'_, u32>) -> Result<Tensor> {
    typed!(table, T => {
        let (gpu, cols) = (table.gpu(), table.cols());
        let mut out = gpu.alloc::<T>(ids.len() * cols)?;
        let out_mat = out.mat_mut(ids.len(), cols);
        kernels::embedding::forward(gpu, table.read::<T>().mat(), ids, &out_mat)?;
        Ok(Tensor::of_buffer(gpu, out, &[ids.len(), cols]))
    })
}

pub(crate) fn scatter(
    dout: &Tensor,
    ids: View<'_, u32>,
    num_rows: usize,
    room: usize,
) -> Result<Tensor> {
    let cols = dout.cols();
    let out = dout.zeros(&[num_rows, cols + room])?.narrow(1, 0, cols);
    typed!(dout, T => {
        let (read, mut write) = (dout.read::<T>(), out.write::<T>());
        kernels::embedding::scatter(dout.gpu(), read.mat(), ids, &write.mat())?;
    });
    Ok(out)
}

pub(crate) fn add_rows(dout: &Tensor, ids: View<'_, u32>, dtable: &Tensor) -> Result<()> {
    let dout = dout.cast(dtable.dtype())?;
    typed!(dtable, T => {
        let gpu = dout.gpu();
        let (dout, mut dtable) = (dout.read::<T>(), dtable.write::<T>());
        Ok(kernels::embedding::backward(gpu, ids, dout.mat(), &dtable.mat())?)
    })
}

/// `alpha · from`
pub(crate) fn copy(alpha: f64, from: &Tensor, to: &Tensor) -> Result<()> {
    typed!(from, T => {
        let (read, mut to) = (from.read::<T>(), to.write::<T>());
        Ok(kernels::cast::axpby(from.gpu(), alpha as f32, read.mat(), 0.0, &to.mat())?)
    })
}

/// The norm and the roots; adds `x` to `residual` first, if there is one.
pub(crate) fn rms_norm(
    x: &Tensor,
    residual: Option<&Tensor>,
    weight: &Tensor,
    eps: f64,
    room: usize,
) -> Result<(Tensor, Tensor)> {
    let y = x.alloc_with_room([x.rows(), x.cols()], room)?;
    typed!(x, T => {
        let (gpu, rows) = (x.gpu(), x.rows());
        let mut inv_rms = gpu.alloc::<f32>(rows)?;
        let (x, weight, mut write) = (x.read::<T>(), weight.read::<T>(), y.write::<T>());
        let (y_mat, roots) = (write.mat(), inv_rms.view_mut());
        match residual {
            None => kernels::rms_norm::forward(gpu, x.mat(), weight.view(), eps as f32, &y_mat, &roots)?,
            Some(residual) => {
                let mut residual = residual.write::<T>();
                let (x, residual) = (x.view(), residual.view());
                kernels::rms_norm::add_forward(gpu, x, residual, weight.view(), eps as f32, &y_mat, &roots)?;
            }
        }
        drop(write);
        Ok((y, Tensor::of_buffer(gpu, inv_rms, &[rows])))
    })
}

pub(crate) fn rms_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    inv_rms: &Tensor,
    dy: &Tensor,
    dx: &Tensor,
) -> Result<()> {
    typed!(x, T => {
        let gpu = x.gpu();
        let (x, weight, inv_rms) = (x.read::<T>(), weight.read::<T>(), inv_rms.read::<f32>());
        let (dy, mut dx) = (dy.read::<T>(), dx.write::<T>());
        let (weight, inv_rms) = (weight.view(), inv_rms.view());
        Ok(kernels::rms_norm::backward(gpu, x.mat(), weight, inv_rms, dy.view(), &dx.mat())?)
    })
}

pub(crate) fn rms_norm_backward_weight(
    x: &Tensor,
    inv_rms: &Tensor,
    dy: &Tensor,
    dweight: &Tensor,
) -> Result<()> {
    typed!(x, T => {
        let gpu = x.gpu();
        let (x, inv_rms, dy) = (x.read::<T>(), inv_rms.read::<f32>(), dy.read::<T>());
        let mut dweight = dweight.write::<f32>();
        let (x, inv_rms, dy) = (x.view(), inv_rms.view(), dy.view());
        Ok(kernels::rms_norm::backward_weight(gpu, x, inv_rms, dy, &dweight.view())?)
    })
}

pub(crate) fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, room: usize) -> Result<Tensor> {
    let y = x.alloc_with_room([x.rows(), w.rows()], room)?;
    typed!(x, T => {
        let (gpu, mut write) = (x.gpu(), y.write::<T>());
        let y_mat = write.mat();
        kernels::linear::forward(gpu, 1.0, x.read::<T>().mat(), w.read::<T>().mat(), 0.0, &y_mat)?;
        if let Some(bias) = bias {
            kernels::linear::add_bias(gpu, bias.read::<T>().view(), &y_mat)?;
        }
    });
    Ok(y)
}

/// Reads some columns of a buffer and writes others.
pub(crate) fn linear_beside(wide: &Tensor, w: &Tensor) -> Result<()> {
    typed!(wide, T => {
        let (w, mut wide_write) = (w.read::<T>(), wide.write::<T>());
        let (x, y) = wide_write.mat().split_cols(w.mat().num_cols());
        Ok(kernels::linear::forward(wide.gpu(), 1.0, x.as_mat(), w.mat(), 0.0, &y)?)
    })
}

pub(crate) fn linear_backward_beside(wide: &Tensor, w: &Tensor) -> Result<()> {
    typed!(wide, T => {
        let (w, mut wide_write) = (w.read::<T>(), wide.write::<T>());
        let (dy, dx) = wide_write.mat().split_cols(w.mat().num_rows());
        Ok(kernels::linear::backward_input(wide.gpu(), 1.0, dy.as_mat(), w.mat(), 0.0, &dx)?)
    })
}

/// The head's product in f32.
pub(crate) fn logits(x: &Tensor, head: &Tensor) -> Result<Tensor> {
    typed!(x, T => {
        let (gpu, rows, cols) = (x.gpu(), x.rows(), head.rows());
        let mut y = gpu.alloc::<f32>(rows * cols)?;
        let y_mat = y.mat_mut(rows, cols);
        kernels::linear::forward(gpu, 1.0, x.read::<T>().mat(), head.read::<T>().mat(), 0.0, &y_mat)?;
        Ok(Tensor::of_buffer(gpu, y, &[rows, cols]))
    })
}

pub(crate) fn add_linear(alpha: f64, x: &Tensor, w: &Tensor, y: &Tensor) -> Result<()> {
    typed!(x, T => {
        let (x_read, w, mut y) = (x.read::<T>(), w.read::<T>(), y.write::<T>());
        let (x_mat, y) = (x_read.mat(), y.mat());
        Ok(kernels::linear::forward(x.gpu(), alpha as f32, x_mat, w.mat(), 1.0, &y)?)
    })
}

pub(crate) fn linear_backward(dy: &Tensor, w: &Tensor) -> Result<Tensor> {
    let dx = dy.alloc(&[dy.rows(), w.cols()])?;
    linear_backward_into(1.0, dy, w, 0.0, &dx)?;
    Ok(dx)
}

pub(crate) fn linear_backward_into(
    alpha: f64,
    dy: &Tensor,
    w: &Tensor,
    beta: f64,
    dx: &Tensor,
) -> Result<()> {
    typed!(dy, T => {
        let (gpu, alpha, beta) = (dy.gpu(), alpha as f32, beta as f32);
        let (dy, w, mut dx) = (dy.read::<T>(), w.read::<T>(), dx.write::<T>());
        Ok(kernels::linear::backward_input(gpu, alpha, dy.mat(), w.mat(), beta, &dx.mat())?)
    })
}

pub(crate) fn add_weight_gradient(alpha: f64, dy: &Tensor, x: &Tensor, dw: &Tensor) -> Result<()> {
    typed!(dy, T => {
        let (gpu, alpha) = (dy.gpu(), alpha as f32);
        let (dy, x, mut dw) = (dy.read::<T>(), x.read::<T>(), dw.write::<f32>());
        Ok(kernels::linear::backward_weight(gpu, alpha, dy.mat(), x.mat(), 1.0, &dw.mat())?)
    })
}

pub(crate) fn add_bias_gradient(dy: &Tensor, dbias: &Tensor) -> Result<()> {
    typed!(dy, T => {
        let gpu = dy.gpu();
        let (dy, mut dbias) = (dy.read::<T>(), dbias.write::<f32>());
        Ok(kernels::linear::backward_bias(gpu, dy.mat(), &dbias.view())?)
    })
}

pub(crate) fn dropout(p: f64, keys: (View<'_, u64>, u64), x: &Tensor) -> Result<Tensor> {
    let out = x.alloc(&[x.rows(), x.cols()])?;
    typed!(x, T => {
        let (x_read, mut out) = (x.read::<T>(), out.write::<T>());
        kernels::noise::dropout(x.gpu(), p, keys, x_read.mat(), &out.mat())?;
    });
    Ok(out)
}

pub(crate) fn dropout_backward(
    p: f64,
    keys: (View<'_, u64>, u64),
    dout: &Tensor,
    dx: &Tensor,
) -> Result<()> {
    typed!(dout, T => {
        let (read, mut dx) = (dout.read::<T>(), dx.write::<T>());
        Ok(kernels::noise::dropout_backward(dout.gpu(), p, keys, read.mat(), &dx.mat())?)
    })
}

/// The noise is drawn on the CPU, so that it is the same there and here.
pub(crate) fn add_uniform(keys: &[u64], magnitudes: &[f64], x: &Tensor) -> Result<()> {
    let (rows, cols) = (x.rows(), x.cols());
    let mut noise = vec![0.0_f32; rows * cols];
    let noise_mat = updraft_kernels::MatMut::new(&mut noise, rows, cols);
    updraft_kernels::noise::add_uniform(keys, magnitudes, noise_mat);
    let noise = Tensor::of_buffer(x.gpu(), x.gpu().upload(&noise)?, &[rows, cols]);
    let noise = noise.cast(x.dtype())?;
    typed!(x, T => {
        let (read, mut write) = (noise.read::<T>(), x.write::<T>());
        Ok(kernels::cast::axpby(x.gpu(), 1.0, read.mat(), 1.0, &write.mat())?)
    })
}

/// Turns, or turns back.
pub(crate) fn rope(table: &Table, positions: View<'_, u32>, back: bool, x: &Tensor) -> Result<()> {
    typed!(x, T => {
        let turn = if back { kernels::rope::backward } else { kernels::rope::forward };
        Ok(turn(x.gpu(), table, positions, &x.write::<T>().mat())?)
    })
}

pub(crate) fn swiglu(gate_up: &Tensor, room: usize) -> Result<Tensor> {
    let h = gate_up.alloc_with_room([gate_up.rows(), gate_up.cols() / 2], room)?;
    typed!(gate_up, T => {
        let (read, mut write) = (gate_up.read::<T>(), h.write::<T>());
        kernels::swiglu::forward(gate_up.gpu(), read.mat(), &write.mat())?;
    });
    Ok(h)
}

pub(crate) fn swiglu_backward(gate_up: &Tensor, dh: &Tensor) -> Result<()> {
    typed!(gate_up, T => {
        let (mut gate_up_write, mut dh) = (gate_up.write::<T>(), dh.write::<T>());
        let (gate_up_mat, dh) = (gate_up_write.mat(), dh.mat());
        Ok(kernels::swiglu::backward_recompute(gate_up.gpu(), &gate_up_mat, &dh)?)
    })
}

pub(crate) fn attention(
    model: &ModelConfig,
    sequences: &Sequences,
    qkv: &Tensor,
    room: usize,
) -> Result<(Tensor, Tensor)> {
    let (gpu, rows) = (qkv.gpu(), qkv.rows());
    let mut lse = gpu.alloc::<f32>(rows * model.num_attention_heads)?;
    let out = qkv.alloc_with_room([rows, model.q_dim()], room)?;
    typed!(qkv, T => {
        let (read, mut write) = (qkv.read::<T>(), out.write::<T>());
        let (inputs, lse) = (split(model, read.mat()), lse.view_mut());
        kernels::attention::forward(gpu, &heads(model), sequences, inputs, &write.mat(), &lse)?;
    });
    let lse = Tensor::of_buffer(gpu, lse, &[rows, model.num_attention_heads]);
    Ok((out, lse))
}

pub(crate) fn attention_backward(
    model: &ModelConfig,
    sequences: &Sequences,
    qkv: &Tensor,
    (out, lse): (&Tensor, &Tensor),
    dout: &Tensor,
    room: usize,
) -> Result<Tensor> {
    let gpu = qkv.gpu();
    let dqkv = qkv.alloc_with_room([qkv.rows(), qkv.cols()], room)?;
    typed!(qkv, T => {
        let (qkv, out, lse, dout) = (qkv.read::<T>(), out.read::<T>(), lse.read::<f32>(), dout.read::<T>());
        let mut write = dqkv.write::<T>();
        let (dq, rest) = write.mat().split_cols(model.q_dim());
        let (dk, dv) = rest.split_cols(model.kv_dim());
        let saved = Saved { out: out.mat(), lse: lse.view() };
        let grads = QkvGrads { dq, dk, dv };
        let inputs = split(model, qkv.mat());
        kernels::attention::backward(gpu, &heads(model), sequences, inputs, saved, dout.mat(), &grads)?;
    });
    Ok(dqkv)
}

/// In one pass: the bias, the turn of queries and keys, keys and values to their pages.
pub(crate) fn finish_qkv(
    model: &ModelConfig,
    table: &Table,
    positions: View<'_, u32>,
    bias: Option<&Tensor>,
    qkv: &Tensor,
    pages: Option<(&Places<'_>, &LayerPages)>,
) -> Result<()> {
    let gpu = qkv.gpu();
    let pages = pages.map(|(places, pages)| -> Result<_> {
        Ok((places.gpu()?, pages.keys.gpu()?, pages.values.gpu()?))
    });
    let pages = pages.transpose()?;
    typed!(qkv, T => {
        let bias = bias.map(Tensor::read::<T>);
        let mut held = pages.map(|(there, keys, values)| (there, keys.write::<T>(), values.write::<T>()));
        let new = held.as_mut().map(|(there, keys, values)| kernels::rope::NewPages {
            slots: there.slots.view(),
            keys: keys.view(),
            values: values.view(),
        });
        let mut write = qkv.write::<T>();
        let bias = bias.as_ref().map(|bias| bias.view());
        let heads = heads(model);
        Ok(kernels::rope::finish_qkv(gpu, &heads, table, positions, bias, &write.mat(), new.as_ref())?)
    })
}

/// Writes new keys and values to their pages.
pub(crate) fn write_pages(
    model: &ModelConfig,
    places: &Places<'_>,
    pages: &LayerPages,
    qkv: &Tensor,
) -> Result<()> {
    let (gpu, slots) = (qkv.gpu(), places.gpu()?.slots.view());
    let (keys, values) = (pages.keys.gpu()?, pages.values.gpu()?);
    typed!(qkv, T => {
        let read = qkv.read::<T>();
        let Qkv { k, v, .. } = split(model, read.mat());
        kernels::paged_attention::kv_scatter(gpu, k, slots, &keys.write::<T>().view())?;
        Ok(kernels::paged_attention::kv_scatter(gpu, v, slots, &values.write::<T>().view())?)
    })
}

/// Attends over the pages, which hold the new keys and values already.
pub(crate) fn paged_attention(
    model: &ModelConfig,
    places: &Places<'_>,
    pages: &LayerPages,
    qkv: &Tensor,
) -> Result<Tensor> {
    let (gpu, there) = (qkv.gpu(), places.gpu()?);
    let (keys, values) = (pages.keys.gpu()?, pages.values.gpu()?);
    typed!(qkv, T => {
        let (read, keys, values) = (qkv.read::<T>(), keys.read::<T>(), values.read::<T>());
        let q = split(model, read.mat()).q;
        let memory = kernels::paged_attention::Pages {
            keys: keys.view(),
            values: values.view(),
            block_size: places.tables.block_size,
        };
        let mut out = gpu.alloc::<T>(q.num_rows() * model.q_dim())?;
        let out_mat = out.mat_mut(q.num_rows(), model.q_dim());
        kernels::paged_attention::forward(gpu, &heads(model), &there.sequences, &memory, q, &out_mat)?;
        Ok(Tensor::of_buffer(gpu, out, &[q.num_rows(), model.q_dim()]))
    })
}

pub(crate) fn cross_entropy(hidden: &Tensor, head: &Tensor, labels: &[u32]) -> Result<f64> {
    typed!(hidden, T => {
        let mut head_pass = HeadPass::<T>::new(hidden, head, labels)?;
        let (hidden_read, head) = (hidden.read::<T>(), head.read::<T>());
        let losses = head_pass.losses.view_mut();
        let (labels, scratch) = (head_pass.labels.view(), &mut head_pass.scratch.view_mut());
        kernels::linear_cross_entropy::forward(
            hidden.gpu(), hidden_read.mat(), head.mat(), labels, &losses, scratch,
        )?;
        head_pass.sum(hidden.gpu())
    })
}

pub(crate) fn cross_entropy_backward(
    hidden: &Tensor,
    head: &Tensor,
    labels: &[u32],
    denom: f64,
) -> Result<(f64, Tensor)> {
    let dhidden = hidden.alloc(&[hidden.rows(), hidden.cols()])?;
    typed!(hidden, T => {
        let mut head_pass = HeadPass::<T>::new(hidden, head, labels)?;
        let (hidden_read, head) = (hidden.read::<T>(), head.read::<T>());
        let mut write = dhidden.write::<T>();
        let losses = head_pass.losses.view_mut();
        let (labels, scratch) = (head_pass.labels.view(), &mut head_pass.scratch.view_mut());
        kernels::linear_cross_entropy::forward_backward(
            hidden.gpu(),
            hidden_read.mat(),
            head.mat(),
            labels,
            (1.0 / denom) as f32,
            &mut write.mat(),
            &losses,
            scratch,
        )?;
        drop(write);
        let loss = head_pass.sum(hidden.gpu())?;
        Ok((loss, dhidden))
    })
}

/// What the head needs beside its inputs.
struct HeadPass<T> {
    labels: kernels::Buffer<u32>,
    losses: kernels::Buffer<f32>,
    scratch: kernels::Buffer<T>,
}

impl<T: Element> HeadPass<T> {
    fn new(hidden: &Tensor, head: &Tensor, labels: &[u32]) -> Result<Self> {
        let (gpu, rows, vocab) = (hidden.gpu(), hidden.rows(), head.rows());
        let chunk = kernels::linear_cross_entropy::chunk_rows(rows, vocab);
        Ok(Self {
            labels: gpu.upload(labels)?,
            losses: gpu.alloc(rows)?,
            scratch: gpu.alloc(chunk * vocab)?,
        })
    }

    /// In the order of the rows, in f64.
    fn sum(&self, gpu: &Gpu) -> Result<f64> {
        let losses = gpu.download(self.losses.view())?;
        Ok(losses.iter().map(|&loss| f64::from(loss)).sum())
    }
}

fn heads(model: &ModelConfig) -> Heads<f32> {
    Heads {
        num_heads: model.num_attention_heads,
        num_kv_heads: model.num_key_value_heads,
        head_dim: model.head_dim,
        scale: (model.head_dim as f64).sqrt().recip() as f32,
    }
}

fn split<'a, T>(model: &ModelConfig, qkv: kernels::Mat<'a, T>) -> Qkv<'a, T> {
    let (q, kv) = (model.q_dim(), model.kv_dim());
    Qkv {
        q: qkv.cols(0..q),
        k: qkv.cols(q..q + kv),
        v: qkv.cols(q + kv..q + 2 * kv),
    }
}
