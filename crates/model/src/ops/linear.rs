//! Products with weights, and those with an adapter that stands beside them.

use candle_core::DType;
use half::bf16;
use updraft_kernels::{Float, Mat, MatMut, Weight, linear};

use super::{Ops, Rows, no_room, on_gpu};
use crate::bridge::{Real, edit, edit_slice, read, tensor, typed};
use crate::error::Result;
use crate::quantized;
use crate::tensor::Tensor;

impl Ops {
    /// `x·wᵀ + bias`: `x: [T, K]`, `w: [N, K]` → `[T, N]`; `w` may be kept in bf16 or quantized where `x` is f32.
    pub(crate) fn linear(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        room: usize,
    ) -> Result<Tensor> {
        on_gpu!(x, x => {
            let bias = bias.map(Tensor::gpu).transpose()?;
            Ok(Tensor::Gpu(crate::gpu::linear(x, w.gpu()?, bias, room)?))
        });
        no_room(room);
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
        self.linear(x, head, None, 0)
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

    /// `x·wᵀ` behind each row of `x`: `wide: [T, K + N]` begins with `x`, and `w: [N, K]`.
    pub(crate) fn linear_beside(&self, wide: &Tensor, w: &Tensor) -> Result<()> {
        on_gpu!(wide, wide => crate::gpu::linear_beside(wide, w.gpu()?));
        typed!(wide, F => {
            let w = read::<F>(w)?;
            edit(wide, |wide: MatMut<'_, F>| {
                let (x, y) = wide.split_cols(w.mat().num_cols());
                self.product(F::ONE, x.as_mat(), w.mat(), F::ZERO, y);
            })
        })
    }

    /// `dy·w` behind each row of `dy`: `wide: [T, N + K]` begins with `dy`, and `w: [N, K]`.
    pub(crate) fn linear_backward_beside(&self, wide: &Tensor, w: &Tensor) -> Result<()> {
        on_gpu!(wide, wide => crate::gpu::linear_backward_beside(wide, w.gpu()?));
        typed!(wide, F => {
            let w = read::<F>(w)?;
            edit(wide, |wide: MatMut<'_, F>| {
                let (dy, dx) = wide.split_cols(w.mat().num_rows());
                linear::backward_input(&self.threads, F::ONE, dy.as_mat(), w.mat(), F::ZERO, dx);
            })
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
}
