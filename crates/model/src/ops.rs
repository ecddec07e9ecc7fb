//! The kernels as operations on tensors: the one place that knows which device and number type run.

mod attention;
mod cross_entropy;
mod linear;

use candle_core::{DType, Device};
use half::bf16;
use updraft_kernels::rope::Table;
use updraft_kernels::{Float, MatMut, Threads, embedding, noise, q8_0, rms_norm, rope, swiglu};

use crate::bridge::{Real, RopeTable, edit, edit_slice, read, tensor, typed, unsupported_dtype};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::indices::{Indices, RowKeys};
use crate::quantized;
use crate::tensor::Tensor;

/// Only a GPU's operations leave room behind the rows of what they compute, as many columns as they are asked for.
fn no_room(room: usize) {
    debug_assert_eq!(room, 0, "room is asked for on a GPU");
}

/// Leaves for the GPU's operation where the tensor lies there.
macro_rules! on_gpu {
    ($tensor:expr, $gpu:ident => $value:expr) => {
        #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
        if let crate::tensor::Tensor::Gpu($gpu) = $tensor {
            return $value;
        }
    };
}
pub(crate) use on_gpu;

/// What a row's bits may depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rows {
    /// The batch around it: the fastest products, for training.
    Together,
    /// Nothing but itself, so that greedy output is the same in any company; for serving.
    Apart,
}

/// The operations, with the threads that run them.
///
/// `room`, where one takes it, is how many columns it leaves free behind each row of its output, for a weight's border.
#[derive(Debug, Clone)]
pub(crate) struct Ops {
    pub(crate) threads: Threads,
    pub(crate) rows: Rows,
}

/// A norm's output and what its backward pass needs, `y: [T, C]`, `inv_rms: [T]`.
pub(crate) struct Normed {
    pub(crate) y: Tensor,
    pub(crate) inv_rms: Tensor,
}

#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
impl Normed {
    fn on_gpu((y, inv_rms): (crate::gpu::Tensor, crate::gpu::Tensor)) -> Result<Self> {
        Ok(Self {
            y: Tensor::Gpu(y),
            inv_rms: Tensor::Gpu(inv_rms),
        })
    }
}

impl Ops {
    /// Rows of a table: `table: [V, C]`, `ids: [T]` → `[T, C]`, in f32 if the table is kept in bf16 or quantized.
    pub(crate) fn gather(&self, table: &Tensor, ids: &Indices<'_>) -> Result<Tensor> {
        on_gpu!(table, table => Ok(Tensor::Gpu(crate::gpu::gather(table, ids.gpu()?)?)));
        let ids = ids.host;
        if table.dtype() == DType::U8 {
            let table = read::<u8>(table)?;
            let table = quantized::blocks(&table)?;
            let cols = table.num_cols() * q8_0::NUMBERS;
            let mut out = vec![0.0_f32; ids.len() * cols];
            embedding::forward(&self.threads, table, ids, &mut out);
            return tensor(out, (ids.len(), cols));
        }
        let cols = table.cols();
        if table.dtype() == DType::BF16 {
            let mut out = vec![0.0_f32; ids.len() * cols];
            embedding::forward(&self.threads, read::<bf16>(table)?.mat(), ids, &mut out);
            return tensor(out, (ids.len(), cols));
        }
        typed!(table, F => {
            let mut out = vec![F::ZERO; ids.len() * cols];
            embedding::forward(&self.threads, read::<F>(table)?.mat(), ids, &mut out);
            tensor(out, (ids.len(), cols))
        })
    }

    /// The gradient of [`gather`](Self::gather): `dout: [N, C]`, `ids: [N]` → `[num_rows, C]`.
    pub(crate) fn scatter(
        &self,
        dout: &Tensor,
        ids: &Indices<'_>,
        num_rows: usize,
        room: usize,
    ) -> Result<Tensor> {
        on_gpu!(dout, dout => Ok(Tensor::Gpu(crate::gpu::scatter(dout, ids.gpu()?, num_rows, room)?)));
        no_room(room);
        let ids = ids.host;
        typed!(dout, F => {
            let cols = dout.cols();
            let mut out = vec![F::ZERO; num_rows * cols];
            embedding::backward(ids, read::<F>(dout)?.mat(), MatMut::new(&mut out, num_rows, cols));
            tensor(out, (num_rows, cols))
        })
    }

