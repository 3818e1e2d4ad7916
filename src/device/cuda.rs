//! The CUDA device: candle's context and stream, our kernels and cuBLAS on it, and its memory.

use std::any::Any;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::cublas::{CudaBlas, result as cublas, sys as blas};
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, DriverError, LaunchConfig,
    PushKernelArg, result as driver, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::{CudaDevice, DType, Device};

use super::no_cuda;
use super::runtime::{
    Argument, DeviceMemory, Gemm, Launch, Marker, PinnedMemory, Runtime, install,
};
use crate::{Error, Result};

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

const ORDINAL: usize = 0;
/// The compute capability that the files `*_hopper.cu` are compiled for: its own instructions are not those of what came later.
const HOPPER: (i32, i32) = (9, 0);

unsafe extern "C" {
    fn qlora_load_cuda(problem: *mut c_char, capacity: usize) -> c_int;
}

/// The first GPU, with our kernels loaded.
///
/// # Errors
/// [`Error::Config`] with the reason where there is none that can be used.
pub(super) fn open() -> Result<Device> {
    /// Kernels run on the stream of the device that was opened first: a second one would bring another stream.
    static OPENED: Mutex<Option<CudaDevice>> = Mutex::new(None);
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = &*opened {
        return Ok(Device::Cuda(device.clone()));
    }
    load_libraries()?;
    let cannot =
        |error: &dyn std::fmt::Display| no_cuda(&format!("the GPU cannot be used: {error}"));
    driver::init().map_err(|e| cannot(&describe_error(e)))?;
    let device = CudaDevice::new_with_stream(ORDINAL).map_err(|e| cannot(&first_line(&e)))?;
    // SAFETY: every tensor is used on the one stream it was allocated on.
    unsafe { device.disable_event_tracking() };
    let placed = Device::Cuda(device.clone());
    install(&placed, Arc::new(CudaRuntime::new(&device)?));
    *opened = Some(device);
    Ok(placed)
}

fn load_libraries() -> Result<()> {
    let mut problem = [0; 512];
    // SAFETY: the loader writes at most so many bytes, with a zero at the end.
    let is_loaded = unsafe { qlora_load_cuda(problem.as_mut_ptr(), problem.len()) };
    if is_loaded == 1 {
        return Ok(());
    }
    // SAFETY: as above.
    let problem = unsafe { CStr::from_ptr(problem.as_ptr()) }.to_string_lossy();
    let missing = match problem.contains("libcuda.so") {
        true => "no NVIDIA driver on this machine",
        false => "a library of CUDA 13 is missing",
    };
    Err(no_cuda(&format!("{missing} ({problem})")))
}

fn first_line(error: &dyn std::fmt::Display) -> String {
    error.to_string().lines().next().unwrap_or("").to_string()
}

fn describe_error(error: DriverError) -> String {
    format!("{:?}", error.0)
}

/// Our kernels and cuBLAS on candle's stream, copies and kernels beside them on others.
#[derive(Debug)]
struct CudaRuntime {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// To the device, and from it: the bus takes both at a time.
    copies: Arc<CudaStream>,
    copies_back: Arc<CudaStream>,
    /// Kernels beside those of `stream`. Both have the lowest priority, which is what a stream has that asks for none.
    aside: Arc<CudaStream>,
    blas: Arc<CudaBlas>,
    modules: Vec<Arc<CudaModule>>,
    functions: Mutex<HashMap<String, CudaFunction>>,
    pool: MemoryPool,
    multiprocessors: u32,
    has_warpgroup_products: bool,
}

/// The device's pool that tensors are allocated from.
#[derive(Debug)]
struct MemoryPool(sys::CUmemoryPool);

// SAFETY: a handle that the driver lets every thread use.
unsafe impl Send for MemoryPool {}
// SAFETY: as above.
unsafe impl Sync for MemoryPool {}

