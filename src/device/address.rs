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
    let (storage, layout) = t.storage_and_layout();
    let start = first_element(layout).ok_or_else(|| not_contiguous(t))?;
    let base = match &*storage {
        Storage::Cpu(storage) => host_address(storage),
        Storage::Cuda(storage) => device_address(storage),
        Storage::Metal(_) => None,
    };
    let base = base.ok_or_else(|| not_contiguous(t))?;
    Ok(base + (start * t.dtype().size_in_bytes()) as u64)
}

/// The address of the first element of a contiguous tensor that a kernel writes.
///
/// # Errors
/// As [`address`].
pub fn address_mut(t: &Tensor) -> Result<u64> {
    let find = FindAddress::default();
    t.inplace_op1(&find)?;
    let base = find.0.get().ok_or_else(|| not_contiguous(t))?;
    let start = first_element(t.layout()).ok_or_else(|| not_contiguous(t))?;
    Ok(base + (start * t.dtype().size_in_bytes()) as u64)
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

fn first_element(layout: &Layout) -> Option<usize> {
    layout.contiguous_offsets().map(|(start, _)| start)
}

fn not_contiguous(t: &Tensor) -> Error {
    Error::Shape {
        op: "address",
        expected: "a contiguous tensor of numbers".into(),
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
