//! Where a kernel test runs: on the emulator, in several orders of its threads, or on a GPU; and how close is close.

use std::sync::Arc;

use bytemuck::Pod;
use candle_core::Tensor;
use qlora::Result;
#[cfg(feature = "cuda")]
use qlora::device::DeviceKind;
use qlora::device::{self, Argument, Launch, Placement, Runtime};

use crate::emulated::{self, threads_of};

/// Bytes on both sides of a buffer that no kernel may touch.
const GUARD_BYTES: usize = 64;
const GUARD: u8 = 0xa5;

/// A device, and the kernels to run there.
pub struct DeviceUnderTest {
    placement: Placement,
    runtime: Arc<dyn Runtime>,
}

/// Memory on the device, between its guards.
pub struct Buffer {
    bytes: Tensor,
    len: usize,
}

/// An argument of a kernel.
pub enum Arg<'a> {
    Buffer(&'a Buffer),
    Null,
    U32(u32),
    U64(u64),
    F32(f32),
}

impl DeviceUnderTest {
    /// Runs `check` on the emulator, in every order that CUDA threads may take turns in.
    pub fn on_the_emulator(check: impl Fn(&Self)) {
        let emulator = Self::at(emulated::placement());
        for order in emulated::ORDERS {
            emulated::use_order(order);
            check(&emulator);
        }
    }

    /// Runs `check` on the GPU.
    #[cfg(feature = "cuda")]
    pub fn on_the_gpu(check: impl Fn(&Self)) {
        check(&Self::at(Placement::open(DeviceKind::Cuda).unwrap()));
    }

    fn at(placement: Placement) -> Self {
        let runtime = device::runtime(&placement.device).unwrap();
        Self { placement, runtime }
    }

    /// Where operations have to find their tensors to use this device.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    pub fn upload<T: Pod>(&self, values: &[T]) -> Buffer {
        let data: &[u8] = bytemuck::cast_slice(values);
        let guard = [GUARD; GUARD_BYTES];
        let bytes = [&guard, data, &guard].concat();
        Buffer {
            bytes: Tensor::from_slice(&bytes, bytes.len(), &self.placement.device).unwrap(),
            len: data.len(),
        }
    }

    /// Room for `len` values, each a NaN if it is a float.
    pub fn poisoned<T: Pod>(&self, len: usize) -> Buffer {
        self.upload(&vec![0xffu8; len * size_of::<T>()])
    }

    /// The values in the buffer; fails where a guard was touched.
    #[track_caller]
    pub fn download<T: Pod>(&self, buffer: &Buffer) -> Vec<T> {
        let bytes = buffer.read();
        assert!(bytes.is_ok(), "a guard of the buffer was written to");
        let bytes = bytes.unwrap();
        let values = bytes.chunks_exact(size_of::<T>());
        values.map(bytemuck::pod_read_unaligned).collect()
    }

    /// Runs a kernel to its end.
    #[track_caller]
    pub fn launch(&self, kernel: &str, grid: [u32; 3], shared_bytes: u32, arguments: &[Arg<'_>]) {
        if let Err(fault) = self.try_launch(kernel, grid, shared_bytes, arguments) {
            panic!("{}: {fault}", self.runtime.describe());
        }
    }

    pub fn try_launch(
        &self,
        kernel: &str,
        [x, y, z]: [u32; 3],
        shared_bytes: u32,
        arguments: &[Arg<'_>],
    ) -> Result<()> {
        assert_eq!(z, 1, "grids have two dimensions");
        let arguments: Vec<_> = arguments.iter().map(Arg::resolve).collect();
        let launch = Launch {
            kernel,
            grid: [x, y],
            threads: threads_of(kernel),
            shared_bytes,
            arguments: &arguments,
        };
        // SAFETY: tests give kernels buffers of the sizes that their other arguments say.
        unsafe { self.runtime.launch(&launch)? };
        self.runtime.synchronize()
    }
}

impl Buffer {
    /// The bytes between the guards, or nothing where one was touched.
    pub fn read(&self) -> std::result::Result<Vec<u8>, ()> {
        let bytes: Vec<u8> = self.bytes.to_vec1().unwrap();
        let (before, rest) = bytes.split_at(GUARD_BYTES);
        let (data, after) = rest.split_at(self.len);
        match before.iter().chain(after).all(|&byte| byte == GUARD) {
            true => Ok(data.to_vec()),
            false => Err(()),
        }
    }
}

impl Arg<'_> {
    fn resolve(&self) -> Argument {
        match *self {
            Self::Buffer(buffer) => {
                Argument::Address(device::address_mut(&buffer.bytes).unwrap() + GUARD_BYTES as u64)
            }
            Self::Null => Argument::Address(0),
            Self::U32(value) => Argument::U32(value),
            Self::U64(value) => Argument::U64(value),
            Self::F32(value) => Argument::F32(value),
        }
    }
}

/// `kernel_test!(promise, |device| { .. })`: the body runs as `promise::on_the_emulator`, in several orders of the threads,
/// and as `promise::on_the_gpu`, which is ignored unless it is asked for.
macro_rules! kernel_test {
    ($promise:ident, |$device:ident| $body:block) => {
        mod $promise {
            #[allow(unused_imports)]
            use super::*;

            fn check($device: &crate::device_under_test::DeviceUnderTest) $body

            #[test]
            fn on_the_emulator() {
                crate::device_under_test::DeviceUnderTest::on_the_emulator(check);
            }

            #[cfg(feature = "cuda")]
            #[test]
            #[ignore = "needs a GPU"]
            fn on_the_gpu() {
                crate::device_under_test::DeviceUnderTest::on_the_gpu(check);
            }
        }
    };
}
pub(crate) use kernel_test;

/// Asserts that a kernel is at most twice as far from the exact result as the same mathematics in low precision.
///
/// # Panics
/// If it is not, or if low precision is so far off that the comparison proves nothing.
#[track_caller]
pub fn assert_kernel_close(name: &str, got: &[f32], exact: &[f64], low_precision: &[f32]) {
    assert_eq!(got.len(), exact.len(), "{name}: length");
    assert_eq!(low_precision.len(), exact.len(), "{name}: length");
    let worst = |values: &[f32]| {
        let errors = values
            .iter()
            .zip(exact)
            .map(|(&v, e)| (f64::from(v) - e).abs());
        errors.fold(0.0, |a: f64, b| if b > a || b.is_nan() { b } else { a })
    };
    let rms = (exact.iter().map(|e| e * e).sum::<f64>() / exact.len() as f64).sqrt();
    let (error, allowed) = (worst(got), 2.0 * worst(low_precision));
    assert!(
        allowed <= 0.25 * rms,
        "{name}: a bound of {allowed:e} for values around {rms:e} proves nothing"
    );
    assert!(
        error <= allowed,
        "{name}: off by {error:e}, twice the error of low precision is {allowed:e}"
    );
}
