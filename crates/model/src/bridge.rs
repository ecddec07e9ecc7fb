//! Slices and matrix views of CPU tensors, without copies, for the kernels.

use std::cell::Cell;
use std::marker::PhantomData;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Storage, StorageRef, WithDType};
use updraft_kernels::rope::Table;
use updraft_kernels::{Float, Mat, MatMut};

use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// A number type that both candle and the kernels know.
pub(crate) trait Real: Float + WithDType {
    fn of_f32(value: f32) -> Self;
    fn of_f64(value: f64) -> Self;
    fn vec(storage: &mut CpuStorage) -> Option<&mut Vec<Self>>;
    fn table(table: &RopeTable) -> Option<&Table<Self>>;
}

/// A rotary table in the decoder's number type.
#[derive(Debug)]
pub(crate) enum RopeTable {
    F32(Table<f32>),
    F64(Table<f64>),
    #[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
    Gpu(updraft_kernels::cuda::rope::Table),
}

#[cfg(any(feature = "cuda", feature = "cuda-emulator"))]
impl RopeTable {
    /// The table on a GPU.
    pub(crate) fn gpu(&self) -> Result<&updraft_kernels::cuda::rope::Table> {
        match self {
            Self::Gpu(table) => Ok(table),
            _ => Err(crate::gpu::host_only()),
        }
    }
}

macro_rules! real {
    ($float:ty, $variant:ident) => {
        impl Real for $float {
            fn of_f32(value: f32) -> Self {
                Self::from(value)
            }
            fn of_f64(value: f64) -> Self {
                value as Self
            }
            fn vec(storage: &mut CpuStorage) -> Option<&mut Vec<Self>> {
                match storage {
                    CpuStorage::$variant(values) => Some(values),
                    _ => None,
                }
            }
            fn table(table: &RopeTable) -> Option<&Table<Self>> {
                match table {
                    RopeTable::$variant(table) => Some(table),
                    _ => None,
                }
            }
        }
    };
}
real!(f32, F32);
real!(f64, F64);

/// Runs a block with `$F` standing for the tensor's number type.
macro_rules! typed {
    ($tensor:expr, $F:ident => $body:expr) => {
        match $tensor.dtype() {
            candle_core::DType::F32 => {
                type $F = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $F = f64;
                $body
            }
            other => Err($crate::bridge::unsupported_dtype(other)),
        }
    };
}
pub(crate) use typed;

pub(crate) fn unsupported_dtype(dtype: DType) -> Error {
    Error::Unsupported {
        what: format!("computing in {dtype:?}"),
        instead: "load the model as F32 or BF16 on the CPU, as BF16 or F16 on a GPU",
    }
}

/// A tensor held for reading.
pub(crate) struct View<'a, F> {
    storage: StorageRef<'a>,
    shape: MatShape,
    number: PhantomData<F>,
}

/// A tensor as a matrix: its last dimension are the columns, which must lie side by side.
#[derive(Clone, Copy)]
struct MatShape {
    offset: usize,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl MatShape {
    fn of(layout: &Layout) -> Result<Self> {
        let (dims, offset) = (layout.dims(), layout.start_offset());
        let cols = dims.last().copied().unwrap_or(1);
        if layout.is_contiguous() {
            let rows = layout.shape().elem_count().checked_div(cols).unwrap_or(0);
            return Ok(Self {
                offset,
                rows,
                cols,
                stride: cols,
            });
        }
        match (dims, layout.stride()) {
            (&[rows, cols], &[stride, 1]) => Ok(Self {
                offset,
                rows,
                cols,
                stride,
            }),
            _ => Err(candle_core::Error::RequiresContiguous { op: "kernel" }
                .bt()
                .into()),
        }
    }

    /// Elements from the first to the last, gaps between rows included.
    fn len(&self) -> usize {
        if self.rows == 0 {
            0
        } else {
            (self.rows - 1) * self.stride + self.cols
        }
    }
}

/// Holds a tensor for reading.
///
/// # Errors
/// [`Error::Device`] off the CPU, [`Error::Candle`] for another number type or a transposed view.
pub(crate) fn read<F: WithDType>(tensor: &Tensor) -> Result<View<'_, F>> {
    let tensor = tensor.host()?;
    let (storage, layout) = tensor.storage_and_layout();
    let shape = MatShape::of(layout)?;
    match &*storage {
        Storage::Cpu(cpu) => cpu.as_slice::<F>().map(|_| ())?,
        _ => return Err(unsupported_device(tensor.device())),
    }
    Ok(View {
        storage,
        shape,
        number: PhantomData,
    })
}

