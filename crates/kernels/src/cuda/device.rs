//! A GPU, or its emulator: memory and launches.

use std::sync::Arc;

use super::launch::{Arguments, Kernel};
use super::linear::Product;
use super::memory::{Buffer, Element, Mat, MatMut, Memory, Number, View, ViewMut};
use super::{Error, Result};

/// A device with its kernels, and the stream that everything runs on in order. Clones are the same device.
#[derive(Clone, Debug)]
pub struct Gpu {
    pub(super) backend: Backend,
}

impl PartialEq for Gpu {
    fn eq(&self, other: &Self) -> bool {
        self.id() == other.id()
    }
}

/// The capability of an emulated device.
#[cfg(feature = "cuda-emulator")]
const EMULATED: u32 = 90;

/// What an emulated device has moved.
#[cfg(feature = "cuda-emulator")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes from the host to the device.
    pub uploaded: u64,
    /// Bytes from the device to the host.
    pub downloaded: u64,
    /// Products of matrices.
    pub products: u64,
    /// Bytes that a product reads and writes at least: its factors and its result, and the result once more where it is
    /// added to what was there.
    pub product_bytes: u64,
}

#[derive(Clone, Debug)]
pub(super) enum Backend {
    #[cfg(feature = "cuda")]
    Driver(Arc<super::driver::Driver>),
    #[cfg(feature = "cuda-emulator")]
    Emulator(Arc<super::emulator::Emulator>),
}

impl Gpu {
    /// Opens the GPU `ordinal`, as `CUDA_VISIBLE_DEVICES` counts them.
    ///
    /// # Errors
    /// [`Error::NoDriver`], [`Error::NoBlas`], [`Error::NoDevice`], [`Error::OldDriver`], [`Error::Capability`], [`Error::NotCompiled`].
    #[cfg(feature = "cuda")]
    pub fn new(ordinal: usize) -> Result<Self> {
        let driver = super::driver::Driver::open(ordinal)?;
        Ok(Self {
            backend: Backend::Driver(Arc::new(driver)),
        })
    }

    /// How many GPUs the driver shows this process.
    ///
    /// # Errors
    /// [`Error::NoDriver`], [`Error::OldDriver`], [`Error::Driver`].
    #[cfg(feature = "cuda")]
    pub fn count() -> Result<usize> {
        super::driver::count()
    }

    /// A device that runs kernels on the CPU, for tests; memory is the host's.
    #[cfg(feature = "cuda-emulator")]
    #[must_use]
    pub fn emulated() -> Self {
        Self::emulated_with(u64::MAX)
    }

    /// An emulated device that has so many bytes of memory, and then none.
    #[cfg(feature = "cuda-emulator")]
    #[must_use]
    pub fn emulated_with(bytes: u64) -> Self {
        Self::emulate(bytes, EMULATED)
    }

    /// An emulated device of a capability, as in 75: kernels take the ways that they take there.
    #[cfg(all(test, feature = "cuda-emulator"))]
    pub(super) fn emulated_as(capability: u32) -> Self {
        Self::emulate(u64::MAX, capability)
    }

    #[cfg(feature = "cuda-emulator")]
    fn emulate(bytes: u64, capability: u32) -> Self {
        let emulator = super::emulator::Emulator::new(bytes, capability);
        Self {
            backend: Backend::Emulator(Arc::new(emulator)),
        }
    }

    /// What an emulated device has moved so far.
    #[cfg(feature = "cuda-emulator")]
    #[must_use]
    pub fn emulated_traffic(&self) -> Traffic {
        match &self.backend {
            #[cfg(feature = "cuda")]
            Backend::Driver(_) => Traffic::default(),
            Backend::Emulator(emulator) => emulator.traffic(),
        }
    }

