//! The kernels as operations on tensors: the one place that knows which device and number type run.

mod attention;
mod cross_entropy;

use candle_core::{DType, Device};
use half::bf16;
use updraft_kernels::rope::Table;
use updraft_kernels::{
    Float, Mat, MatMut, Threads, Weight, embedding, linear, noise, q8_0, rms_norm, rope, swiglu,
};

use crate::bridge::{Real, RopeTable, edit, edit_slice, read, tensor, typed, unsupported_dtype};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::indices::Indices;
use crate::quantized;
use crate::tensor::Tensor;

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
    ) -> Result<Tensor> {
        on_gpu!(dout, dout => Ok(Tensor::Gpu(crate::gpu::scatter(dout, ids.gpu()?, num_rows)?)));
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
        on_gpu!(from, from => crate::gpu::copy(from, to.gpu()?));
        typed!(from, F => {
            let from = read::<F>(from)?;
            edit(to, |mut to: MatMut<'_, F>| {
                for row in 0..to.num_rows() {
                    to.row_mut(row).copy_from_slice(from.mat().row(row));
                }
            })
        })
    }

    /// `x: [T, C]`, `weight: [C]`.
    pub(crate) fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Normed> {
        on_gpu!(x, x => Normed::on_gpu(crate::gpu::rms_norm(x, None, weight.gpu()?, eps)?));
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
    ) -> Result<Normed> {
        on_gpu!(x, x => Normed::on_gpu(crate::gpu::rms_norm(x, Some(residual.gpu()?), weight.gpu()?, eps)?));
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

    /// `x·wᵀ + bias`: `x: [T, K]`, `w: [N, K]` → `[T, N]`; `w` may be kept in bf16 or quantized where `x` is f32.
    pub(crate) fn linear(&self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        on_gpu!(x, x => Ok(Tensor::Gpu(crate::gpu::linear(x, w.gpu()?, bias.map(Tensor::gpu).transpose()?)?)));
        match w.dtype() {
            DType::BF16 => return self.linear_bf16(x, w, bias),
            DType::U8 => return self.linear_q8_0(x, w, bias),
            _ => {}
        }
        typed!(x, F => {
            let (x, w) = (read::<F>(x)?, read::<F>(w)?);
            let (rows, cols) = (x.mat().num_rows(), w.mat().num_rows());
            let mut y = vec![F::ZERO; rows * cols];
            self.product(F::ONE, x.mat(), w.mat(), F::ZERO, MatMut::new(&mut y, rows, cols));
            self.with_bias(y, (rows, cols), bias)
        })
    }

    /// The head's product, `x: [N, C]`, `head: [V, C]` → `[N, V]`; on a GPU in f32 whatever the factors.
    pub(crate) fn logits(&self, x: &Tensor, head: &Tensor) -> Result<Tensor> {
        on_gpu!(x, x => Ok(Tensor::Gpu(crate::gpu::logits(x, head.gpu()?)?)));
        self.linear(x, head, None)
    }

    fn linear_bf16(&self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (x, w) = (read::<f32>(x)?, read::<bf16>(w)?);
        let (rows, cols) = (x.mat().num_rows(), w.mat().num_rows());
        let mut y = vec![0.0; rows * cols];
        let out = MatMut::new(&mut y, rows, cols);
        self.product(1.0, x.mat(), w.mat(), 0.0, out);
        self.with_bias(y, (rows, cols), bias)
    }

    /// There is one product with a quantized weight, and its rows stand apart.
    fn linear_q8_0(&self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (x, w) = (read::<f32>(x)?, read::<u8>(w)?);
        let (x, w) = (x.mat(), quantized::blocks(&w)?);
        let (rows, cols) = (x.num_rows(), w.num_rows());
        let mut y = vec![0.0; rows * cols];
        let out = MatMut::new(&mut y, rows, cols);
        linear::forward_invariant(&self.threads, 1.0, x, w, 0.0, out);
        self.with_bias(y, (rows, cols), bias)
    }

    fn with_bias<F: Real>(
        &self,
        mut y: Vec<F>,
        (rows, cols): (usize, usize),
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        if let Some(bias) = bias {
            let (bias, y) = (read::<F>(bias)?, MatMut::new(&mut y, rows, cols));
            linear::add_bias(&self.threads, bias.slice(), y);
        }
        tensor(y, (rows, cols))
    }

    /// `y += alpha · x·wᵀ`, where `y` may be some columns of a wider matrix.
    pub(crate) fn add_linear(&self, alpha: f64, x: &Tensor, w: &Tensor, y: &Tensor) -> Result<()> {
        on_gpu!(x, x => crate::gpu::add_linear(alpha, x, w.gpu()?, y.gpu()?));
        typed!(x, F => {
            let (x, w) = (read::<F>(x)?, read::<F>(w)?);
            let (x, w) = (x.mat(), w.mat());
            edit(y, |y: MatMut<'_, F>| self.product(F::of_f64(alpha), x, w, F::ONE, y))
        })
    }

    fn product<F: Real, W: Weight<F>>(
        &self,
        alpha: F,
        x: Mat<'_, F>,
        w: Mat<'_, W>,
        beta: F,
        y: MatMut<'_, F>,
    ) {
        match self.rows {
            Rows::Together => linear::forward(&self.threads, alpha, x, w, beta, y),
            Rows::Apart => linear::forward_invariant(&self.threads, alpha, x, w, beta, y),
        }
    }

    /// `x` with a share `p` of its numbers dropped and the others scaled up; `keys: [T]`, `x: [T, C]`.
    pub(crate) fn dropout(&self, p: f64, keys: &[u64], x: &Tensor) -> Result<Tensor> {
        on_gpu!(x, x => Ok(Tensor::Gpu(crate::gpu::dropout(p, keys, x)?)));
        typed!(x, F => {
            let (view, shape) = (read::<F>(x)?, (x.rows(), x.cols()));
            let mut out = vec![F::ZERO; shape.0 * shape.1];
            noise::dropout(&self.threads, p, keys, view.mat(), MatMut::new(&mut out, shape.0, shape.1));
            tensor(out, shape)
        })
    }

    /// Adds the gradient of [`dropout`](Self::dropout)'s input to `dx`.
    pub(crate) fn dropout_backward(
        &self,
        p: f64,
        keys: &[u64],
        dout: &Tensor,
        dx: &Tensor,
    ) -> Result<()> {
        on_gpu!(dout, dout => crate::gpu::dropout_backward(p, keys, dout, dx.gpu()?));
        typed!(dout, F => {
            let dout = read::<F>(dout)?;
            edit(dx, |dx: MatMut<'_, F>| {
                noise::dropout_backward(&self.threads, p, keys, dout.mat(), dx);
            })
        })
    }

    /// `x_t += magnitude_t · u`, `u` uniform between -1 and 1; `keys`, `magnitudes: [T]`, `x: [T, C]`.
    pub(crate) fn add_uniform(&self, keys: &[u64], magnitudes: &[f64], x: &Tensor) -> Result<()> {
        on_gpu!(x, x => crate::gpu::add_uniform(keys, magnitudes, x));
        typed!(x, F => edit(x, |x: MatMut<'_, F>| noise::add_uniform(keys, magnitudes, x)))
    }

    /// `dy·w`: `dy: [T, N]`, `w: [N, K]` → `[T, K]`.
    pub(crate) fn linear_backward(&self, dy: &Tensor, w: &Tensor) -> Result<Tensor> {
        on_gpu!(dy, dy => Ok(Tensor::Gpu(crate::gpu::linear_backward(dy, w.gpu()?)?)));
        if w.dtype() == DType::BF16 {
            let (dy, w) = (read::<f32>(dy)?, read::<bf16>(w)?);
            let (rows, cols) = (dy.mat().num_rows(), w.mat().num_cols());
            let mut dx = vec![0.0; rows * cols];
            let out = MatMut::new(&mut dx, rows, cols);
            linear::backward_input(&self.threads, 1.0, dy.mat(), w.mat(), 0.0, out);
            return tensor(dx, (rows, cols));
        }
        typed!(dy, F => {
            let (dy, w) = (read::<F>(dy)?, read::<F>(w)?);
            let (rows, cols) = (dy.mat().num_rows(), w.mat().num_cols());
            let mut dx = vec![F::ZERO; rows * cols];
            linear::backward_input(&self.threads, F::ONE, dy.mat(), w.mat(), F::ZERO, MatMut::new(&mut dx, rows, cols));
            tensor(dx, (rows, cols))
        })
    }

    /// `dx = alpha · dy·w + beta · dx`, where `dx` may be some columns of a wider matrix.
    pub(crate) fn linear_backward_into(
        &self,
        alpha: f64,
        dy: &Tensor,
        w: &Tensor,
        beta: f64,
        dx: &Tensor,
    ) -> Result<()> {
        on_gpu!(dy, dy => crate::gpu::linear_backward_into(alpha, dy, w.gpu()?, beta, dx.gpu()?));
        typed!(dy, F => {
            let (dy, w) = (read::<F>(dy)?, read::<F>(w)?);
            let (dy, w, alpha, beta) = (dy.mat(), w.mat(), F::of_f64(alpha), F::of_f64(beta));
            edit(dx, |dx: MatMut<'_, F>| linear::backward_input(&self.threads, alpha, dy, w, beta, dx))
        })
    }

    /// `dw += alpha · dyᵀ·x`.
    pub(crate) fn add_weight_gradient(
        &self,
        alpha: f64,
        dy: &Tensor,
        x: &Tensor,
        dw: &Tensor,
    ) -> Result<()> {
        on_gpu!(dy, dy => crate::gpu::add_weight_gradient(alpha, dy, x.gpu()?, dw.gpu()?));
        typed!(dy, F => {
            let (dy, x) = (read::<F>(dy)?, read::<F>(x)?);
            let (dy, x) = (dy.mat(), x.mat());
            edit(dw, |dw: MatMut<'_, F>| {
                linear::backward_weight(&self.threads, F::of_f64(alpha), dy, x, F::ONE, dw);
            })
        })
    }

    /// `dbias += Σ_t dy_t`
    pub(crate) fn add_bias_gradient(&self, dy: &Tensor, dbias: &Tensor) -> Result<()> {
        on_gpu!(dy, dy => crate::gpu::add_bias_gradient(dy, dbias.gpu()?));
        typed!(dy, F => {
            let dy = read::<F>(dy)?;
            edit_slice(dbias, |dbias: &mut [F]| linear::backward_bias(dy.mat(), dbias))
        })
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
    pub(crate) fn swiglu(&self, gate_up: &Tensor) -> Result<Tensor> {
        on_gpu!(gate_up, gate_up => Ok(Tensor::Gpu(crate::gpu::swiglu(gate_up)?)));
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