impl CudaRuntime {
    fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = Arc::clone(stream.context());
        let has_warpgroup_products = context
            .compute_capability()
            .map_err(|e| failed("asking for the compute capability", e))?
            == HOPPER;
        let modules = FATBINS
            .iter()
            .filter(|(name, _)| has_warpgroup_products || !name.ends_with("_hopper"))
            .map(|(name, fatbin)| {
                let module = context.load_module(Ptx::from_binary(fatbin.to_vec()));
                module.map_err(|e| failed(&format!("loading {name}"), e))
            })
            .collect::<Result<_>>()?;
        let count = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context
            .attribute(count)
            .map_err(|e| failed("counting processors", e))?;
        let stream_for = |what: &str| {
            context
                .new_stream()
                .map_err(|e| failed(&format!("the stream for {what}"), e))
        };
        Ok(Self {
            pool: MemoryPool::of_device()?,
            blas: device.cublas_handle(),
            functions: Mutex::default(),
            multiprocessors: multiprocessors as u32,
            has_warpgroup_products,
            copies: stream_for("copies")?,
            copies_back: stream_for("copies")?,
            aside: stream_for("kernels beside others")?,
            context,
            stream,
            modules,
        })
    }

    fn function(&self, kernel: &str, shared_bytes: u32) -> Result<CudaFunction> {
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(kernel) {
            return Ok(function.clone());
        }
        let found = self
            .modules
            .iter()
            .find_map(|module| module.load_function(kernel).ok());
        let function = found.ok_or_else(|| Error::Train(format!("there is no kernel {kernel}")))?;
        // A kernel asks for the same amount each time; above 48 KiB the driver wants to know.
        let largest =
            sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function
            .set_attribute(largest, shared_bytes as i32)
            .map_err(|e| {
                failed(
                    &format!("{kernel}: {shared_bytes} bytes of shared memory"),
                    e,
                )
            })?;
        functions.insert(kernel.to_string(), function.clone());
        Ok(function)
    }

    /// Queues a kernel in `stream`.
    ///
    /// # Safety
    /// As for [`Runtime::launch`].
    unsafe fn launch_in(&self, stream: &CudaStream, launch: &Launch<'_>) -> Result<()> {
        let function = self.function(launch.kernel, launch.shared_bytes)?;
        let mut builder = stream.launch_builder(&function);
        for argument in launch.arguments {
            match argument {
                Argument::Address(value) => builder.arg(value),
                Argument::U32(value) => builder.arg(value),
                Argument::U64(value) => builder.arg(value),
                Argument::F32(value) => builder.arg(value),
            };
        }
        let [x, y] = launch.grid;
        let config = LaunchConfig {
            grid_dim: (x, y, 1),
            block_dim: (launch.threads, 1, 1),
            shared_mem_bytes: launch.shared_bytes,
        };
        // SAFETY: as the caller promises.
        let outcome = unsafe { builder.launch(config) };
        outcome.map_err(|e| failed(launch.kernel, e))?;
        Ok(())
    }
}