impl<F: WithDType> View<'_, F> {
    /// All elements, gaps between the rows of a strided view included.
    pub(crate) fn slice(&self) -> &[F] {
        let Storage::Cpu(cpu) = &*self.storage else {
            unreachable!("`read` refuses other devices")
        };
        let all = cpu.as_slice::<F>().expect("`read` checked the number type");
        &all[self.shape.offset..self.shape.offset + self.shape.len()]
    }

    pub(crate) fn mat(&self) -> Mat<'_, F> {
        Mat::strided(
            self.slice(),
            self.shape.rows,
            self.shape.cols,
            self.shape.stride,
        )
    }
}

/// Changes a tensor's elements in place, through whatever view of them `tensor` is.
///
/// The caller owns the tensor alone or is the only writer of this view; nothing else that shares
/// its memory may be held by [`read`] meanwhile.
///
/// # Errors
/// As [`read`].
pub(crate) fn edit<F: Real, R>(
    tensor: &Tensor,
    change: impl FnOnce(MatMut<'_, F>) -> R,
) -> Result<R> {
    let tensor = tensor.host()?;
    if !matches!(tensor.device(), Device::Cpu) {
        return Err(unsupported_device(tensor.device()));
    }
    let edit = Edit {
        change: Cell::new(Some(change)),
        result: Cell::new(None),
        number: PhantomData::<F>,
    };
    tensor.inplace_op1(&edit)?;
    Ok(edit.result.into_inner().expect("candle ran the operation"))
}

/// [`edit`] for a tensor without gaps.
///
/// # Errors
/// As [`read`].
pub(crate) fn edit_slice<F: Real, R>(
    tensor: &Tensor,
    change: impl FnOnce(&mut [F]) -> R,
) -> Result<R> {
    let tensor = tensor.host()?;
    if !tensor.is_contiguous() {
        return Err(candle_core::Error::RequiresContiguous { op: "kernel" }
            .bt()
            .into());
    }
    if tensor.elem_count() == 0 {
        return Ok(change(&mut [])); // a matrix has no row to hand out
    }
    edit(&tensor.flatten_all()?.into(), |mut row: MatMut<'_, F>| {
        change(row.row_mut(0))
    })
}

struct Edit<F, C, R> {
    change: Cell<Option<C>>,
    result: Cell<Option<R>>,
    number: PhantomData<F>,
}

impl<F: Real, R, C: FnOnce(MatMut<'_, F>) -> R> InplaceOp1 for Edit<F, C, R> {
    fn name(&self) -> &'static str {
        "kernel"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let shape = MatShape::of(layout).map_err(candle_core::Error::wrap)?;
        let dtype = candle_core::backend::BackendStorage::dtype(storage);
        let Some(all) = F::vec(storage) else {
            return Err(candle_core::Error::UnexpectedDType {
                msg: "kernel",
                expected: F::DTYPE,
                got: dtype,
            }
            .bt());
        };
        let elements = &mut all[shape.offset..shape.offset + shape.len()];
        let change = self.change.take().expect("candle runs an operation once");
        self.result.set(Some(change(MatMut::strided(
            elements,
            shape.rows,
            shape.cols,
            shape.stride,
        ))));
        Ok(())
    }
}

/// A new CPU tensor of these elements; nothing is copied.
pub(crate) fn tensor<F: Real>(
    elements: Vec<F>,
    shape: impl Into<candle_core::Shape>,
) -> Result<Tensor> {
    Ok(candle_core::Tensor::from_vec(elements, shape.into(), &Device::Cpu)?.into())
}

fn unsupported_device(device: &Device) -> Error {
    Error::Device {
        device: format!("{:?}", device.location()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_view_reads_and_writes_its_columns_only() {
        let whole = tensor((0..12).map(|i| i as f32).collect(), (3, 4)).expect("12 elements");
        let view = whole.narrow(1, 1, 2).expect("columns 1 and 2");
        assert_eq!(
            read::<f32>(&view).expect("readable").mat().row(1),
            [5.0, 6.0]
        );
        edit(&view, |mut mat: MatMut<'_, f32>| mat.row_mut(2).fill(0.0)).expect("writable");
        assert_eq!(
            whole
                .host()
                .and_then(|host| Ok(host.to_vec2::<f32>()?))
                .expect("f32")[2],
            [8.0, 0.0, 0.0, 11.0]
        );
    }

    #[test]
    fn what_is_no_matrix_or_of_another_type_is_an_error() {
        let whole = tensor(vec![0.0_f32; 12], (3, 4)).expect("12 elements");
        let transposed = whole
            .host()
            .and_then(|host| Ok(host.t()?))
            .expect("transposed");
        assert!(read::<f32>(&transposed.into()).is_err());
        assert!(read::<f64>(&whole).is_err());
        assert!(edit_slice(&whole, |_: &mut [f64]| ()).is_err());
        assert!(edit_slice(&whole, |slice: &mut [f32]| slice.len()).is_ok_and(|len| len == 12));
    }
}
