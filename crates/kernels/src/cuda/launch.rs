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

/// Blocks that the x dimension of a grid may have.
const MAX_GRID_X: usize = (1 << 31) - 1;
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
            grid[0] <= MAX_GRID_X && grid[1] <= MAX_GRID_YZ && grid[2] <= MAX_GRID_YZ,
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
    values: Vec<Value>,
    devices: Vec<usize>,
}

/// One argument, aligned as any parameter may be.
#[derive(Debug)]
#[repr(align(8))]
struct Value([u8; 32]);

impl Arguments {
    pub(super) fn new() -> Self {
        Self::default()
    }

    fn push(mut self, bytes: &[u8]) -> Self {
        let mut value = Value([0; 32]);
        value.0[..bytes.len()].copy_from_slice(bytes);
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

    /// A pointer to nothing.
    pub(super) fn null(self) -> Self {
        self.push(&0_u64.to_ne_bytes())
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
        values.map(|value| value.0.as_mut_ptr().cast()).collect()
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn blocks_are_whole_warps_that_cover_the_work() {
        let kernel = || Kernel::of::<f32>("rms_norm", "rms_norm_forward");
        let geometry = |kernel: Kernel| (kernel.grid, kernel.threads);
        assert_eq!(geometry(kernel().row_each(7, 33, 256)), ([7, 1, 1], 64));
        assert_eq!(geometry(kernel().row_each(7, 4000, 256)), ([7, 1, 1], 256));
        assert_eq!(geometry(kernel().row_each(0, 0, 256)), ([0, 1, 1], 32));
        assert_eq!(geometry(kernel().piece_each(3, 608)), ([3, 3, 1], 256));
        assert_eq!(geometry(kernel().piece_each(3, 5)), ([3, 1, 1], 32));
    }

    #[test]
    #[should_panic(expected = "the grid is too large")]
    fn a_grid_that_no_gpu_takes_is_refused() {
        let _ = Kernel::of::<f32>("columns", "columns_sum").grid([1, 65_536, 1], 128);
    }

    #[test]
    #[should_panic(expected = "the grid is too large")]
    fn so_is_one_with_as_many_blocks_as_31_bits_do_not_count() {
        let _ = Kernel::of::<f32>("columns", "columns_sum").grid([1 << 31, 1, 1], 128);
    }

    #[test]
    fn kernels_are_named_after_what_they_move() {
        assert_eq!(
            Kernel::wide::<bf16>("rope", "rope", width::<bf16>([true])).name,
            "rope_bf16_x8"
        );
        assert_eq!(
            Kernel::wide::<f32>("rope", "rope", width::<f32>([true, false])).name,
            "rope_f32_x1"
        );
        assert_eq!(Kernel::of::<bf16>("cast", "axpby").name, "axpby_bf16");
    }

    #[test]
    fn arguments_lie_where_they_were_put() {
        let mut arguments = Arguments::new()
            .int(7)
            .double(0.5)
            .floats([1.0, 2.0])
            .long(1 << 40);
        let bytes: Vec<[u8; 8]> = arguments
            .values
            .iter()
            .map(|value| value.0[..8].try_into().expect("eight bytes"))
            .collect();
        assert_eq!(bytes[0][..4], 7_i32.to_ne_bytes());
        assert_eq!(f64::from_ne_bytes(bytes[1]), 0.5);
        assert_eq!(bytes[2][4..], 2.0_f32.to_ne_bytes());
        assert_eq!(i64::from_ne_bytes(bytes[3]), 1 << 40);
        let mut pointers = arguments.pointers().into_iter();
        assert!(pointers.all(|pointer| pointer.addr().is_multiple_of(8)));
    }
}