impl Runtime for CudaRuntime {
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.launch_in(&self.stream, launch) }
    }

    unsafe fn launch_aside(&self, launch: &Launch<'_>, after: &Marker) -> Result<Marker> {
        let waited = self.aside.wait(event(after));
        waited.map_err(|e| failed(launch.kernel, e))?;
        // SAFETY: as the caller promises.
        unsafe { self.launch_in(&self.aside, launch)? };
        mark(&self.aside).inspect_err(|_| {
            // Nobody can wait for it: it is over before its memory is given up.
            let _ = self.aside.synchronize();
        })
    }

    unsafe fn gemm(&self, gemm: &Gemm) -> Result<()> {
        let transpose = |is_transposed| match is_transposed {
            true => blas::cublasOperation_t::CUBLAS_OP_T,
            false => blas::cublasOperation_t::CUBLAS_OP_N,
        };
        let c_type = match gemm.c_dtype {
            DType::F32 => blas::cudaDataType::CUDA_R_32F,
            _ => blas::cudaDataType::CUDA_R_16BF,
        };
        let size = |n: usize| {
            c_int::try_from(n).map_err(|_| {
                Error::Train(format!(
                    "a matrix of {n} rows or columns is too large for cuBLAS"
                ))
            })
        };
        // Unlike a launch, a product does not make the context current on the calling thread by itself.
        self.context
            .bind_to_thread()
            .map_err(|e| failed("cuBLAS", e))?;
        // cuBLAS counts by columns: what is stored by rows is to it the transpose, and c^T = b^T a^T.
        // SAFETY: the caller promises that the addresses cover the matrices; alpha and beta outlive the call.
        let outcome = unsafe {
            cublas::gemm_ex(
                *self.blas.handle(),
                transpose(gemm.b.is_transposed),
                transpose(gemm.a.is_transposed),
                size(gemm.n)?,
                size(gemm.m)?,
                size(gemm.k)?,
                std::ptr::from_ref(&gemm.alpha).cast(),
                gemm.b.address as *const c_void,
                blas::cudaDataType::CUDA_R_16BF,
                size(gemm.b.row_stride)?,
                gemm.a.address as *const c_void,
                blas::cudaDataType::CUDA_R_16BF,
                size(gemm.a.row_stride)?,
                std::ptr::from_ref(&gemm.beta).cast(),
                gemm.c_address as *mut c_void,
                c_type,
                size(gemm.c_row_stride)?,
                blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        outcome.map_err(|e| {
            let (m, n, k) = (gemm.m, gemm.n, gemm.k);
            Error::Train(format!("cuBLAS, {m} x {n} x {k}: {e:?}"))
        })
    }

    fn synchronize(&self) -> Result<()> {
        self.stream
            .synchronize()
            .map_err(|e| failed("waiting for the GPU", e))
    }

    fn pinned(&self, bytes: usize) -> Result<Box<dyn PinnedMemory>> {
        let failed = |e| failed(&format!("{bytes} bytes of pinned host memory"), e);
        self.context.bind_to_thread().map_err(failed)?;
        // SAFETY: freed by its owner, and written before anything reads it.
        let memory = unsafe { driver::malloc_host(bytes, 0) }.map_err(failed)?;
        let memory = NonNull::new(memory.cast())
            .ok_or_else(|| Error::Train(format!("no {bytes} bytes of pinned host memory")))?;
        Ok(Box::new(Pinned {
            memory,
            bytes,
            context: Arc::clone(&self.context),
        }))
    }

    fn mark(&self) -> Result<Marker> {
        mark(&self.stream)
    }

    unsafe fn copy(&self, from: &[u8], to: u64, after: Option<&Marker>) -> Result<Marker> {
        let failed = |e| failed("copying to the GPU", e);
        self.context.bind_to_thread().map_err(failed)?;
        if let Some(after) = after {
            self.copies.wait(event(after)).map_err(failed)?;
        }
        // SAFETY: as the caller promises.
        unsafe { driver::memcpy_htod_async(to, from, self.copies.cu_stream()) }.map_err(failed)?;
        mark(&self.copies)
    }

    unsafe fn copy_back(&self, from: u64, to: &mut [u8], after: Option<&Marker>) -> Result<Marker> {
        let failed = |e| failed("copying from the GPU", e);
        self.context.bind_to_thread().map_err(failed)?;
        if let Some(after) = after {
            self.copies_back.wait(event(after)).map_err(failed)?;
        }
        let stream = self.copies_back.cu_stream();
        // SAFETY: as the caller promises.
        unsafe { driver::memcpy_dtoh_async(to, from, stream) }.map_err(failed)?;
        mark(&self.copies_back)
    }

    fn wait(&self, marker: &Marker) -> Result<()> {
        let waited = self.stream.wait(event(marker));
        waited.map_err(|e| failed("waiting for another queue", e))
    }

    fn wait_on_host(&self, marker: &Marker) -> Result<()> {
        let waited = event(marker).synchronize();
        waited.map_err(|e| failed("waiting for a copy", e))
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let event = || {
            let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
            let event = self.stream.record_event(timed);
            event.map_err(|e| failed("timing", e))
        };
        let start = event()?;
        work()?;
        let end = event()?;
        let milliseconds = start.elapsed_ms(&end).map_err(|e| failed("timing", e))?;
        Ok(f64::from(milliseconds) / 1e3)
    }

    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn has_warpgroup_products(&self) -> bool {
        self.has_warpgroup_products
    }

    fn memory(&self) -> Result<DeviceMemory> {
        use sys::CUmemPool_attribute_enum as Pool;

        let (free, total) = self
            .context
            .mem_get_info()
            .map_err(|e| failed("asking for free memory", e))?;
        let reserved = self.pool.get(Pool::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let used = self.pool.get(Pool::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        Ok(DeviceMemory {
            free_bytes: free as u64 + reserved.saturating_sub(used),
            total_bytes: total as u64,
            used_bytes: used,
            peak_bytes: self.pool.get(Pool::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
            peak_reserved_bytes: self.pool.get(Pool::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH)?,
        })
    }

    fn withhold(&self, bytes: u64) -> Result<Box<dyn Any + Send>> {
        let failed = |e| failed(&format!("{bytes} bytes to be withheld"), e);
        self.context.bind_to_thread().map_err(failed)?;
        // SAFETY: nothing reads or writes it.
        let memory = unsafe { driver::malloc_sync(bytes as usize) }.map_err(failed)?;
        Ok(Box::new(Withheld {
            memory,
            context: Arc::clone(&self.context),
        }))
    }

    fn reset_peak_memory(&self) -> Result<()> {
        use sys::CUmemPool_attribute_enum as Pool;

        // The driver takes 0 alone, and starts from what is in use.
        self.pool.set(Pool::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0)?;
        self.pool.set(Pool::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH, 0)
    }

    fn trim(&self) -> Result<()> {
        self.synchronize()?;
        // SAFETY: a pool of this process.
        let status = unsafe { sys::cuMemPoolTrimTo(self.pool.0, 0) };
        status.result().map_err(|e| failed("the memory pool", e))
    }

    fn describe(&self) -> String {
        let name = self.context.name().unwrap_or_else(|_| "a GPU".into());
        let mut version = 0;
        // SAFETY: the driver writes one integer.
        unsafe { sys::cuDriverGetVersion(&mut version) };
        format!(
            "{name}, driver for CUDA {}.{}",
            version / 1000,
            version % 1000 / 10
        )
    }
}

fn mark(stream: &CudaStream) -> Result<Marker> {
    let event = stream.record_event(None);
    Ok(Marker(Arc::new(event.map_err(|e| failed("marking", e))?)))
}

fn event(marker: &Marker) -> &CudaEvent {
    let event = marker.0.downcast_ref();
    event.expect("markers of this runtime are events")
}

/// Device memory that nothing can use.
struct Withheld {
    memory: sys::CUdeviceptr,
    context: Arc<CudaContext>,
}

impl Drop for Withheld {
    fn drop(&mut self) {
        // What fails here has failed before: there is nobody to tell.
        let _ = self.context.bind_to_thread();
        // SAFETY: allocated by `malloc_sync`, and used by nothing.
        let _ = unsafe { driver::free_sync(self.memory) };
    }
}

/// Page-locked host memory.
struct Pinned {
    memory: NonNull<u8>,
    bytes: usize,
    context: Arc<CudaContext>,
}

// SAFETY: memory that this alone owns.
unsafe impl Send for Pinned {}

impl PinnedMemory for Pinned {
    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: so many bytes were allocated, and are lent with `self`.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // What fails here has failed before: there is nobody to tell.
        let _ = self.context.bind_to_thread();
        // SAFETY: allocated by `malloc_host`.
        let _ = unsafe { driver::free_host(self.memory.as_ptr().cast()) };
    }
}

impl MemoryPool {
    /// The default pool of the device, which keeps what is freed: tensors come and go all the time.
    fn of_device() -> Result<Self> {
        let device = driver::device::get(ORDINAL as c_int).map_err(|e| failed("the device", e))?;
        let mut pool = std::ptr::null_mut();
        // SAFETY: the driver writes one handle.
        let status = unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, device) };
        status.result().map_err(|e| failed("the memory pool", e))?;
        let pool = Self(pool);
        pool.set(
            sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            u64::MAX,
        )?;
        Ok(pool)
    }

    fn get(&self, attribute: sys::CUmemPool_attribute) -> Result<u64> {
        let mut value = 0u64;
        // SAFETY: the attributes asked for here are 64 bits wide.
        let status = unsafe {
            sys::cuMemPoolGetAttribute(self.0, attribute, std::ptr::from_mut(&mut value).cast())
        };
        status.result().map_err(|e| failed("the memory pool", e))?;
        Ok(value)
    }

    fn set(&self, attribute: sys::CUmemPool_attribute, mut value: u64) -> Result<()> {
        // SAFETY: the attributes set here are 64 bits wide.
        let status = unsafe {
            sys::cuMemPoolSetAttribute(self.0, attribute, std::ptr::from_mut(&mut value).cast())
        };
        status.result().map_err(|e| failed("the memory pool", e))
    }
}

fn failed(what: &str, error: DriverError) -> Error {
    let detail = format!("{what}: {}", describe_error(error));
    Error::from_driver(&format!("{:?}", error.0), detail)
}
