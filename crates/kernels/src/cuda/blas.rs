//! Products by cuBLAS.

use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use cudarc::cublas::result::CublasError;
use cudarc::cublas::{CudaBlas, result, sys};
use cudarc::driver::CudaStream;

use super::driver::Allocation;
use super::linear::Product;
use super::memory::{Mat, MatMut, Number};
use super::small_blocks::SmallBlocks;
use super::{Error, Result};

/// What NVIDIA advises for the largest of today's GPUs.
const WORKSPACE_BYTES: usize = 32 << 20;

/// A handle on one stream, with memory of its own to work in: what it took by itself would show in no figure.
#[derive(Debug)]
pub(super) struct Blas {
    handle: CudaBlas,
    /// Given back after the handle.
    _workspace: Allocation,
}

impl Blas {
    /// The calling thread is the context's.
    pub(super) fn new(
        stream: &Arc<CudaStream>,
        small_blocks: &Arc<Mutex<SmallBlocks>>,
    ) -> Result<Self> {
        let handle = CudaBlas::new(stream.clone()).map_err(of)?;
        let workspace = Allocation::new(stream, small_blocks, WORKSPACE_BYTES)?;
        // Otherwise the parts of a long sum may be added up in 16 bits.
        let mode = sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
        // SAFETY: the handle was just made; the workspace is of its stream and lives longer.
        unsafe {
            sys::cublasSetMathMode(*handle.handle(), mode)
                .result()
                .map_err(of)?;
            let address = workspace.address() as *mut c_void;
            sys::cublasSetWorkspace_v2(*handle.handle(), address, WORKSPACE_BYTES)
                .result()
                .map_err(of)?;
        }
        Ok(Self {
            handle,
            _workspace: workspace,
        })
    }

    pub(super) fn product<T: Number, O: Number>(
        &self,
        product: Product,
        a: Mat<'_, T>,
        b: Mat<'_, T>,
        c: &MatMut<'_, O>,
    ) -> Result<()> {
        let op = |transposed| {
            if transposed {
                sys::cublasOperation_t::CUBLAS_OP_T
            } else {
                sys::cublasOperation_t::CUBLAS_OP_N
            }
        };
        let int = |number: usize| i32::try_from(number).expect("dimensions fit in 31 bits");
        let (alpha, beta) = (product.alpha, product.beta);
        // cuBLAS counts columns first, which is the transposed product of the transposed factors.
        // SAFETY: the views were checked to be this device's and to have the product's shapes.
        let status = unsafe {
            result::gemm_ex(
                *self.handle.handle(),
                op(product.b_transposed),
                op(product.a_transposed),
                int(product.cols),
                int(product.rows),
                int(product.inner),
                (&raw const alpha).cast(),
                b.view.address() as *const c_void,
                data_type::<T>(),
                int(b.stride()),
                a.view.address() as *const c_void,
                data_type::<T>(),
                int(a.stride()),
                (&raw const beta).cast(),
                c.view.address() as *mut c_void,
                data_type::<O>(),
                int(c.stride()),
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        status.map_err(of)
    }
}

fn data_type<T: Number>() -> sys::cudaDataType {
    match T::NAME {
        "f32" => sys::cudaDataType::CUDA_R_32F,
        "f16" => sys::cudaDataType::CUDA_R_16F,
        _ => sys::cudaDataType::CUDA_R_16BF,
    }
}

fn of(error: CublasError) -> Error {
    match error.0 {
        sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => Error::OutOfMemory { bytes: 0 },
        _ => Error::Driver(format!("cuBLAS: {error:?}")),
    }
}
