//! Tensors in a GPU's memory.

use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use candle_core::DType;
use half::{bf16, f16};
use updraft_kernels::cuda::{Buffer, Gpu, Mat, MatMut, Number, View, ViewMut};

use crate::error::{Error, Result};

/// A tensor of one or two dimensions on a GPU; clones and views share its memory.
#[derive(Debug, Clone)]
pub(crate) struct Tensor {
    gpu: Gpu,
    memory: Memory,
    offset: usize,
    dims: Vec<usize>,
    /// Elements from one row to the next.
    stride: usize,
}

/// Operations lock what they read and write, each for itself: views of one buffer may be read together, and whoever
/// writes to one is alone.
#[derive(Debug, Clone)]
pub(crate) enum Memory {
    F32(Arc<RwLock<Buffer<f32>>>),
    F16(Arc<RwLock<Buffer<f16>>>),
    Bf16(Arc<RwLock<Buffer<bf16>>>),
}

/// A number type that tensors hold.
pub(crate) trait Element: Number {
    fn of(memory: &Memory) -> Option<&RwLock<Buffer<Self>>>;
    fn memory(buffer: Buffer<Self>) -> Memory;
}

macro_rules! element {
    ($number:ty, $variant:ident) => {
        impl Element for $number {
            fn of(memory: &Memory) -> Option<&RwLock<Buffer<Self>>> {
                match memory {
                    Memory::$variant(buffer) => Some(buffer),
                    _ => None,
                }
            }

            fn memory(buffer: Buffer<Self>) -> Memory {
                Memory::$variant(Arc::new(RwLock::new(buffer)))
            }
        }
    };
}
element!(f32, F32);
element!(f16, F16);
element!(bf16, Bf16);

/// Runs a block with `$T` standing for the tensor's number type.
macro_rules! typed {
    ($tensor:expr, $T:ident => $body:expr) => {
        match $tensor.dtype() {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            _ => {
                type $T = half::bf16;
                $body
            }
        }
    };
}
pub(crate) use typed;

impl Tensor {
    /// Numbers that a kernel is about to write.
    pub(crate) fn of_buffer<T: Element>(gpu: &Gpu, buffer: Buffer<T>, dims: &[usize]) -> Self {
        debug_assert_eq!(buffer.len(), dims.iter().product::<usize>());
        Self {
            gpu: gpu.clone(),
            memory: T::memory(buffer),
            offset: 0,
            stride: dims.last().copied().unwrap_or(1),
            dims: dims.to_vec(),
        }
    }

