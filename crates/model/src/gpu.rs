//! The decoder on a GPU: its tensors, and the kernels as operations on them.

mod ops;
mod tensor;
mod training;

pub(crate) use ops::{
    add_bias_gradient, add_linear, add_rows, add_uniform, add_weight_gradient, attention,
    attention_backward, copy, cross_entropy, cross_entropy_backward, dropout, dropout_backward,
    finish_qkv, gather, linear, linear_backward, linear_backward_beside, linear_backward_into,
    linear_beside, logits, paged_attention, rms_norm, rms_norm_backward, rms_norm_backward_weight,
    rope, scatter, swiglu, swiglu_backward, write_pages,
};
pub(crate) use tensor::Tensor;

use crate::error::Error;

/// What reads or writes a GPU's memory as if it were the host's.
pub(crate) fn host_only() -> Error {
    Error::Unsupported {
        what: "this operation on a GPU".to_owned(),
        instead: "load the model on the CPU for merging, quantized weights and whole modules",
    }
}
