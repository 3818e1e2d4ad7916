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
    pub fn launch(&self, kernel: &str, grid: [u32; 3], shared_bytes: usize, arguments: &[Arg<'_>]) {
        if let Err(fault) = self.try_launch(kernel, grid, shared_bytes, arguments) {
            panic!("{}: {fault}", self.runtime.describe());
        }
    }

    pub fn try_launch(
        &self,
        kernel: &str,
        [x, y, z]: [u32; 3],
        shared_bytes: usize,
        arguments: &[Arg<'_>],
    ) -> Result<()> {
        assert_eq!(z, 1, "grids have two dimensions");
        let arguments: Vec<_> = arguments.iter().map(Arg::resolve).collect();
        let launch = Launch {
            kernel,
            grid: [x, y],
            threads: threads_of(kernel),
            shared_bytes: shared_bytes as u32,
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
#[macro_export]
macro_rules! kernel_test {
    ($promise:ident, |$device:ident| $body:block) => {
        mod $promise {
            #[allow(unused_imports)]
            use super::*;

            fn body($device: &$crate::device_under_test::DeviceUnderTest) $body

            #[test]
            fn on_the_emulator() {
                $crate::device_under_test::DeviceUnderTest::on_the_emulator(body);
            }

            #[cfg(feature = "cuda")]
            #[test]
            #[ignore = "needs a GPU"]
            fn on_the_gpu() {
                $crate::device_under_test::DeviceUnderTest::on_the_gpu(body);
            }
        }
    };
}

/// Holds a kernel's result against `exact`, the same mathematics in f64.
///
/// The worst error may be twice that of `low_precision`, the same mathematics in the kernel's own formats: f32 within, rounded to
/// bf16 where the kernel stores bf16.
///
/// # Panics
/// If it is larger, and if the bound is none: above a quarter of the root mean square of `exact`.
#[track_caller]
pub fn assert_kernel_close<T, L>(name: &str, got: &[T], exact: &[f64], low_precision: &[L])
where
    T: Copy + Into<f64>,
    L: Copy + Into<f64>,
{
    assert_eq!(got.len(), exact.len(), "{name}: length");
    assert_eq!(low_precision.len(), exact.len(), "{name}: length");
    let (_, low_precision) = worst_error(low_precision, exact);
    let bound = 2.0 * low_precision;
    let rms = (exact.iter().map(|e| e * e).sum::<f64>() / exact.len() as f64).sqrt();
    assert!(
        bound <= 0.25 * rms,
        "{name}: a bound of {bound:e} for values around {rms:e} proves nothing"
    );
    let (index, error) = worst_error(got, exact);
    assert!(
        error <= bound,
        "{name}[{index}]: off by {error:e}, twice the error of low precision is {bound:e}"
    );
}

/// The index and size of the largest error; a NaN is an infinite one.
fn worst_error<T: Copy + Into<f64>>(values: &[T], exact: &[f64]) -> (usize, f64) {
    let errors = values.iter().zip(exact).map(|(&value, exact)| {
        let error = (value.into() - exact).abs();
        if error.is_nan() { f64::INFINITY } else { error }
    });
    let worst = |worst: (usize, f64), found: (usize, f64)| match found.1 > worst.1 {
        true => found,
        false => worst,
    };
    errors.enumerate().fold((0, 0.0), worst)
}
