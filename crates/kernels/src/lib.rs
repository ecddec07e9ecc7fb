//! Fused training and decoding operations on plain buffers.
//!
//! One room holds one operation: its formula, its forward pass, its backward pass and their tests. Everything takes
//! slices or [`Mat`] views plus plain dimensions and writes outputs that the caller owns; nothing here knows tensors,
//! files or models. All operations are generic over `f32` and `f64` ([`Float`]), so that the same code that runs a model
//! in `f32` is checked in `f64` against finite differences. What serving reads, weights and the embedding table, may
//! also be kept in `bf16` ([`Weight`]) or quantized ([`q8_0`]).
//!
//! What it is not: a tensor library, an autograd, or a place for model code. Shapes are the caller's promise, so a wrong
//! one panics.
//!
//! ```
//! use updraft_kernels::{Mat, MatMut, Threads, linear, rms_norm};
//!
//! let threads = Threads::single();
//! let x = [3.0_f32, 4.0, 0.0, 0.0]; // [T = 1, C = 4]
//! let (mut normed, mut inv_rms) = ([0.0; 4], [0.0; 1]);
//! rms_norm::forward(&threads, &x, &[1.0; 4], 0.0, &mut normed, &mut inv_rms);
//! assert!((normed[0] - 1.2).abs() < 1e-6); // 3 / sqrt((9 + 16) / 4)
//!
//! let w = [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]; // [N = 2, K = 4]
//! let mut y = [0.0; 2];
//! linear::forward(&threads, 2.0, Mat::new(&normed, 1, 4), Mat::new(&w, 2, 4), 0.0, MatMut::new(&mut y, 1, 2));
//! assert!((y[1] - 3.2).abs() < 1e-6);
//! ```
//!
//! # Shape letters
//! `T` tokens of a packed batch, `H` query heads, `H_kv` key/value heads, `D` head dim, `C` hidden, `I` intermediate,
//! `V` vocabulary, `R` LoRA rank, `K` and `N` a linear's inputs and outputs. All buffers are row-major.
//!
//! # What repeats bit for bit
//! - Everything, for the same build, instruction set and thread count.
//! - [`attention`] of one sequence, whatever else is packed beside it, and whatever the thread count.
//! - [`linear::forward_invariant`] and [`paged_attention`] of one row, whatever rows are computed with it, in whatever
//!   chunks and on however many threads: the serving path is made of these and of row-wise operations.
//!
//! # Features
//! - `cuda`: [`cuda`], the operations on NVIDIA GPUs.
//! - `cuda-emulator`: the same on the CPU, to test them.

mod float;
mod mat;
mod simd;
mod softmax;
#[cfg(test)]
mod testing;
mod threads;
mod weight;

pub mod adamw;
pub mod attention;
pub mod clip;
#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
pub mod cuda;
pub mod embedding;
pub mod kv_scatter;
pub mod linear;
pub mod linear_cross_entropy;
pub mod noise;
pub mod paged_attention;
pub mod q8_0;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;

pub use float::Float;
pub use mat::{Mat, MatMut};
pub use threads::{Parts, Threads};
pub use weight::{Stored, Weight};
