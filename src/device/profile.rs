//! A runtime that times what it queues, one thing at a time: where a step goes, not how long it takes.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::runtime::{DeviceMemory, Gemm, Launch, Marker, PinnedMemory, Runtime};
use crate::Result;

/// The kind of what is neither a kernel nor a product: kernels that wait for copies. For a kernel that is launched aside none
/// waits: it is timed by itself, as the others are.
pub const COPIES: &str = "copies";
/// The kind of matrix products.
pub const PRODUCTS: &str = "products";

/// Another runtime, with the seconds of what it does by kind: kernels by the first word of their names.
#[derive(Debug)]
pub struct Profiler {
    inner: Arc<dyn Runtime>,
    seconds: Mutex<BTreeMap<String, f64>>,
}

impl Profiler {
    pub fn new(inner: Arc<dyn Runtime>) -> Self {
        Self {
            inner,
            seconds: Mutex::default(),
        }
    }

    /// What was timed so far.
    pub fn seconds(&self) -> BTreeMap<String, f64> {
        let seconds = self.seconds.lock().unwrap_or_else(PoisonError::into_inner);
        seconds.clone()
    }

    fn timed(&self, kind: &str, mut work: impl FnMut() -> Result<()>) -> Result<()> {
        let spent = self.inner.time(&mut work)?;
        let mut seconds = self.seconds.lock().unwrap_or_else(PoisonError::into_inner);
        *seconds.entry(kind.to_string()).or_default() += spent;
        Ok(())
    }
}

impl Runtime for Profiler {
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let kind = launch.kernel.split('_').next().unwrap_or_default();
        // SAFETY: as the caller promises.
        self.timed(kind, || unsafe { self.inner.launch(launch) })
    }

    unsafe fn launch_aside(&self, launch: &Launch<'_>, after: &Marker) -> Result<Marker> {
        let kind = launch.kernel.split('_').next().unwrap_or_default();
        let mut done = None;
        self.timed(kind, || {
            // SAFETY: as the caller promises.
            let marker = unsafe { self.inner.launch_aside(launch, after)? };
            // One thing at a time: what is timed next begins after it.
            self.inner.wait(&marker)?;
            done = Some(marker);
            Ok(())
        })?;
        done.map_or_else(|| self.inner.mark(), Ok)
    }

    unsafe fn gemm(&self, gemm: &Gemm) -> Result<()> {
        // SAFETY: as the caller promises.
        self.timed(PRODUCTS, || unsafe { self.inner.gemm(gemm) })
    }

    fn synchronize(&self) -> Result<()> {
        self.inner.synchronize()
    }

    fn pinned(&self, bytes: usize) -> Result<Box<dyn PinnedMemory>> {
        self.inner.pinned(bytes)
    }

    fn mark(&self) -> Result<Marker> {
        self.inner.mark()
    }

    unsafe fn copy(&self, from: &[u8], to: u64, after: Option<&Marker>) -> Result<Marker> {
        // SAFETY: as the caller promises.
        unsafe { self.inner.copy(from, to, after) }
    }

    unsafe fn copy_back(&self, from: u64, to: &mut [u8], after: Option<&Marker>) -> Result<Marker> {
        // SAFETY: as the caller promises.
        unsafe { self.inner.copy_back(from, to, after) }
    }

    fn wait(&self, marker: &Marker) -> Result<()> {
        self.timed(COPIES, || self.inner.wait(marker))
    }

    fn wait_on_host(&self, marker: &Marker) -> Result<()> {
        self.inner.wait_on_host(marker)
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.inner.time(work)
    }

    fn multiprocessors(&self) -> u32 {
        self.inner.multiprocessors()
    }

    fn has_warpgroup_products(&self) -> bool {
        self.inner.has_warpgroup_products()
    }

    fn memory(&self) -> Result<DeviceMemory> {
        self.inner.memory()
    }

    fn withhold(&self, bytes: u64) -> Result<Box<dyn Any + Send>> {
        self.inner.withhold(bytes)
    }

    fn reset_peak_memory(&self) -> Result<()> {
        self.inner.reset_peak_memory()
    }

    fn trim(&self) -> Result<()> {
        self.inner.trim()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}
