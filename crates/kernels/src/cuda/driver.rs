//! NVIDIA's driver and cuBLAS, through cudarc.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::cublas::sys as blas_sys;
use cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute_enum, CUresult};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream, DriverError, result, sys};
use cudarc::nvrtc::Ptx;

use super::blas::Blas;
use super::launch::Kernel;
use super::linear::Product;
use super::memory::{Mat, MatMut, Number};
use super::small_blocks::SmallBlocks;
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
    blas: Blas,
    small_blocks: Arc<Mutex<SmallBlocks>>,
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
    check_driver()?;
    match CudaContext::device_count() {
        Ok(count) => Ok(usize::try_from(count).unwrap_or(0)),
        Err(error) if error.0 == CUresult::CUDA_ERROR_NO_DEVICE => Ok(0),
        Err(error) => Err(Error::of(error, 0)),
    }
}

/// Whether the driver knows the CUDA that this program was compiled with; of an older one even the errors vary.
fn check_driver() -> Result<()> {
    let mut version = 0;
    // SAFETY: asks the driver's version, which needs no device.
    let status = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    status.result().map_err(|error| Error::of(error, 0))?;
    match u32::try_from(version).is_ok_and(|version| version / 1000 >= sys::CUDA_VERSION / 1000) {
        true => Ok(()),
        false => Err(Error::OldDriver),
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
        let small_blocks = Arc::<Mutex<SmallBlocks>>::default();
        let blas = Blas::new(&stream, &small_blocks)?;
        let mut modules = HashMap::new();
        for &(name, image) in compiled::IMAGES {
            let module = context.load_module(Ptx::from_binary(image.to_vec()));
            modules.insert(name, module.map_err(|error| Error::of(error, 0))?);
        }
        Ok(Self {
            context,
            stream,
            blas,
            small_blocks,
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
        self.pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)
    }

    pub(super) fn held_bytes(&self) -> Result<u64> {
        self.bind()?;
        self.pool(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)
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
        let alloc = || Allocation::new(&self.stream, &self.small_blocks, bytes);
        match alloc() {
            Err(Error::OutOfMemory { .. }) => {
                self.give_back_what_is_free()?;
                alloc()
            }
            done => done,
        }
    }

    /// What was freed and is kept goes back, so that another size, or what does not ask the pool, may have it.
    fn give_back_what_is_free(&self) -> Result<()> {
        for address in lock(&self.small_blocks).drain() {
            // SAFETY: allocated on this stream, and nobody's.
            unsafe { result::free_async(address, self.stream.cu_stream()) }
                .map_err(|error| Error::of(error, 0))?;
        }
        self.synchronize()?;
        // SAFETY: the device is open, and the pool is its own.
        let status = unsafe {
            result::device::get_default_mem_pool(self.context.cu_device())
                .and_then(|pool| sys::cuMemPoolTrimTo(pool, 0).result())
        };
        status.map_err(|error| Error::of(error, 0))
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

    /// The stream that everything runs on, its device made this thread's.
    #[cfg(feature = "nccl")]
    pub(super) fn stream(&self) -> Result<*mut c_void> {
        self.bind()?;
        Ok(self.stream.cu_stream().cast())
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
        match self.blas.product(product, a, b, c) {
            Err(Error::OutOfMemory { .. }) => {
                self.give_back_what_is_free()?;
                self.blas.product(product, a, b, c)
            }
            done => done,
        }
    }

    fn bind(&self) -> Result<()> {
        self.context
            .bind_to_thread()
            .map_err(|error| Error::of(error, 0))
    }
}

/// Memory of a device, given back in the order of its stream.
#[derive(Debug)]
pub(super) struct Allocation {
    address: sys::CUdeviceptr,
    /// Of the block, at least what was asked for.
    size: usize,
    stream: Arc<CudaStream>,
    small_blocks: Arc<Mutex<SmallBlocks>>,
}

impl Allocation {
    /// The calling thread is the context's.
    pub(super) fn new(
        stream: &Arc<CudaStream>,
        small_blocks: &Arc<Mutex<SmallBlocks>>,
        bytes: usize,
    ) -> Result<Self> {
        let size = SmallBlocks::size_for(bytes);
        let kept = lock(small_blocks).take(size);
        let address = match kept {
            Some(address) => address,
            // SAFETY: the stream is alive, and a block has at least one byte.
            None => unsafe { result::malloc_async(stream.cu_stream(), size) }
                .map_err(|error| Error::of(error, bytes))?,
        };
        Ok(Self {
            address,
            size,
            stream: stream.clone(),
            small_blocks: small_blocks.clone(),
        })
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let is_kept = lock(&self.small_blocks).keep(self.size, self.address);
        if !is_kept && self.stream.context().bind_to_thread().is_ok() {
            // SAFETY: allocated on this stream and not yet given back. A failure shows at the next call.
            let _ = unsafe { result::free_async(self.address, self.stream.cu_stream()) };
        }
    }
}

fn lock(small_blocks: &Mutex<SmallBlocks>) -> MutexGuard<'_, SmallBlocks> {
    small_blocks.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Error {
    pub(super) fn of(error: DriverError, bytes: usize) -> Self {
        match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Self::OutOfMemory { bytes },
            CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
            | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | CUresult::CUDA_ERROR_INVALID_IMAGE
            | CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU => Self::OldDriver,
            _ => Self::Driver(error.to_string()),
        }
    }
}
