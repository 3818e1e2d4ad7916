//! How the CPU side of an operation reads and writes candle tensors.

use std::cell::Cell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Deref;

use candle_core::{
    CpuStorage, DType, Device, InplaceOp1, Layout, Shape, Storage, StorageRef, Tensor,
};

use crate::{Error, Result};

/// Rows that one task of a row-wise operation takes: a constant, so that no result depends on the number of threads.
pub(super) const ROWS_PER_TASK: usize = 32;

/// The data of a contiguous f32 tensor, locked for reading.
pub(super) struct Read<'a> {
    storage: StorageRef<'a>,
    start: usize,
    len: usize,
}

impl Deref for Read<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(data)) => &data[self.start..self.start + self.len],
            _ => unreachable!("`read` admits f32 on the CPU only"),
        }
    }
}

fn wrong_tensor(op: &'static str, t: &Tensor) -> Error {
    Error::Shape {
        op,
        expected: "a contiguous f32 tensor on the CPU".into(),
        found: format!(
            "{:?} {:?} on {:?}{}",
            t.dtype(),
            t.dims(),
            t.device().location(),
            if t.is_contiguous() {
                ""
            } else {
                ", not contiguous"
            }
        ),
    }
}

/// Locks `t` for reading.
///
/// # Errors
/// [`Error::Shape`] unless `t` is f32, contiguous and on the CPU.
pub(super) fn read<'a>(op: &'static str, t: &'a Tensor) -> Result<Read<'a>> {
    if t.dtype() != DType::F32 || !t.device().is_cpu() {
        return Err(wrong_tensor(op, t));
    }
    let (storage, layout) = t.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        drop(storage);
        return Err(wrong_tensor(op, t));
    };
    Ok(Read {
        storage,
        start,
        len: end - start,
    })
}

/// What operations change in place on the CPU.
trait Element: Sized {
    const NAME: &'static str;
    fn of(storage: &mut CpuStorage) -> Option<&mut Vec<Self>>;
}

impl Element for f32 {
    const NAME: &'static str = "f32";
    fn of(storage: &mut CpuStorage) -> Option<&mut Vec<Self>> {
        match storage {
            CpuStorage::F32(data) => Some(data),
            _ => None,
        }
    }
}

impl Element for u8 {
    const NAME: &'static str = "u8";
    fn of(storage: &mut CpuStorage) -> Option<&mut Vec<Self>> {
        match storage {
            CpuStorage::U8(data) => Some(data),
            _ => None,
        }
    }
}

struct InPlace<T, F> {
    op: &'static str,
    write: Cell<Option<F>>,
    element: PhantomData<T>,
}

impl<T: Element, F: FnOnce(&mut [T])> InplaceOp1 for InPlace<T, F> {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (Some(data), Some((start, end))) = (T::of(storage), layout.contiguous_offsets()) else {
            candle_core::bail!(
                "{}: only a contiguous {} tensor can be changed in place",
                self.op,
                T::NAME
            )
        };
        let write = self.write.take().expect("candle calls an operation once");
        write(&mut data[start..end]);
        Ok(())
    }
}

/// Changes the data of `t` in place. `f` must not read `t` itself: its lock is held.
pub(super) fn write<R>(op: &'static str, t: &Tensor, f: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
    write_as(op, t, f)
}

/// The same for a tensor of bytes.
pub(super) fn write_bytes<R>(
    op: &'static str,
    t: &Tensor,
    f: impl FnOnce(&mut [u8]) -> R,
) -> Result<R> {
    write_as(op, t, f)
}

fn write_as<T: Element, R>(
    op: &'static str,
    t: &Tensor,
    f: impl FnOnce(&mut [T]) -> R,
) -> Result<R> {
    let result = Cell::new(None);
    let in_place = InPlace {
        op,
        write: Cell::new(Some(|data: &mut [T]| result.set(Some(f(data))))),
        element: PhantomData,
    };
    t.inplace_op1(&in_place)?;
    drop(in_place);
    Ok(result.into_inner().expect("candle ran the operation"))
}

/// A new tensor whose every element `fill` writes.
pub(super) fn build(shape: impl Into<Shape>, fill: impl FnOnce(&mut [f32])) -> Result<Tensor> {
    let shape = shape.into();
    let mut data = vec![0f32; shape.elem_count()];
    fill(&mut data);
    Ok(Tensor::from_vec(data, shape, &Device::Cpu)?)
}

/// A new tensor that `fill` writes, without zeros being written first.
///
/// # Safety
/// `fill` has to write every element.
pub(super) unsafe fn build_uninit(
    shape: impl Into<Shape>,
    fill: impl FnOnce(&mut [MaybeUninit<f32>]),
) -> Result<Tensor> {
    let shape = shape.into();
    let n = shape.elem_count();
    let mut data = Vec::with_capacity(n);
    fill(&mut data.spare_capacity_mut()[..n]);
    // SAFETY: the capacity is there, and the caller promises that every element was written.
    unsafe { data.set_len(n) };
    Ok(Tensor::from_vec(data, shape, &Device::Cpu)?)
}

/// Checks that `t` has `dims`.
pub(super) fn expect_dims(op: &'static str, name: &str, t: &Tensor, dims: &[usize]) -> Result<()> {
    if t.dims() == dims {
        return Ok(());
    }
    Err(Error::Shape {
        op,
        expected: format!("{name} {dims:?}"),
        found: format!("{:?}", t.dims()),
    })
}
