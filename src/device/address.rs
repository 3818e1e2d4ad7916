//! Where the data of a tensor lies, for kernels.

use std::cell::Cell;

use candle_core::{CpuStorage, CudaStorage, InplaceOp1, Layout, Storage, Tensor};

use crate::{Error, Result};

/// The address of the first element of a contiguous tensor that a kernel reads.
///
/// The tensor has to live until the kernel is queued: memory is freed in the order of the queue.
///
/// # Errors
/// [`Error::Shape`] for a tensor that is not contiguous.
pub fn address(t: &Tensor) -> Result<u64> {
    expect_contiguous(t)?;
    first_element(t)
}

/// The address of the first element of a contiguous tensor that a kernel writes.
///
/// # Errors
/// As [`address`].
pub fn address_mut(t: &Tensor) -> Result<u64> {
    expect_contiguous(t)?;
    first_element_mut(t)
}

/// The address of the first element of a matrix that a product reads, and how many elements apart its rows begin.
///
/// # Errors
/// [`Error::Shape`] for a tensor that is no matrix, or whose rows are not contiguous.
pub fn matrix_address(t: &Tensor) -> Result<(u64, usize)> {
    let row_stride = row_stride(t)?;
    Ok((first_element(t)?, row_stride))
}

/// The same of a matrix that a product writes.
///
/// # Errors
/// As [`matrix_address`].
pub fn matrix_address_mut(t: &Tensor) -> Result<(u64, usize)> {
    let row_stride = row_stride(t)?;
    Ok((first_element_mut(t)?, row_stride))
}

fn expect_contiguous(t: &Tensor) -> Result<()> {
    match t.is_contiguous() {
        true => Ok(()),
        false => Err(wrong_tensor(t, "a contiguous tensor of numbers")),
    }
}

fn row_stride(t: &Tensor) -> Result<usize> {
    match (t.dims(), t.stride()) {
        // The strides of what has a single row or column say nothing.
        (&[_, cols], _) if t.is_contiguous() => Ok(cols),
        (_, &[row_stride, 1]) => Ok(row_stride),
        _ => Err(wrong_tensor(t, "a matrix of contiguous rows")),
    }
}

fn first_element(t: &Tensor) -> Result<u64> {
    let (storage, layout) = t.storage_and_layout();
    let base = match &*storage {
        Storage::Cpu(storage) => host_address(storage),
        Storage::Cuda(storage) => device_address(storage),
        Storage::Metal(_) => None,
    };
    offset(t, base, layout)
}

fn first_element_mut(t: &Tensor) -> Result<u64> {
    let find = FindAddress::default();
    t.inplace_op1(&find)?;
    offset(t, find.0.get(), t.layout())
}

fn offset(t: &Tensor, base: Option<u64>, layout: &Layout) -> Result<u64> {
    let base = base.ok_or_else(|| wrong_tensor(t, "a tensor of numbers"))?;
    Ok(base + (layout.start_offset() * t.dtype().size_in_bytes()) as u64)
}

/// Asks for the data as something to be changed, which is what a kernel does with it.
#[derive(Default)]
struct FindAddress(Cell<Option<u64>>);

impl InplaceOp1 for FindAddress {
    fn name(&self) -> &'static str {
        "address"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        self.0.set(host_address_mut(storage));
        Ok(())
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> candle_core::Result<()> {
        self.0.set(device_address(storage));
        Ok(())
    }
}

fn wrong_tensor(t: &Tensor, expected: &str) -> Error {
    Error::Shape {
        op: "address",
        expected: expected.into(),
        found: format!("{:?} {:?}", t.dtype(), t.layout()),
    }
}

macro_rules! host_address {
    ($storage:expr, $as_ptr:ident) => {
        match $storage {
            CpuStorage::U8(data) => Some(data.$as_ptr() as u64),
            CpuStorage::U32(data) => Some(data.$as_ptr() as u64),
            CpuStorage::I16(data) => Some(data.$as_ptr() as u64),
            CpuStorage::BF16(data) => Some(data.$as_ptr() as u64),
            CpuStorage::F16(data) => Some(data.$as_ptr() as u64),
            CpuStorage::F32(data) => Some(data.$as_ptr() as u64),
            CpuStorage::F64(data) => Some(data.$as_ptr() as u64),
            _ => None,
        }
    };
}

fn host_address(storage: &CpuStorage) -> Option<u64> {
    host_address!(storage, as_ptr)
}

fn host_address_mut(storage: &mut CpuStorage) -> Option<u64> {
    host_address!(storage, as_mut_ptr)
}

#[cfg(feature = "cuda")]
fn device_address(storage: &CudaStorage) -> Option<u64> {
    use candle_core::backend::BackendStorage;
    use candle_core::cuda_backend::CudaStorageSlice;
    use candle_core::cuda_backend::cudarc::driver::DevicePtr;

    let stream = storage.device().cuda_stream();
    // The guard beside the address records an event for other streams, which is turned off: all work is on this one.
    Some(match &storage.slice {
        CudaStorageSlice::U8(data) => data.device_ptr(&stream).0,
        CudaStorageSlice::U32(data) => data.device_ptr(&stream).0,
        CudaStorageSlice::I16(data) => data.device_ptr(&stream).0,
        CudaStorageSlice::BF16(data) => data.device_ptr(&stream).0,
        CudaStorageSlice::F16(data) => data.device_ptr(&stream).0,
        CudaStorageSlice::F32(data) => data.device_ptr(&stream).0,
        CudaStorageSlice::F64(data) => data.device_ptr(&stream).0,
        _ => return None,
    })
}

#[cfg(not(feature = "cuda"))]
fn device_address(_: &CudaStorage) -> Option<u64> {
    None
}