    /// Copies numbers to the GPU, rounded to `dtype` where it is narrower.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a type that no kernel knows; [`Error::Gpu`].
    pub(crate) fn upload(gpu: &Gpu, from: &candle_core::Tensor, dtype: DType) -> Result<Self> {
        let flat = from.flatten_all()?.to_dtype(dtype)?;
        let dims = from.dims();
        match dtype {
            DType::F32 => Ok(Self::of_buffer(
                gpu,
                gpu.upload(&flat.to_vec1::<f32>()?)?,
                dims,
            )),
            DType::F16 => Ok(Self::of_buffer(
                gpu,
                gpu.upload(&flat.to_vec1::<f16>()?)?,
                dims,
            )),
            DType::BF16 => Ok(Self::of_buffer(
                gpu,
                gpu.upload(&flat.to_vec1::<bf16>()?)?,
                dims,
            )),
            other => Err(Error::Unsupported {
                what: format!("computing in {other:?} on a GPU"),
                instead: "load the model as BF16, F16 or F32",
            }),
        }
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub(crate) fn dims(&self) -> &[usize] {
        &self.dims
    }

    pub(crate) fn dtype(&self) -> DType {
        match self.memory {
            Memory::F32(_) => DType::F32,
            Memory::F16(_) => DType::F16,
            Memory::Bf16(_) => DType::BF16,
        }
    }

    pub(crate) fn cols(&self) -> usize {
        self.dims.last().copied().unwrap_or(1)
    }

    pub(crate) fn rows(&self) -> usize {
        self.dims.iter().rev().skip(1).product()
    }

    pub(crate) fn is_packed(&self) -> bool {
        self.stride == self.cols() || self.rows() <= 1
    }

    pub(crate) fn narrow(&self, dim: usize, start: usize, len: usize) -> Self {
        assert!(start + len <= self.dims[dim], "places of the dimension");
        let is_last = dim + 1 == self.dims.len();
        let mut view = self.clone();
        view.offset += if is_last { start } else { start * self.stride };
        view.dims[dim] = len;
        if self.dims.len() == 1 {
            view.stride = len;
        }
        view
    }

    /// The rows with the columns that were left free behind them.
    ///
    /// # Panics
    /// If there are fewer.
    pub(crate) fn wider(&self, room: usize) -> Self {
        let cols = self.cols() + room;
        assert!(cols <= self.stride, "room behind every row");
        Self {
            dims: vec![self.rows(), cols],
            ..self.clone()
        }
    }

    pub(crate) fn reshape(&self, dims: &[usize]) -> Self {
        assert!(self.is_packed(), "rows without gaps");
        let elements = |dims: &[usize]| dims.iter().product::<usize>();
        assert_eq!(elements(dims), elements(&self.dims), "as many numbers");
        Self {
            dims: dims.to_vec(),
            stride: dims.last().copied().unwrap_or(1),
            ..self.clone()
        }
    }

    /// Memory of the same type that an operation is about to fill.
    pub(crate) fn alloc(&self, dims: &[usize]) -> Result<Self> {
        let len = dims.iter().product();
        typed!(self, T => Ok(Self::of_buffer(&self.gpu, self.gpu.alloc::<T>(len)?, dims)))
    }

    /// The same for rows behind each of which so many columns stay free.
    pub(crate) fn alloc_with_room(&self, [rows, cols]: [usize; 2], room: usize) -> Result<Self> {
        Ok(self.alloc(&[rows, cols + room])?.narrow(1, 0, cols))
    }

    pub(crate) fn zeros(&self, dims: &[usize]) -> Result<Self> {
        let len = dims.iter().product();
        typed!(self, T => Ok(Self::of_buffer(&self.gpu, self.gpu.zeros::<T>(len)?, dims)))
    }

    pub(crate) fn packed_copy(&self) -> Result<Self> {
        let copy = self.alloc(&self.dims)?;
        super::copy(1.0, self, &copy)?;
        Ok(copy)
    }

    /// The same numbers in another type; the tensor itself where it has that type.
    pub(crate) fn cast(&self, dtype: DType) -> Result<Self> {
        if self.dtype() == dtype {
            return Ok(self.clone());
        }
        let from = if self.is_packed() {
            self.clone()
        } else {
            self.packed_copy()?
        };
        match (from.dtype(), dtype) {
            (DType::F32, DType::F16) => from.cast_as::<f32, f16>(),
            (DType::F32, _) => from.cast_as::<f32, bf16>(),
            (DType::F16, _) => from.cast_as::<f16, f32>(),
            _ => from.cast_as::<bf16, f32>(),
        }
    }

    fn cast_as<From: Element, To: Element>(&self) -> Result<Self> {
        let mut to = self.gpu.alloc::<To>(self.dims.iter().product())?;
        let from = self.read::<From>();
        updraft_kernels::cuda::cast::cast(&self.gpu, from.view(), &to.view_mut())?;
        Ok(Self::of_buffer(&self.gpu, to, &self.dims))
    }

    /// A copy of an f32 tensor in the host's memory.
    pub(crate) fn to_host(&self) -> Result<Vec<f32>> {
        let wide = self.cast(DType::F32)?;
        let wide = if wide.is_packed() {
            wide
        } else {
            wide.packed_copy()?
        };
        let read = wide.read::<f32>();
        Ok(self.gpu.download(read.view())?)
    }

    /// Holds it for reading.
    ///
    /// # Panics
    /// If it has another type, or someone writes to its memory.
    pub(crate) fn read<T: Element>(&self) -> Read<'_, T> {
        let memory = T::of(&self.memory).expect("the tensor's type");
        Read {
            buffer: memory
                .try_read()
                .expect("an operation's outputs are not among its inputs"),
            tensor: self,
        }
    }

    /// Holds it for writing.
    ///
    /// # Panics
    /// If it has another type, or someone reads or writes its memory.
    pub(crate) fn write<T: Element>(&self) -> Write<'_, T> {
        let memory = T::of(&self.memory).expect("the tensor's type");
        Write {
            buffer: memory
                .try_write()
                .expect("an operation's outputs are not among its inputs"),
            tensor: self,
        }
    }

    /// Elements from the first to the last.
    fn span(&self) -> std::ops::Range<usize> {
        let len = match self.rows() {
            0 => 0,
            rows => (rows - 1) * self.stride + self.cols(),
        };
        self.offset..self.offset + len
    }
}

/// A tensor held for reading.
pub(crate) struct Read<'a, T> {
    buffer: RwLockReadGuard<'a, Buffer<T>>,
    tensor: &'a Tensor,
}

impl<T: Element> Read<'_, T> {
    pub(crate) fn mat(&self) -> Mat<'_, T> {
        let (rows, cols) = (self.tensor.rows(), self.tensor.cols());
        let view = self.buffer.view().part(self.tensor.span());
        Mat::strided(view, rows, cols, self.tensor.stride)
    }

    /// All numbers of a tensor without gaps.
    pub(crate) fn view(&self) -> View<'_, T> {
        assert!(self.tensor.is_packed(), "rows without gaps");
        self.buffer.view().part(self.tensor.span())
    }
}

/// A tensor held for writing.
pub(crate) struct Write<'a, T> {
    buffer: RwLockWriteGuard<'a, Buffer<T>>,
    tensor: &'a Tensor,
}

impl<T: Element> Write<'_, T> {
    pub(crate) fn mat(&mut self) -> MatMut<'_, T> {
        let (rows, cols) = (self.tensor.rows(), self.tensor.cols());
        let view = self.buffer.view_mut().part(self.tensor.span());
        MatMut::strided(view, rows, cols, self.tensor.stride)
    }

    /// All numbers of a tensor without gaps.
    pub(crate) fn view(&mut self) -> ViewMut<'_, T> {
        assert!(self.tensor.is_packed(), "rows without gaps");
        self.buffer.view_mut().part(self.tensor.span())
    }
}
