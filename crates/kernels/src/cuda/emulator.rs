//! The kernels compiled for the CPU, and memory that runs out where a test wants it to.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use super::device::Traffic;
use super::launch::Kernel;
use super::linear::Product;
use super::memory::{Mat, MatMut, Number};
use super::{Error, Result};

/// A device of its own, so that memory of one is not taken for another's.
#[derive(Debug)]
pub(super) struct Emulator {
    /// Bytes that can be held at once.
    limit: u64,
    /// Which GPUs' ways the kernels take.
    capability: u32,
    held: Mutex<Held>,
}

/// Bytes held, now and at most so far, and what was moved.
#[derive(Debug, Default)]
struct Held {
    now: u64,
    most: u64,
    traffic: Traffic,
}

impl Emulator {
    pub(super) fn new(limit: u64, capability: u32) -> Self {
        Self {
            limit,
            capability,
            held: Mutex::default(),
        }
    }

    pub(super) fn capability(&self) -> u32 {
        self.capability
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    pub(super) fn held(&self) -> u64 {
        self.with(|held| held.now)
    }

    pub(super) fn peak(&self) -> u64 {
        self.with(|held| held.most)
    }

    pub(super) fn traffic(&self) -> Traffic {
        self.with(|held| held.traffic)
    }

    pub(super) fn count(&self, moved: impl FnOnce(&mut Traffic)) {
        self.with(|held| moved(&mut held.traffic));
    }

    fn with<R>(&self, look: impl FnOnce(&mut Held) -> R) -> R {
        look(&mut self.held.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes memory, if there is so much.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Result<Taken> {
        self.with(|held| {
            let now = held.now + bytes as u64;
            if now > self.limit {
                return Err(Error::OutOfMemory { bytes });
            }
            (held.now, held.most) = (now, held.most.max(now));
            Ok(Taken {
                emulator: Arc::clone(self),
                bytes: bytes as u64,
            })
        })
    }
}

/// Memory that is given back when this is dropped.
#[derive(Debug)]
pub(super) struct Taken {
    emulator: Arc<Emulator>,
    bytes: u64,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.emulator.with(|held| held.now -= self.bytes);
    }
}

// SAFETY: as declared in emulator.cpp.
unsafe extern "C" {
    fn updraft_emulator_launch(
        capability: c_uint,
        kernel: *const c_char,
        grid: *const c_uint,
        threads: c_uint,
        shared: c_uint,
        arguments: *mut *mut c_void,
    ) -> c_int;
}

/// Runs a kernel to its end, as a device of some capability would.
///
/// # Safety
/// The arguments are those of the kernel, and every address among them is good for what the kernel does with it.
pub(super) unsafe fn launch(
    capability: u32,
    kernel: &Kernel,
    arguments: &mut [*mut c_void],
) -> Result<()> {
    let name = CString::new(kernel.name.as_str()).expect("a kernel's name");
    let grid = kernel
        .grid
        .map(|blocks| c_uint::try_from(blocks).expect("blocks of a grid"));
    // SAFETY: the name ends in 0, the grid has three numbers; the rest is the caller's promise.
    let status = unsafe {
        updraft_emulator_launch(
            capability,
            name.as_ptr(),
            grid.as_ptr(),
            kernel.threads,
            kernel.shared,
            arguments.as_mut_ptr(),
        )
    };
    match status {
        0 => Ok(()),
        _ => Err(Error::Driver(format!("there is no kernel {}", kernel.name))),
    }
}

/// What cuBLAS does, in the plainest way.
pub(super) fn product<T: Number, O: Number>(
    product: Product,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    c: &MatMut<'_, O>,
) {
    let at = |mat: Mat<'_, T>, transposed: bool, row: usize, col: usize| {
        let (row, col) = if transposed { (col, row) } else { (row, col) };
        let index = row * mat.stride() + col;
        assert!(index < mat.view.len(), "inside of the factor");
        // SAFETY: the view is of an emulator's memory, which is the host's, and the index is inside.
        unsafe { (mat.view.address() as *const T).add(index).read() }.widen()
    };
    for row in 0..product.rows {
        for col in 0..product.cols {
            let sum: f32 = (0..product.inner)
                .map(|k| at(a, product.a_transposed, row, k) * at(b, product.b_transposed, k, col))
                .sum();
            let index = row * c.stride() + col;
            assert!(index < c.view.len(), "inside of the product");
            // SAFETY: as above; the view is lent for writing.
            unsafe {
                let to = (c.view.address() as *mut O).add(index);
                let before = match product.beta {
                    0.0 => 0.0,
                    beta => beta * to.read().widen(),
                };
                to.write(O::narrow(product.alpha * sum + before));
            }
        }
    }
}
