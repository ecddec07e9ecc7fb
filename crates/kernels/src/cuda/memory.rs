//! Device memory: buffers that own it, views and matrices that lend it.

use std::marker::PhantomData;
use std::ops::Range;

use half::{bf16, f16};

use super::Gpu;

/// What kernels read and write.
pub trait Element: Copy + Default + sealed::Plain + 'static {}

mod sealed {
    /// A type without padding, all of whose bit patterns are values.
    pub trait Plain: Sized {
        /// The memory of some values.
        fn bytes_of(values: &[Self]) -> &[u8] {
            // SAFETY: no padding, so every byte is set; the length is the slice's.
            unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
        }

        /// As [`bytes_of`](Self::bytes_of), to be overwritten.
        fn bytes_of_mut(values: &mut [Self]) -> &mut [u8] {
            // SAFETY: as above, and whatever is written is a value.
            unsafe {
                std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values))
            }
        }
    }
}

/// A number that kernels compute with; they are named after it.
pub trait Number: Element {
    /// As in the names of kernels.
    const NAME: &'static str;
    /// How many one load takes, where rows are aligned for it.
    const WIDE: usize = 16 / size_of::<Self>();

    /// The same number in f32.
    fn widen(self) -> f32;
    /// The nearest number of this type.
    fn narrow(value: f32) -> Self;
}

macro_rules! elements {
    ($($element:ty),*) => {
        $(
            impl sealed::Plain for $element {}
            impl Element for $element {}
        )*
    };
}
elements!(
    f32, f64, f16, bf16, u8, u32, u64, [u32; 2], [u32; 4], [i32; 3], [u32; 5]
);

macro_rules! number {
    ($number:ty, $name:literal, $narrow:expr) => {
        impl Number for $number {
            const NAME: &'static str = $name;

            fn widen(self) -> f32 {
                f32::from(self)
            }

            fn narrow(value: f32) -> Self {
                $narrow(value)
            }
        }
    };
}
number!(f32, "f32", std::convert::identity);
number!(f16, "f16", f16::from_f32);
number!(bf16, "bf16", bf16::from_f32);

/// Owned memory of a device.
#[derive(Debug)]
pub struct Buffer<T> {
    memory: Memory,
    len: usize,
    gpu: Gpu,
    element: PhantomData<T>,
}

#[derive(Debug)]
pub(super) enum Memory {
    #[cfg(feature = "cuda")]
    Driver(super::driver::Allocation),
    /// Sixteen bytes at a time, so that it is aligned as a device's memory is.
    #[cfg(feature = "cuda-emulator")]
    Host(
        Box<[u128]>,
        #[expect(dead_code, reason = "dropped")] super::emulator::Taken,
    ),
}

impl Memory {
    #[cfg(feature = "cuda-emulator")]
    pub(super) fn host(bytes: &[u8], taken: super::emulator::Taken) -> Self {
        let words = bytes.chunks(16).map(|chunk| {
            let mut word = [0; 16];
            word[..chunk.len()].copy_from_slice(chunk);
            u128::from_ne_bytes(word)
        });
        Self::Host(words.collect(), taken)
    }

    fn address(&self) -> u64 {
        match self {
            #[cfg(feature = "cuda")]
            Self::Driver(allocation) => allocation.address(),
            #[cfg(feature = "cuda-emulator")]
            Self::Host(words, _) => words.as_ptr() as u64,
        }
    }

    fn address_mut(&mut self) -> u64 {
        match self {
            #[cfg(feature = "cuda")]
            Self::Driver(allocation) => allocation.address(),
            #[cfg(feature = "cuda-emulator")]
            Self::Host(words, _) => words.as_mut_ptr() as u64,
        }
    }
}