    /// The bytes that this process can hold on the device: what is free there, and what it holds already.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn available_bytes(&self) -> Result<u64> {
        match &self.backend {
            #[cfg(feature = "cuda")]
            Backend::Driver(driver) => driver.available_bytes(),
            #[cfg(feature = "cuda-emulator")]
            Backend::Emulator(emulator) => Ok(emulator.limit()),
        }
    }

    /// The most bytes that this process has held on the device at once, the driver's own not counted.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn peak_bytes(&self) -> Result<u64> {
        match &self.backend {
            #[cfg(feature = "cuda")]
            Backend::Driver(driver) => driver.peak_bytes(),
            #[cfg(feature = "cuda-emulator")]
            Backend::Emulator(emulator) => Ok(emulator.peak()),
        }
    }

    /// The bytes that this process holds on the device now, the driver's own not counted.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn held_bytes(&self) -> Result<u64> {
        match &self.backend {
            #[cfg(feature = "cuda")]
            Backend::Driver(driver) => driver.held_bytes(),
            #[cfg(feature = "cuda-emulator")]
            Backend::Emulator(emulator) => Ok(emulator.held()),
        }
    }

    /// The device's name, as its driver gives it.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn name(&self) -> Result<String> {
        match &self.backend {
            #[cfg(feature = "cuda")]
            Backend::Driver(driver) => driver.name(),
            #[cfg(feature = "cuda-emulator")]
            Backend::Emulator(_) => Ok("emulator".to_owned()),
        }
    }

    /// Copies numbers to the device.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn upload<T: Element>(&self, values: &[T]) -> Result<Buffer<T>> {
        let bytes = T::bytes_of(values);
        let memory = match &self.backend {
            #[cfg(feature = "cuda")]
            Backend::Driver(driver) => Memory::Driver(driver.upload(bytes)?),
            #[cfg(feature = "cuda-emulator")]
            Backend::Emulator(emulator) => {
                emulator.count(|traffic| traffic.uploaded += bytes.len() as u64);
                Memory::host(bytes, emulator.take(bytes.len())?)
            }
        };
        Ok(Buffer::new(memory, values.len(), self.clone()))
    }

    /// Device memory for `len` elements that a kernel is about to write: whatever was there before, on the emulator NaNs.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn alloc<T: Element>(&self, len: usize) -> Result<Buffer<T>> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .ok_or(Error::OutOfMemory { bytes: usize::MAX })?;
        let memory = match &self.backend {
            #[cfg(feature = "cuda")]
            Backend::Driver(driver) => Memory::Driver(driver.alloc(bytes)?),
            #[cfg(feature = "cuda-emulator")]
            Backend::Emulator(emulator) => {
                let taken = emulator.take(bytes)?;
                Memory::host(&vec![0xff; bytes], taken)
            }
        };
        Ok(Buffer::new(memory, len, self.clone()))
    }

    /// Device memory of `len` zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn zeros<T: Element>(&self, len: usize) -> Result<Buffer<T>> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .ok_or(Error::OutOfMemory { bytes: usize::MAX })?;
        let memory = match &self.backend {
            #[cfg(feature = "cuda")]
            Backend::Driver(driver) => Memory::Driver(driver.zeros(bytes)?),
            #[cfg(feature = "cuda-emulator")]
            Backend::Emulator(emulator) => {
                let taken = emulator.take(bytes)?;
                Memory::host(&vec![0; bytes], taken)
            }
        };
        Ok(Buffer::new(memory, len, self.clone()))
    }

    /// Waits for what was launched, and copies numbers back.
    ///
    /// # Errors
    /// [`Error::Driver`], also for what went wrong in a kernel before.
    ///
    /// # Panics
    /// If the view is of another device.
    pub fn download<T: Element>(&self, view: View<'_, T>) -> Result<Vec<T>> {
        view.check(self);
        let mut values = vec![T::default(); view.len()];
        let bytes = T::bytes_of_mut(&mut values);
        match &self.backend {
            #[cfg(feature = "cuda")]
            Backend::Driver(driver) => driver.download(view.address(), bytes)?,
            #[cfg(feature = "cuda-emulator")]
            Backend::Emulator(emulator) => {
                emulator.count(|traffic| traffic.downloaded += bytes.len() as u64);
                // SAFETY: the view is of this emulator's memory, which is the host's, and as long as `bytes`.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        view.address() as *const u8,
                        bytes.as_mut_ptr(),
                        bytes.len(),
                    );
                }
            }
        }
        Ok(values)
    }

    /// Copies elements to another place on the device.
    ///
    /// # Errors
    /// [`Error::Driver`].
    ///
    /// # Panics
    /// If the lengths differ or a view is of another device.
    pub fn copy<T: Element>(&self, from: View<'_, T>, to: &ViewMut<'_, T>) -> Result<()> {
        assert_eq!(from.len(), to.len(), "as many elements");
        from.check(self);
        to.as_view().check(self);
        let bytes = from.len() * size_of::<T>();
        match &self.backend {
            #[cfg(feature = "cuda")]
            Backend::Driver(driver) => driver.copy(from.address(), to.address(), bytes),
            #[cfg(feature = "cuda-emulator")]
            // SAFETY: the views are of this emulator's memory, which is the host's, as long as `bytes`, and lent for
            // reading and for writing, so they do not overlap.
            Backend::Emulator(_) => unsafe {
                std::ptr::copy_nonoverlapping(
                    from.address() as *const u8,
                    to.address() as *mut u8,
                    bytes,
                );
                Ok(())
            },
        }
    }

    /// Waits until everything launched so far is done.
    ///
    /// # Errors
    /// [`Error::Driver`], also for what went wrong in a kernel before.
    pub fn synchronize(&self) -> Result<()> {
        match &self.backend {
            #[cfg(feature = "cuda")]
            Backend::Driver(driver) => driver.synchronize(),
            #[cfg(feature = "cuda-emulator")]
            Backend::Emulator(_) => Ok(()),
        }
    }

    /// # Safety
    /// The arguments are those of the kernel, and every address among them is good for what the kernel does with it.
    pub(super) unsafe fn launch(&self, kernel: &Kernel, mut arguments: Arguments) -> Result<()> {
        if kernel.grid.contains(&0) {
            return Ok(()); // nothing to do, and no valid launch
        }
        arguments.check(self);
        let mut pointers = arguments.pointers();
        match &self.backend {
            #[cfg(feature = "cuda")]
            // SAFETY: the caller's promise.
            Backend::Driver(driver) => unsafe { driver.launch(kernel, &mut pointers) },
            #[cfg(feature = "cuda-emulator")]
            // SAFETY: the caller's promise.
            Backend::Emulator(emulator) => unsafe {
                super::emulator::launch(emulator.capability(), kernel, &mut pointers)
            },
        }
    }

    pub(super) fn product<T: Number, O: Number>(
        &self,
        product: Product,
        a: Mat<'_, T>,
        b: Mat<'_, T>,
        c: &MatMut<'_, O>,
    ) -> Result<()> {
        assert_eq!(
            (c.num_rows(), c.num_cols()),
            (product.rows, product.cols),
            "the product's shape"
        );
        assert!(
            O::NAME == T::NAME || O::NAME == "f32",
            "a product in f32 or the factors' type"
        );
        a.view.check(self);
        b.view.check(self);
        c.view.as_view().check(self);
        if product.rows == 0 || product.cols == 0 {
            return Ok(());
        }
        match &self.backend {
            #[cfg(feature = "cuda")]
            Backend::Driver(driver) => driver.product(product, a, b, c),
            #[cfg(feature = "cuda-emulator")]
            Backend::Emulator(emulator) => {
                let factors = (product.rows + product.cols) * product.inner * size_of::<T>();
                let times = if product.beta == 0.0 { 1 } else { 2 };
                let bytes = factors + times * product.rows * product.cols * size_of::<O>();
                emulator.count(|traffic| {
                    traffic.products += 1;
                    traffic.product_bytes += bytes as u64;
                });
                super::emulator::product(product, a, b, c);
                Ok(())
            }
        }
    }

    /// Whether it multiplies bf16: `sm_80` and later.
    #[must_use]
    pub fn has_bf16(&self) -> bool {
        let capability = match &self.backend {
            #[cfg(feature = "cuda")]
            Backend::Driver(driver) => driver.device_capability(),
            #[cfg(feature = "cuda-emulator")]
            Backend::Emulator(emulator) => emulator.capability(),
        };
        capability >= 80
    }

    /// Whether tensor cores multiply such numbers: f16 since `sm_75`, bf16 since `sm_80`, f32 not as exactly as it must be.
    pub(super) fn has_tensor_cores_for<T: Number>(&self) -> bool {
        let capability = self.kernels_capability();
        match T::NAME {
            "f16" => capability >= 75,
            "bf16" => capability >= 80,
            _ => false,
        }
    }

    /// Whether kernels copy to shared memory while they compute: those for `sm_80` and later.
    pub(super) fn has_async_copies(&self) -> bool {
        self.kernels_capability() >= 80
    }

    /// The capability that kernels are compiled for.
    fn kernels_capability(&self) -> u32 {
        match &self.backend {
            #[cfg(feature = "cuda")]
            Backend::Driver(driver) => driver.capability(),
            #[cfg(feature = "cuda-emulator")]
            Backend::Emulator(emulator) => emulator.capability(),
        }
    }

    /// What tells this device's memory from another's.
    pub(super) fn id(&self) -> usize {
        match &self.backend {
            #[cfg(feature = "cuda")]
            Backend::Driver(driver) => Arc::as_ptr(driver) as usize,
            #[cfg(feature = "cuda-emulator")]
            Backend::Emulator(emulator) => Arc::as_ptr(emulator) as usize,
        }
    }
}
