//! One launch: which kernel, how many threads, and its arguments as the driver takes them.

use std::ffi::c_void;

use super::memory::{Mat, MatMut, Number, View, ViewMut};
use super::{Gpu, memory};

/// A kernel and its geometry.
#[derive(Debug)]
pub(super) struct Kernel {
    /// The `.cu` file that it is in, which the emulator need not know.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "one name space"))]
    pub(super) module: &'static str,
    pub(super) name: String,
    /// Blocks along x, y and z.
    pub(super) grid: [usize; 3],
    /// Threads of a block, whole warps.
    pub(super) threads: u32,
    /// Bytes of dynamic shared memory.
    pub(super) shared: u32,
}

/// Blocks that the y and z dimensions of a grid may have.
const MAX_GRID_YZ: usize = 65_535;

impl Kernel {
    /// A kernel for a number type: `base` and the type's name.
    pub(super) fn of<T: Number>(module: &'static str, base: &str) -> Self {
        Self::named(module, format!("{base}_{}", T::NAME))
    }

    /// A kernel that moves `width` numbers at once.
    pub(super) fn wide<T: Number>(module: &'static str, base: &str, width: usize) -> Self {
        Self::named(module, format!("{base}_{}_x{width}", T::NAME))
    }

    pub(super) fn named(module: &'static str, name: String) -> Self {
        Self {
            module,
            name,
            grid: [1; 3],
            threads: 32,
            shared: 0,
        }
    }

    /// A block for each row, whose threads go through `units` pieces of it.
    pub(super) fn row_each(mut self, rows: usize, units: usize, max_threads: u32) -> Self {
        self.grid = [rows, 1, 1];
        self.threads = whole_warps(units, max_threads);
        self
    }

    /// A thread for each of `units` pieces of every row: rows along x, pieces along y.
    pub(super) fn piece_each(mut self, rows: usize, units: usize) -> Self {
        self.threads = whole_warps(units, 256);
        self.grid = [rows, units.div_ceil(self.threads as usize), 1];
        assert!(self.grid[1] <= MAX_GRID_YZ, "a row is too long");
        self
    }

    pub(super) fn grid(mut self, grid: [usize; 3], threads: u32) -> Self {
        assert!(
            grid[1] <= MAX_GRID_YZ && grid[2] <= MAX_GRID_YZ,
            "the grid is too large"
        );
        self.grid = grid;
        self.threads = threads;
        self
    }

    pub(super) fn shared(mut self, bytes: usize) -> Self {
        self.shared = u32::try_from(bytes).expect("a block's shared memory");
        self
    }
}

/// The least whole number of warps for `units` threads, up to a limit.
fn whole_warps(units: usize, max_threads: u32) -> u32 {
    let warps = u32::try_from(units.div_ceil(32)).unwrap_or(u32::MAX / 32);
    (warps.max(1) * 32).min(max_threads)
}

/// The numbers that one access moves: as many as 16 bytes hold if everything is aligned for it, else one.
pub(super) fn width<T: Number>(aligned: impl IntoIterator<Item = bool>) -> usize {
    if aligned.into_iter().all(|aligned| aligned) {
        T::WIDE
    } else {
        1
    }
}

/// Arguments in the order of the kernel's parameters.
#[derive(Debug, Default)]
pub(super) struct Arguments {
    values: Vec<[u64; 4]>,
    devices: Vec<usize>,
}

impl Arguments {
    pub(super) fn new() -> Self {
        Self::default()
    }

    fn push(mut self, bytes: &[u8]) -> Self {
        let mut value = [0_u64; 4];
        assert!(bytes.len() <= size_of_val(&value), "an argument's size");
        // SAFETY: the lengths were compared, and the two do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                value.as_mut_ptr().cast::<u8>(),
                bytes.len(),
            );
        }
        self.values.push(value);
        self
    }

    /// An `int`.
    pub(super) fn int(self, value: usize) -> Self {
        let value = i32::try_from(value).expect("dimensions fit in 31 bits");
        self.push(&value.to_ne_bytes())
    }

    /// An `unsigned`.
    pub(super) fn unsigned(self, value: u32) -> Self {
        self.push(&value.to_ne_bytes())
    }

    /// A `long long`.
    pub(super) fn long(self, value: usize) -> Self {
        self.push(&(value as i64).to_ne_bytes())
    }

    /// A `float`.
    pub(super) fn float(self, value: f32) -> Self {
        self.push(&value.to_ne_bytes())
    }

    /// A `double`.
    pub(super) fn double(self, value: f64) -> Self {
        self.push(&value.to_ne_bytes())
    }

    /// A structure of `float`s.
    pub(super) fn floats<const N: usize>(self, values: [f32; N]) -> Self {
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_ne_bytes())
            .collect();
        self.push(&bytes)
    }

    /// A pointer to what is read.
    pub(super) fn view<T: memory::Element>(mut self, view: View<'_, T>) -> Self {
        self.devices.push(view.device());
        self.push(&view.address().to_ne_bytes())
    }

    /// A pointer to what is written.
    pub(super) fn out<T: memory::Element>(mut self, view: &ViewMut<'_, T>) -> Self {
        self.devices.push(view.device());
        self.push(&view.address().to_ne_bytes())
    }

    /// A pointer to a matrix that is read.
    pub(super) fn mat<T: memory::Element>(self, mat: Mat<'_, T>) -> Self {
        self.view(mat.view)
    }

    /// A pointer to a matrix that is written.
    pub(super) fn out_mat<T: memory::Element>(self, mat: &MatMut<'_, T>) -> Self {
        self.out(&mat.view)
    }

    /// # Panics
    /// If an argument lies in another device's memory.
    pub(super) fn check(&self, gpu: &Gpu) {
        assert!(
            self.devices.iter().all(|&device| device == gpu.id()),
            "memory of another device"
        );
    }

    pub(super) fn pointers(&mut self) -> Vec<*mut c_void> {
        let values = self.values.iter_mut();
        values.map(|value| value.as_mut_ptr().cast()).collect()
    }
}
