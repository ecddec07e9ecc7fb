//! NVIDIA's driver and cuBLAS, through cudarc.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublas::{CudaBlas, result as blas, sys as blas_sys};
use cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute_enum, CUresult};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream, DriverError, result, sys};
use cudarc::nvrtc::Ptx;

use super::launch::Kernel;
use super::linear::Product;
use super::memory::{Mat, MatMut, Number};
use super::{Error, Result};

/// The kernels of each `.cu` file as `nvcc` compiled them, and for which capability.
mod compiled {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// Dynamic shared memory that a block has without asking.
const SHARED_UNASKED: u32 = 48 << 10;

/// An open device.
#[derive(Debug)]
pub(super) struct Driver {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    blas: CudaBlas,
    modules: HashMap<&'static str, Arc<CudaModule>>,
    functions: Mutex<HashMap<String, CudaFunction>>,
    /// The device's own, as in `90`.
    capability: u32,
}

/// How many devices there are.
pub(super) fn count() -> Result<usize> {
    // SAFETY: loads libcuda to see whether it is there, which has no other effect.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoDriver);
    }
    match CudaContext::device_count() {
        Ok(count) => Ok(usize::try_from(count).unwrap_or(0)),
        Err(error) if error.0 == CUresult::CUDA_ERROR_NO_DEVICE => Ok(0),
        Err(error) => Err(Error::of(error, 0)),
    }
}

/// Otherwise the driver gives freed memory back at each synchronization, and every step asks for it anew.
fn keep_freed_memory(context: &CudaContext) -> Result<()> {
    let mut all = u64::MAX;
    // SAFETY: the device is open, and the attribute is a 64-bit number.
    let status = unsafe {
        result::device::get_default_mem_pool(context.cu_device()).and_then(|pool| {
            let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut all).cast()).result()
        })
    };
    status.map_err(|error| Error::of(error, 0))
}

