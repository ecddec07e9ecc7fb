//! The head with its loss.

use candle_core::{DType, WithDType};
use half::bf16;
use updraft_kernels::{MatMut, Weight, linear_cross_entropy};

use super::{Ops, on_gpu};
use crate::bridge::{Real, edit, read, tensor, typed};
use crate::error::Result;
use crate::tensor::Tensor;

impl Ops {
    /// The summed cross-entropy of `hidden·headᵀ` against labels.
    pub(crate) fn cross_entropy(
        &self,
        hidden: &Tensor,
        head: &Tensor,
        labels: &[u32],
    ) -> Result<f64> {
        on_gpu!(hidden, hidden => crate::gpu::cross_entropy(hidden, head.gpu()?, labels));
        if head.dtype() == DType::BF16 {
            return self.cross_entropy_of::<f32, bf16>(hidden, head, labels);
        }
        typed!(hidden, F => self.cross_entropy_of::<F, F>(hidden, head, labels))
    }

    fn cross_entropy_of<F: Real, W: Weight<F> + WithDType>(
        &self,
        hidden: &Tensor,
        head: &Tensor,
        labels: &[u32],
    ) -> Result<f64> {
        let (hidden, head) = (read::<F>(hidden)?, read::<W>(head)?);
        let (hidden, head) = (hidden.mat(), head.mat());
        let mut scratch = Vec::new();
        Ok(linear_cross_entropy::forward(
            &self.threads,
            hidden,
            head,
            labels,
            &mut scratch,
        ))
    }

    /// As [`cross_entropy`](Self::cross_entropy), with the gradient of `sum / denom` by `hidden`; adds
    /// that by the head to `dhead`, if it is trained.
    pub(crate) fn cross_entropy_backward(
        &self,
        hidden: &Tensor,
        head: &Tensor,
        labels: &[u32],
        denom: f64,
        dhead: Option<&Tensor>,
    ) -> Result<(f64, Tensor)> {
        on_gpu!(hidden, hidden => {
            if dhead.is_some() {
                return Err(crate::gpu::host_only());
            }
            let (loss, dhidden) = crate::gpu::cross_entropy_backward(hidden, head.gpu()?, labels, denom)?;
            Ok((loss, Tensor::Gpu(dhidden)))
        });
        if head.dtype() == DType::BF16 {
            return self.cross_entropy_backward_of::<f32, bf16>(hidden, head, labels, denom, None);
        }
        typed!(hidden, F => match dhead {
            None => self.cross_entropy_backward_of::<F, F>(hidden, head, labels, denom, None),
            Some(dhead) => edit(dhead, |dhead: MatMut<'_, F>| {
                self.cross_entropy_backward_of::<F, F>(hidden, head, labels, denom, Some(dhead))
            })?,
        })
    }

    fn cross_entropy_backward_of<F: Real, W: Weight<F> + WithDType>(
        &self,
        hidden: &Tensor,
        head: &Tensor,
        labels: &[u32],
        denom: f64,
        dhead: Option<MatMut<'_, F>>,
    ) -> Result<(f64, Tensor)> {
        let (rows, cols) = (hidden.rows(), hidden.cols());
        let (hidden, head) = (read::<F>(hidden)?, read::<W>(head)?);
        let (mut dhidden, mut scratch) = (vec![F::ZERO; rows * cols], Vec::new());
        let grads = linear_cross_entropy::Grads {
            dhidden: MatMut::new(&mut dhidden, rows, cols),
            dhead,
        };
        let (hidden, head) = (hidden.mat(), head.mat());
        let loss = linear_cross_entropy::forward_backward(
            &self.threads,
            hidden,
            head,
            labels,
            denom,
            grads,
            &mut scratch,
        );
        Ok((loss, tensor(dhidden, (rows, cols))?))
    }
}