    /// `dtable[ids_t] += dout_t`: `dout: [T, C]`, `ids: [T]`, `dtable: [V, C]`.
    pub(crate) fn add_rows(&self, dout: &Tensor, ids: &Indices<'_>, dtable: &Tensor) -> Result<()> {
        on_gpu!(dout, dout => crate::gpu::add_rows(dout, ids.gpu()?, dtable.gpu()?));
        let ids = ids.host;
        typed!(dout, F => {
            let dout = read::<F>(dout)?;
            edit(dtable, |dtable: MatMut<'_, F>| embedding::backward(ids, dout.mat(), dtable))
        })
    }

    /// `from` into `to`, which may be some columns of a wider matrix.
    pub(crate) fn copy(&self, from: &Tensor, to: &Tensor) -> Result<()> {
        on_gpu!(from, from => crate::gpu::copy(1.0, from, to.gpu()?));
        typed!(from, F => {
            let from = read::<F>(from)?;
            edit(to, |mut to: MatMut<'_, F>| {
                for row in 0..to.num_rows() {
                    to.row_mut(row).copy_from_slice(from.mat().row(row));
                }
            })
        })
    }

    /// `alpha · from` into `to`, which may be some columns of a wider matrix.
    pub(crate) fn copy_scaled(&self, alpha: f64, from: &Tensor, to: &Tensor) -> Result<()> {
        on_gpu!(from, from => crate::gpu::copy(alpha, from, to.gpu()?));
        typed!(from, F => {
            let (alpha, from) = (F::of_f64(alpha), read::<F>(from)?);
            edit(to, |mut to: MatMut<'_, F>| {
                for row in 0..to.num_rows() {
                    let numbers = to.row_mut(row).iter_mut().zip(from.mat().row(row));
                    numbers.for_each(|(to, &from)| *to = alpha * from);
                }
            })
        })
    }

    /// `x: [T, C]`, `weight: [C]`.
    pub(crate) fn rms_norm(
        &self,
        x: &Tensor,
        weight: &Tensor,
        eps: f64,
        room: usize,
    ) -> Result<Normed> {
        on_gpu!(x, x => Normed::on_gpu(crate::gpu::rms_norm(x, None, weight.gpu()?, eps, room)?));
        no_room(room);
        typed!(x, F => {
            let (mut y, mut inv_rms) = (vec![F::ZERO; x.rows() * x.cols()], vec![F::ZERO; x.rows()]);
            let (view, weight) = (read::<F>(x)?, read::<F>(weight)?);
            rms_norm::forward(&self.threads, view.slice(), weight.slice(), F::of_f64(eps), &mut y, &mut inv_rms);
            Ok(Normed { y: tensor(y, x.dims())?, inv_rms: tensor(inv_rms, x.rows())? })
        })
    }

    /// `residual += x`, then the norm of the sum.
    pub(crate) fn add_rms_norm(
        &self,
        x: &Tensor,
        residual: &Tensor,
        weight: &Tensor,
        eps: f64,
        room: usize,
    ) -> Result<Normed> {
        on_gpu!(x, x => {
            let residual = Some(residual.gpu()?);
            Normed::on_gpu(crate::gpu::rms_norm(x, residual, weight.gpu()?, eps, room)?)
        });
        no_room(room);
        typed!(x, F => {
            let (mut y, mut inv_rms) = (vec![F::ZERO; x.rows() * x.cols()], vec![F::ZERO; x.rows()]);
            let (view, weight) = (read::<F>(x)?, read::<F>(weight)?);
            let (x_slice, weight, eps) = (view.slice(), weight.slice(), F::of_f64(eps));
            edit_slice(residual, |residual: &mut [F]| {
                rms_norm::add_forward(&self.threads, x_slice, residual, weight, eps, &mut y, &mut inv_rms);
            })?;
            Ok(Normed { y: tensor(y, x.dims())?, inv_rms: tensor(inv_rms, x.rows())? })
        })
    }

    /// Adds the gradient that goes through the norm to `dx`.
    pub(crate) fn rms_norm_backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        inv_rms: &Tensor,
        dy: &Tensor,
        dx: &Tensor,
    ) -> Result<()> {
        on_gpu!(x, x => crate::gpu::rms_norm_backward(x, weight.gpu()?, inv_rms.gpu()?, dy.gpu()?, dx.gpu()?));
        typed!(x, F => {
            let (x, weight) = (read::<F>(x)?, read::<F>(weight)?);
            let (inv_rms, dy) = (read::<F>(inv_rms)?, read::<F>(dy)?);
            let (x, weight, inv_rms, dy) = (x.slice(), weight.slice(), inv_rms.slice(), dy.slice());
            edit_slice(dx, |dx: &mut [F]| rms_norm::backward(&self.threads, x, weight, inv_rms, dy, dx))
        })
    }

    /// `dweight += Σ_t dy_t ⊙ x_t · inv_rms_t`
    pub(crate) fn rms_norm_backward_weight(
        &self,
        x: &Tensor,
        inv_rms: &Tensor,
        dy: &Tensor,
        dweight: &Tensor,
    ) -> Result<()> {
        on_gpu!(x, x => crate::gpu::rms_norm_backward_weight(x, inv_rms.gpu()?, dy.gpu()?, dweight.gpu()?));
        typed!(x, F => {
            let (x, inv_rms, dy) = (read::<F>(x)?, read::<F>(inv_rms)?, read::<F>(dy)?);
            edit_slice(dweight, |dweight: &mut [F]| {
                rms_norm::backward_weight(x.slice(), inv_rms.slice(), dy.slice(), dweight);
            })
        })
    }

    /// `x` with a share `p` of its numbers dropped and the others scaled up, `x: [T, C]`; which, the rows' keys decide for
    /// one use of them.
    pub(crate) fn dropout(&self, p: f64, keys: (&RowKeys, u64), x: &Tensor) -> Result<Tensor> {
        on_gpu!(x, x => Ok(Tensor::Gpu(crate::gpu::dropout(p, (keys.0.gpu()?, keys.1), x)?)));
        let keys = derived(keys);
        typed!(x, F => {
            let (view, shape) = (read::<F>(x)?, (x.rows(), x.cols()));
            let mut out = vec![F::ZERO; shape.0 * shape.1];
            noise::dropout(&self.threads, p, &keys, view.mat(), MatMut::new(&mut out, shape.0, shape.1));
            tensor(out, shape)
        })
    }

    /// Adds the gradient of [`dropout`](Self::dropout)'s input to `dx`.
    pub(crate) fn dropout_backward(
        &self,
        p: f64,
        keys: (&RowKeys, u64),
        dout: &Tensor,
        dx: &Tensor,
    ) -> Result<()> {
        on_gpu!(dout, dout => {
            let keys = (keys.0.gpu()?, keys.1);
            crate::gpu::dropout_backward(p, keys, dout, dx.gpu()?)
        });
        let keys = derived(keys);
        typed!(dout, F => {
            let dout = read::<F>(dout)?;
            edit(dx, |dx: MatMut<'_, F>| {
                noise::dropout_backward(&self.threads, p, &keys, dout.mat(), dx);
            })
        })
    }

    /// `x_t += magnitude_t · u`, `u` uniform between -1 and 1; `keys`, `magnitudes: [T]`, `x: [T, C]`.
    pub(crate) fn add_uniform(&self, keys: &[u64], magnitudes: &[f64], x: &Tensor) -> Result<()> {
        on_gpu!(x, x => crate::gpu::add_uniform(keys, magnitudes, x));
        typed!(x, F => edit(x, |x: MatMut<'_, F>| noise::add_uniform(keys, magnitudes, x)))
    }

    /// Turns the heads in `x: [T, n·D]` by their positions, in place.
    pub(crate) fn rope(
        &self,
        table: &RopeTable,
        positions: &Indices<'_>,
        x: &Tensor,
    ) -> Result<()> {
        on_gpu!(x, x => crate::gpu::rope(table.gpu()?, positions.gpu()?, false, x));
        let positions = positions.host;
        typed!(x, F => {
            let table = rope_table::<F>(table)?;
            edit(x, |x: MatMut<'_, F>| rope::forward(&self.threads, table, positions, x))
        })
    }

    /// Turns the gradients back.
    pub(crate) fn rope_backward(
        &self,
        table: &RopeTable,
        positions: &Indices<'_>,
        dx: &Tensor,
    ) -> Result<()> {
        on_gpu!(dx, dx => crate::gpu::rope(table.gpu()?, positions.gpu()?, true, dx));
        let positions = positions.host;
        typed!(dx, F => {
            let table = rope_table::<F>(table)?;
            edit(dx, |dx: MatMut<'_, F>| rope::backward(&self.threads, table, positions, dx))
        })
    }

    /// `gate_up: [T, 2·I]` → `[T, I]`.
    pub(crate) fn swiglu(&self, gate_up: &Tensor, room: usize) -> Result<Tensor> {
        on_gpu!(gate_up, gate_up => Ok(Tensor::Gpu(crate::gpu::swiglu(gate_up, room)?)));
        no_room(room);
        typed!(gate_up, F => {
            let view = read::<F>(gate_up)?;
            let (rows, inner) = (view.mat().num_rows(), view.mat().num_cols() / 2);
            let mut h = vec![F::ZERO; rows * inner];
            let (gate, up) = (view.mat().cols(0..inner), view.mat().cols(inner..2 * inner));
            swiglu::forward(&self.threads, gate, up, MatMut::new(&mut h, rows, inner));
            tensor(h, (rows, inner))
        })
    }

    /// In place: `gate_up` becomes its own gradient, and `dh` becomes the forward output once more.
    pub(crate) fn swiglu_backward(&self, gate_up: &Tensor, dh: &Tensor) -> Result<()> {
        on_gpu!(gate_up, gate_up => crate::gpu::swiglu_backward(gate_up, dh.gpu()?));
        typed!(gate_up, F => {
            edit(gate_up, |gate_up: MatMut<'_, F>| {
                let inner = gate_up.num_cols() / 2;
                let (gate, up) = gate_up.split_cols(inner);
                edit(dh, |dh: MatMut<'_, F>| swiglu::backward_recompute(&self.threads, gate, up, dh))
            })?
        })
    }
}

fn derived((keys, use_): (&RowKeys, u64)) -> Vec<u64> {
    let keys = keys.host.iter();
    keys.map(|&key| noise::derive(key, use_)).collect()
}

/// A rotary table for positions `0..num_positions` in a number type.
pub(crate) fn new_rope_table(model: &ModelConfig, dtype: candle_core::DType) -> Result<RopeTable> {
    let frequencies = model.rope.inverse_frequencies(model.head_dim);
    match dtype {
        candle_core::DType::F32 => Ok(RopeTable::F32(Table::new(
            &frequencies,
            model.max_len(),
            1.0,
        ))),
        candle_core::DType::F64 => Ok(RopeTable::F64(Table::new(
            &frequencies,
            model.max_len(),
            1.0,
        ))),
        other => Err(unsupported_dtype(other)),
    }
}

/// Whether there are kernels for a device.
pub(crate) fn check_device(device: &Device) -> Result<()> {
    match device {
        Device::Cpu => Ok(()),
        other => Err(Error::Device {
            device: format!("{:?}", other.location()),
        }),
    }
}

fn rope_table<F: Real>(table: &RopeTable) -> Result<&Table<F>> {
    F::table(table).ok_or_else(|| unsupported_dtype(F::DTYPE))
}
