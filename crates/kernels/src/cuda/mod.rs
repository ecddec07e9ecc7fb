//! The operations on a GPU: one `.cu` file of kernels and one room that launches them for each.
//!
//! Shapes, formulas and names are those of the rooms for the CPU, which are the reference that the tests compare with.
//! What differs: numbers are f32, f16 or bf16 and every sum is kept in f32; outputs lie in a [`Gpu`]'s memory; a launch
//! returns before the work is done, and what reads memory back waits for it. Nothing is added atomically, so the same
//! input gives the same bits every time.
//!
//! With feature `cuda` the kernels are compiled by `nvcc` for a capability, [`Gpu::new`] opens a device. With feature
//! `cuda-emulator` the same sources are compiled for the CPU, and [`Gpu::emulated`] runs them there, slowly but exactly
//! as a GPU would, to check kernels and launches where there is none.
//!
//! ```
//! # #[cfg(feature = "cuda-emulator")] {
//! use updraft_kernels::cuda::{Gpu, rms_norm};
//!
//! let gpu = Gpu::emulated();
//! let (x, weight) = (gpu.upload(&[3.0_f32, 4.0, 0.0, 0.0])?, gpu.upload(&[1.0_f32; 4])?);
//! let (mut normed, mut inv_rms) = (gpu.zeros::<f32>(4)?, gpu.zeros::<f32>(1)?);
//! rms_norm::forward(&gpu, x.mat(1, 4), weight.view(), 0.0, &normed.mat_mut(1, 4), &inv_rms.view_mut())?;
//! assert!((gpu.download(normed.view())?[0] - 1.2).abs() < 1e-6);
//! # }
//! # Ok::<(), updraft_kernels::cuda::Error>(())
//! ```
//!
//! # Panics
//! As on the CPU, shapes are the caller's promise: a wrong one panics before anything is launched.

#![allow(unsafe_code, reason = "launching kernels and copying device memory")]

#[cfg(feature = "cuda")]
mod blas;
mod device;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "cuda-emulator")]
mod emulator;
mod error;
mod launch;
mod memory;
#[cfg(feature = "cuda")]
mod small_blocks;
#[cfg(test)]
mod tests;

pub mod adamw;
pub mod attention;
pub mod cast;
pub mod embedding;
pub mod gathered;
pub mod linear;
pub mod linear_cross_entropy;
#[cfg(feature = "nccl")]
pub mod nccl;
pub mod noise;
pub mod paged_attention;
pub mod rms_norm;
pub mod rope;
pub mod sampling;
pub mod swiglu;

pub use device::Gpu;
#[cfg(feature = "cuda-emulator")]
pub use device::Traffic;
pub use error::Error;
pub use memory::{Buffer, Element, Mat, MatMut, Number, View, ViewMut};

/// What a call on a GPU returns.
pub type Result<T> = std::result::Result<T, Error>;