impl Driver {
    pub(super) fn open(ordinal: usize) -> Result<Self> {
        if compiled::IMAGES.is_empty() {
            return Err(Error::NotCompiled);
        }
        let count = count()?;
        // SAFETY: loads libcublas to see whether it is there, which has no other effect.
        if !unsafe { blas_sys::is_culib_present() } {
            return Err(Error::NoBlas);
        }
        if ordinal >= count {
            return Err(Error::NoDevice { ordinal, count });
        }
        let context = CudaContext::new(ordinal).map_err(|error| Error::of(error, 0))?;
        let number = |attribute| {
            let value = context.attribute(attribute);
            value.map_err(|error| Error::of(error, 0))
        };
        let major = number(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = number(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let capability = u32::try_from(major * 10 + minor).unwrap_or(0);
        if capability < compiled::CAPABILITY {
            return Err(Error::Capability {
                found: capability,
                compiled: compiled::CAPABILITY,
            });
        }
        // SAFETY: everything runs on one stream, so memory is never used before it is ready.
        unsafe { context.disable_event_tracking() };
        keep_freed_memory(&context)?;
        let stream = context.new_stream().map_err(|error| Error::of(error, 0))?;
        let blas = CudaBlas::new(stream.clone())
            .map_err(|error| Error::Driver(format!("cuBLAS does not start: {error:?}")))?;
        let mut modules = HashMap::new();
        for &(name, image) in compiled::IMAGES {
            let module = context.load_module(Ptx::from_binary(image.to_vec()));
            modules.insert(name, module.map_err(|error| Error::of(error, 0))?);
        }
        Ok(Self {
            context,
            stream,
            blas,
            modules,
            functions: Mutex::default(),
            capability,
        })
    }

    pub(super) fn name(&self) -> Result<String> {
        self.context.name().map_err(|error| Error::of(error, 0))
    }

    pub(super) fn available_bytes(&self) -> Result<u64> {
        self.bind()?;
        let (free, _) = result::mem_get_info().map_err(|error| Error::of(error, 0))?;
        // What was freed stays in the pool, where other processes cannot take it.
        let held = self.pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        Ok(free as u64 + held)
    }

    pub(super) fn peak_bytes(&self) -> Result<u64> {
        self.bind()?;
        self.pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH)
    }

    /// A figure of the pool that all memory comes from.
    fn pool(&self, attribute: sys::CUmemPool_attribute) -> Result<u64> {
        let mut bytes = 0_u64;
        // SAFETY: the device is open, and the attribute is a 64-bit number.
        let status = unsafe {
            result::device::get_default_mem_pool(self.context.cu_device()).and_then(|pool| {
                sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut bytes).cast()).result()
            })
        };
        status.map_err(|error| Error::of(error, 0))?;
        Ok(bytes)
    }

    /// What the kernels were compiled for: a later device runs them as they are.
    pub(super) fn capability(&self) -> u32 {
        compiled::CAPABILITY
    }

    /// What the device could run.
    pub(super) fn device_capability(&self) -> u32 {
        self.capability
    }

    pub(super) fn alloc(&self, bytes: usize) -> Result<Allocation> {
        self.bind()?;
        let stream = self.stream.clone();
        let failed = |error| Error::of(error, bytes);
        // SAFETY: the stream is alive; a length of 0 is no allocation, so at least one byte is asked for.
        let address =
            unsafe { result::malloc_async(stream.cu_stream(), bytes.max(1)) }.map_err(failed)?;
        Ok(Allocation { address, stream })
    }

    pub(super) fn zeros(&self, bytes: usize) -> Result<Allocation> {
        let allocation = self.alloc(bytes)?;
        let stream = self.stream.cu_stream();
        // SAFETY: the memory was just allocated on this stream.
        unsafe { result::memset_d8_async(allocation.address, 0, bytes, stream) }
            .map_err(|error| Error::of(error, bytes))?;
        Ok(allocation)
    }

    pub(super) fn upload(&self, bytes: &[u8]) -> Result<Allocation> {
        let allocation = self.alloc(bytes.len())?;
        let stream = self.stream.cu_stream();
        // SAFETY: as many bytes were just allocated; pageable memory is read before the call returns.
        unsafe { result::memcpy_htod_async(allocation.address, bytes, stream) }
            .map_err(|error| Error::of(error, bytes.len()))?;
        Ok(allocation)
    }

    pub(super) fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        self.bind()?;
        // SAFETY: the view that the address is of has as many bytes, and what is copied is waited for.
        unsafe { result::memcpy_dtoh_async(bytes, address, self.stream.cu_stream()) }
            .map_err(|error| Error::of(error, 0))?;
        self.synchronize()
    }

    pub(super) fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: the views that the addresses are of have as many bytes, and everything runs on one stream.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) }
            .map_err(|error| Error::of(error, 0))
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        self.stream
            .synchronize()
            .map_err(|error| Error::of(error, 0))
    }

    /// # Safety
    /// The arguments are those of the kernel, and every address among them is good for what the kernel does with it.
    pub(super) unsafe fn launch(
        &self,
        kernel: &Kernel,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        self.bind()?;
        let function = self.function(kernel)?;
        let [x, y, z] = kernel
            .grid
            .map(|blocks| u32::try_from(blocks).expect("blocks of a grid"));
        // SAFETY: the caller's promise.
        unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                (kernel.threads, 1, 1),
                kernel.shared,
                self.stream.cu_stream(),
                arguments,
            )
        }
        .map_err(|error| Error::of(error, 0))
    }

    fn function(&self, kernel: &Kernel) -> Result<sys::CUfunction> {
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(&kernel.name) {
            return Ok(function.cu_function());
        }
        let module = &self.modules[kernel.module];
        let failed = |error| Error::of(error, 0);
        let function = module.load_function(&kernel.name).map_err(failed)?;
        if kernel.shared > SHARED_UNASKED {
            let bytes = i32::try_from(kernel.shared).expect("a block's shared memory");
            let attribute =
                CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, bytes).map_err(failed)?;
        }
        let raw = function.cu_function();
        functions.insert(kernel.name.clone(), function);
        Ok(raw)
    }

    pub(super) fn product<T: Number, O: Number>(
        &self,
        product: Product,
        a: Mat<'_, T>,
        b: Mat<'_, T>,
        c: &MatMut<'_, O>,
    ) -> Result<()> {
        self.bind()?;
        let op = |transposed| {
            if transposed {
                blas_sys::cublasOperation_t::CUBLAS_OP_T
            } else {
                blas_sys::cublasOperation_t::CUBLAS_OP_N
            }
        };
        let int = |number: usize| i32::try_from(number).expect("dimensions fit in 31 bits");
        let (alpha, beta) = (product.alpha, product.beta);
        // cuBLAS counts columns first, which is the transposed product of the transposed factors.
        // SAFETY: the views were checked to be this device's and to have the product's shapes.
        let status = unsafe {
            blas::gemm_ex(
                *self.blas.handle(),
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
                blas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        status.map_err(|error| Error::Driver(format!("cuBLAS: {error:?}")))
    }

    fn bind(&self) -> Result<()> {
        self.context
            .bind_to_thread()
            .map_err(|error| Error::of(error, 0))
    }
}

fn data_type<T: Number>() -> blas_sys::cudaDataType {
    match T::NAME {
        "f32" => blas_sys::cudaDataType::CUDA_R_32F,
        "f16" => blas_sys::cudaDataType::CUDA_R_16F,
        _ => blas_sys::cudaDataType::CUDA_R_16BF,
    }
}

/// Memory of a device, given back in the order of its stream.
#[derive(Debug)]
pub(super) struct Allocation {
    address: sys::CUdeviceptr,
    stream: Arc<CudaStream>,
}

impl Allocation {
    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.stream.context().bind_to_thread().is_ok() {
            // SAFETY: allocated on this stream and not yet given back. A failure shows at the next call.
            let _ = unsafe { result::free_async(self.address, self.stream.cu_stream()) };
        }
    }
}

impl Error {
    fn of(error: DriverError, bytes: usize) -> Self {
        match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Self::OutOfMemory { bytes },
            CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
            | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => Self::OldDriver,
            _ => Self::Driver(error.to_string()),
        }
    }
}