impl<T: Element> Buffer<T> {
    pub(super) fn new(memory: Memory, len: usize, gpu: Gpu) -> Self {
        Self {
            memory,
            len,
            gpu,
            element: PhantomData,
        }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it, for reading.
    #[must_use]
    pub fn view(&self) -> View<'_, T> {
        View {
            address: self.memory.address(),
            len: self.len,
            device: self.gpu.id(),
            lent: PhantomData,
        }
    }

    /// All of it, for writing.
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut {
            address: self.memory.address_mut(),
            len: self.len,
            device: self.gpu.id(),
            lent: PhantomData,
        }
    }

    /// All of it as `rows` rows of `cols` numbers.
    ///
    /// # Panics
    /// If that is not its length.
    #[must_use]
    pub fn mat(&self, rows: usize, cols: usize) -> Mat<'_, T> {
        Mat::new(self.view(), rows, cols)
    }

    /// All of it as `rows` rows of `cols` numbers, for writing.
    ///
    /// # Panics
    /// If that is not its length.
    pub fn mat_mut(&mut self, rows: usize, cols: usize) -> MatMut<'_, T> {
        MatMut::new(self.view_mut(), rows, cols)
    }
}

/// Elements that lie side by side in a device's memory, for reading.
#[derive(Debug)]
pub struct View<'a, T> {
    address: u64,
    len: usize,
    device: usize,
    lent: PhantomData<&'a [T]>,
}

/// Elements that lie side by side in a device's memory, for writing.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    address: u64,
    len: usize,
    device: usize,
    lent: PhantomData<&'a mut [T]>,
}

macro_rules! view {
    ($view:ident) => {
        impl<T> $view<'_, T> {
            /// Number of elements.
            #[must_use]
            pub fn len(&self) -> usize {
                self.len
            }

            /// Whether there are no elements.
            #[must_use]
            pub fn is_empty(&self) -> bool {
                self.len == 0
            }

            /// Where it lies in the device's memory.
            #[must_use]
            pub fn address(&self) -> u64 {
                self.address
            }

            pub(super) fn device(&self) -> usize {
                self.device
            }
        }
    };
}
view!(View);
view!(ViewMut);

/// What is only read can be lent any number of times, whatever it is of.
macro_rules! shared {
    ($shared:ident) => {
        impl<T> Clone for $shared<'_, T> {
            fn clone(&self) -> Self {
                *self
            }
        }
        impl<T> Copy for $shared<'_, T> {}
    };
}
shared!(View);
shared!(Mat);

impl<T> View<'_, T> {
    /// Some of the elements.
    ///
    /// # Panics
    /// If there are no such elements.
    #[must_use]
    pub fn part(self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "elements of the view"
        );
        Self {
            address: self.address + (range.start * size_of::<T>()) as u64,
            len: range.len(),
            ..self
        }
    }

    pub(super) fn check(&self, gpu: &Gpu) {
        assert_eq!(self.device, gpu.id(), "memory of another device");
    }
}

impl<T> ViewMut<'_, T> {
    /// Some of the elements.
    ///
    /// # Panics
    /// If there are no such elements.
    #[must_use]
    pub fn part(self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "elements of the view"
        );
        Self {
            address: self.address + (range.start * size_of::<T>()) as u64,
            len: range.len(),
            ..self
        }
    }

    /// For reading what was written.
    #[must_use]
    pub fn as_view(&self) -> View<'_, T> {
        View {
            address: self.address,
            len: self.len,
            device: self.device,
            lent: PhantomData,
        }
    }

    /// The same for a while, so that it can be used again.
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut {
            address: self.address,
            len: self.len,
            device: self.device,
            lent: PhantomData,
        }
    }
}

/// Rows of a matrix that lie `stride` elements apart, for reading.
#[derive(Debug)]
pub struct Mat<'a, T> {
    pub(super) view: View<'a, T>,
    rows: usize,
    cols: usize,
    stride: usize,
}

/// Rows of a matrix that lie `stride` elements apart, for writing.
#[derive(Debug)]
pub struct MatMut<'a, T> {
    pub(super) view: ViewMut<'a, T>,
    rows: usize,
    cols: usize,
    stride: usize,
}

