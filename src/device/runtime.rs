//! What runs device code: launches of our kernels and matrix products, for tensors of one device.
//!
//! An operation finds the runtime from its tensors, as candle finds its own kernels. Two things implement it: the CUDA
//! driver, and the host emulator of `cuda/emulator`, which stands in for a GPU where bf16 tensors lie on the CPU.

use std::any::Any;
use std::fmt::{Debug, Formatter};
use std::sync::{Arc, PoisonError, RwLock};

use candle_core::{DType, Device, DeviceLocation};

use crate::Result;

/// One kernel launch, as the driver takes it.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// The name of the kernel in `cuda/*.cu`.
    pub kernel: &'a str,
    /// Blocks along x and y.
    pub grid: [u32; 2],
    /// Threads of a block, the number that the kernel was written for.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    pub arguments: &'a [Argument],
}

/// An argument of a kernel, by its C type.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Argument {
    /// A device pointer; 0 is null.
    Address(u64),
    U32(u32),
    U64(u64),
    F32(f32),
}

/// A row-major matrix that a product reads.
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    pub address: u64,
    /// Elements from one stored row to the next.
    pub row_stride: usize,
    /// The stored matrix is the transpose of the operand.
    pub is_transposed: bool,
}

/// `c = alpha a b + beta c` with `a: [m, k]`, `b: [k, n]` in bf16, sums in f32, `c: [m, n]` in bf16 or f32.
#[derive(Debug, Clone, Copy)]
pub struct Gemm {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Matrix,
    pub b: Matrix,
    pub c_address: u64,
    pub c_row_stride: usize,
    pub c_dtype: DType,
    pub alpha: f32,
    pub beta: f32,
}

/// Memory of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// What a new allocation can take: free memory, and what this process holds in reserve.
    pub free_bytes: u64,
    pub total_bytes: u64,
    /// What this process has in use in tensors.
    pub used_bytes: u64,
    /// The most that this process had in use at a time since [`Runtime::reset_peak_memory`].
    pub peak_bytes: u64,
    /// The most that it held for tensors since then, in use or in reserve.
    pub peak_reserved_bytes: u64,
}

impl DeviceMemory {
    /// What is neither free nor in tensors: the context with its kernels, the workspaces of libraries, other processes.
    pub fn beside_tensors_bytes(&self) -> u64 {
        self.total_bytes
            .saturating_sub(self.free_bytes + self.used_bytes)
    }
}

/// A place in one of a device's queues: reached when all that was queued before it is done.
#[derive(Clone)]
pub struct Marker(pub Arc<dyn Any + Send + Sync>);

impl Debug for Marker {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str("Marker")
    }
}

/// Memory of the host that a device copies from and to by itself.
pub trait PinnedMemory: Send {
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// A device that runs kernels in the order they are launched, and copies and single kernels beside them.
pub trait Runtime: Debug + Send + Sync {
    /// Queues a kernel.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and its addresses cover what it reads and writes.
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()>;

    /// Queues a kernel beside the others, which begins once `after` is reached. Such kernels run in their order.
    ///
    /// # Safety
    /// As for [`launch`](Self::launch); what it reads stays as it is, and nothing else uses what it writes, from `after` on
    /// until the marker is reached.
    unsafe fn launch_aside(&self, launch: &Launch<'_>, after: &Marker) -> Result<Marker>;

    /// Queues a matrix product.
    ///
    /// # Safety
    /// The addresses cover the matrices.
    unsafe fn gemm(&self, gemm: &Gemm) -> Result<()>;

    /// Waits for everything queued, and reports what went wrong in it.
    fn synchronize(&self) -> Result<()>;

    /// Memory to copy from and to.
    fn pinned(&self, bytes: usize) -> Result<Box<dyn PinnedMemory>>;

    /// The present end of the queue of kernels.
    fn mark(&self) -> Result<Marker>;

    /// Queues a copy beside the kernels, which begins once `after` is reached. Copies are done in their order.
    ///
    /// # Safety
    /// `from` is pinned memory and stays as it is until the marker is reached, and `to` is ours to write from `after` on.
    unsafe fn copy(&self, from: &[u8], to: u64, after: Option<&Marker>) -> Result<Marker>;

    /// The same from the device to the host, in a queue of its own.
    ///
    /// # Safety
    /// `to` is pinned memory that nothing else touches until the marker is reached, and `from` is what is to be copied from
    /// `after` until then.
    unsafe fn copy_back(&self, from: u64, to: &mut [u8], after: Option<&Marker>) -> Result<Marker>;

    /// Lets the kernels that are queued from now on wait for `marker`.
    fn wait(&self, marker: &Marker) -> Result<()>;

    /// Waits for `marker` here.
    fn wait_on_host(&self, marker: &Marker) -> Result<()>;

    /// Seconds that the device takes for what `work` queues.
    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64>;

    /// Thread blocks run on this many processors at a time.
    fn multiprocessors(&self) -> u32;

    /// Whether four warps multiply together (`wgmma`, compute capability 9.0): for kernels that are there for that alone.
    fn has_warpgroup_products(&self) -> bool;

    fn memory(&self) -> Result<DeviceMemory>;

    /// Takes so many bytes that nothing can use until the result is dropped.
    fn withhold(&self, bytes: u64) -> Result<Box<dyn Any + Send>>;

    fn reset_peak_memory(&self) -> Result<()>;

    /// Waits for everything queued and gives back what is held in reserve, so that free memory in pieces is one again.
    fn trim(&self) -> Result<()>;

    /// The device in words: its name and that of its driver.
    fn describe(&self) -> String;
}

/// Kernels are loaded once for each device of the process, as candle keeps one context for each.
static RUNTIMES: RwLock<Vec<(DeviceLocation, Arc<dyn Runtime>)>> = RwLock::new(Vec::new());

/// Makes `runtime` serve the tensors of `device` from now on; the first one stays.
pub fn install(device: &Device, runtime: Arc<dyn Runtime>) {
    let mut runtimes = RUNTIMES.write().unwrap_or_else(PoisonError::into_inner);
    let location = device.location();
    if !runtimes.iter().any(|(known, _)| *known == location) {
        runtimes.push((location, runtime));
    }
}

/// Makes `runtime` serve the tensors of `device` in place of the one that does, which is given back.
///
/// What has a runtime of its own already keeps it.
pub fn replace(device: &Device, runtime: Arc<dyn Runtime>) -> Option<Arc<dyn Runtime>> {
    let mut runtimes = RUNTIMES.write().unwrap_or_else(PoisonError::into_inner);
    let location = device.location();
    let known = runtimes.iter_mut().find(|(known, _)| *known == location);
    known.map(|(_, present)| std::mem::replace(present, runtime))
}

/// The runtime that serves the tensors of `device`, if there is one.
pub fn runtime(device: &Device) -> Option<Arc<dyn Runtime>> {
    let runtimes = RUNTIMES.read().unwrap_or_else(PoisonError::into_inner);
    let location = device.location();
    let found = runtimes.iter().find(|(known, _)| *known == location);
    found.map(|(_, runtime)| Arc::clone(runtime))
}