macro_rules! mat {
    ($mat:ident, $view:ident) => {
        impl<'a, T> $mat<'a, T> {
            /// Rows without gaps.
            ///
            /// # Panics
            /// If the length is not `rows · cols`.
            #[must_use]
            pub fn new(view: $view<'a, T>, rows: usize, cols: usize) -> Self {
                assert_eq!(view.len, rows * cols, "the matrix's length");
                Self {
                    view,
                    rows,
                    cols,
                    stride: cols,
                }
            }

            /// Rows that lie `stride` elements apart.
            ///
            /// # Panics
            /// If rows overlap, or the view does not end with the last of them.
            #[must_use]
            pub fn strided(view: $view<'a, T>, rows: usize, cols: usize, stride: usize) -> Self {
                let mat = Self {
                    view,
                    rows,
                    cols,
                    stride,
                };
                assert!(rows <= 1 || cols <= stride, "rows that do not overlap");
                assert_eq!(mat.view.len, mat.span(), "the matrix's length");
                mat
            }

            /// Number of rows.
            #[must_use]
            pub fn num_rows(&self) -> usize {
                self.rows
            }

            /// Number of columns.
            #[must_use]
            pub fn num_cols(&self) -> usize {
                self.cols
            }

            /// Elements from the start of a row to the start of the next.
            #[must_use]
            pub fn stride(&self) -> usize {
                self.stride
            }

            /// Some columns of all rows.
            ///
            /// # Panics
            /// If there are no such columns.
            #[must_use]
            pub fn cols(mut self, cols: Range<usize>) -> Self {
                assert!(
                    cols.start <= cols.end && cols.end <= self.cols,
                    "columns of the matrix"
                );
                self.view.address += (cols.start * size_of::<T>()) as u64;
                self.cols = cols.len();
                self.view.len = self.span();
                self
            }

            /// Some of the rows.
            ///
            /// # Panics
            /// If there are no such rows.
            #[must_use]
            pub fn rows(mut self, rows: Range<usize>) -> Self {
                assert!(
                    rows.start <= rows.end && rows.end <= self.rows,
                    "rows of the matrix"
                );
                self.view.address += (rows.start * self.stride * size_of::<T>()) as u64;
                self.rows = rows.len();
                self.view.len = self.span();
                self
            }

            /// Elements from the first to the last, gaps between rows included.
            fn span(&self) -> usize {
                match self.rows {
                    0 => 0,
                    rows => (rows - 1) * self.stride + self.cols,
                }
            }

            /// Whether every row starts where a load of [`Number::WIDE`] elements may.
            pub(super) fn is_aligned(&self) -> bool {
                let bytes = size_of::<T>();
                self.view.address.is_multiple_of(16)
                    && (self.stride * bytes).is_multiple_of(16)
                    && (self.cols * bytes).is_multiple_of(16)
            }
        }
    };
}
mat!(Mat, View);
mat!(MatMut, ViewMut);

impl<T> MatMut<'_, T> {
    /// For reading what was written.
    #[must_use]
    pub fn as_mat(&self) -> Mat<'_, T> {
        Mat {
            view: self.view.as_view(),
            rows: self.rows,
            cols: self.cols,
            stride: self.stride,
        }
    }

    /// The columns before `at`, and those from there on.
    ///
    /// # Panics
    /// If there are fewer columns.
    #[must_use]
    pub fn split_cols(self, at: usize) -> (Self, Self) {
        let copy = Self {
            view: ViewMut { ..self.view },
            ..self
        };
        let cols = self.cols;
        (copy.cols(0..at), self.cols(at..cols))
    }

    /// The same for a while, so that it can be used again.
    pub fn reborrow(&mut self) -> MatMut<'_, T> {
        MatMut {
            view: self.view.reborrow(),
            rows: self.rows,
            cols: self.cols,
            stride: self.stride,
        }
    }
}
