//! What a kernel test runs on, and how it judges: buffers with guards, launches, the error bound.
//!
//! ```text
//! kernel_test!(adds_the_branch, |device| {
//!     let x = device.upload(&values);
//!     let branch = device.upload(&more);
//!     device.launch("residual_forward_bf16", [1, 1, 1], 0, &[Arg::Buffer(&x), Arg::Buffer(&branch), Arg::U64(n), Arg::Buffer(&branch)]);
//!     let got: Vec<bf16> = device.download(&branch);
//!     assert_kernel_close("branch", &got, &exact, &low_precision);
//! });
//! ```
//!
//! makes `adds_the_branch::on_the_emulator`, which runs the body in several orders of the threads and watched for races, and
//! expects the same bits of every download each time.

use std::cell::RefCell;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

use bytemuck::Pod;
use qlora_emulator::{Fault, Launch, Mutant, Order, Synchronization};

/// Bytes before and after each buffer that no kernel may touch.
const GUARD_BYTES: usize = 256;
const GUARD: u8 = 0xa5;
/// Where a buffer begins, as `cudaMalloc` aligns.
const ALIGNMENT: usize = 256;

/// An argument of a kernel, in the type that the kernel declares.
#[derive(Clone, Copy)]
pub enum Arg<'a> {
    Buffer(&'a Buffer),
    Null,
    U32(u32),
    U64(u64),
    F32(f32),
}

/// Memory of the device. It is freed when dropped.
pub struct Buffer {
    memory: Box<dyn Memory>,
    bytes: usize,
}

impl Buffer {
    fn address(&self) -> u64 {
        self.memory.address() + GUARD_BYTES as u64
    }
}

/// An allocation on a device, guards included.
pub trait Memory {
    /// As a kernel takes it.
    fn address(&self) -> u64;
    fn read(&self, range: Range<usize>) -> Vec<u8>;
}

/// A machine that can run kernels.
pub trait Device {
    /// A copy of `contents`, aligned to [`ALIGNMENT`].
    fn allocate(&self, contents: &[u8]) -> Box<dyn Memory>;

    /// Runs a kernel to its end; `arguments` are the values, 4 or 8 bytes each, and `buffers` the ranges of addresses they refer to.
    fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        shared_bytes: usize,
        arguments: &[Vec<u8>],
        buffers: &[Range<usize>],
    ) -> Result<(), String>;

    /// Whether it has the kernels of `cuda/attention_hopper.cu`.
    fn has_warpgroup_products(&self) -> bool {
        true
    }
}

/// What the body of a [`kernel_test!`] is given.
pub struct DeviceUnderTest {
    device: Box<dyn Device>,
    downloads: RefCell<Vec<u64>>,
}

impl DeviceUnderTest {
    pub fn new(device: impl Device + 'static) -> Self {
        Self {
            device: Box::new(device),
            downloads: RefCell::default(),
        }
    }

    pub fn has_warpgroup_products(&self) -> bool {
        self.device.has_warpgroup_products()
    }

    pub fn upload<T: Pod>(&self, values: &[T]) -> Buffer {
        self.allocate(bytemuck::cast_slice(values))
    }

    /// Memory for `len` values that are all bits one: NaN, or the largest integer.
    pub fn poisoned<T: Pod>(&self, len: usize) -> Buffer {
        self.allocate(&vec![0xff; len * size_of::<T>()])
    }

    fn allocate(&self, payload: &[u8]) -> Buffer {
        let mut contents = vec![GUARD; GUARD_BYTES];
        contents.extend_from_slice(payload);
        contents.resize(contents.len() + GUARD_BYTES, GUARD);
        Buffer {
            memory: self.device.allocate(&contents),
            bytes: payload.len(),
        }
    }

    /// The buffer's values. Panics if its guards were touched.
    pub fn download<T: Pod>(&self, buffer: &Buffer) -> Vec<T> {
        self.check_guards(buffer)
            .unwrap_or_else(|damage| panic!("{damage}"));
        let bytes = buffer.memory.read(GUARD_BYTES..GUARD_BYTES + buffer.bytes);
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        self.downloads.borrow_mut().push(hasher.finish());
        bytes
            .chunks_exact(size_of::<T>())
            .map(bytemuck::pod_read_unaligned)
            .collect()
    }

    /// Runs a kernel and waits for it. Panics if it faults.
    pub fn launch(&self, kernel: &str, grid: [u32; 3], shared_bytes: usize, args: &[Arg]) {
        self.try_launch(kernel, grid, shared_bytes, args)
            .unwrap_or_else(|fault| panic!("{fault}"));
    }

    /// Runs a kernel, and checks the guards of its buffers.
    pub fn try_launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        shared_bytes: usize,
        args: &[Arg],
    ) -> Result<(), String> {
        let values: Vec<Vec<u8>> = args.iter().map(|arg| arg.bytes()).collect();
        let buffers: Vec<&Buffer> = args
            .iter()
            .filter_map(|arg| {
                if let Arg::Buffer(buffer) = arg {
                    Some(*buffer)
                } else {
                    None
                }
            })
            .collect();
        let ranges: Vec<Range<usize>> = buffers
            .iter()
            .map(|buffer| buffer.address() as usize..buffer.address() as usize + buffer.bytes)
            .collect();
        self.device
            .launch(kernel, grid, shared_bytes, &values, &ranges)?;
        buffers.iter().try_for_each(|buffer| {
            self.check_guards(buffer)
                .map_err(|damage| format!("{kernel}: {damage}"))
        })
    }

    fn check_guards(&self, buffer: &Buffer) -> Result<(), String> {
        let end = GUARD_BYTES + buffer.bytes;
        for (side, guard) in [
            ("before", 0..GUARD_BYTES),
            ("after", end..end + GUARD_BYTES),
        ] {
            if let Some(at) = buffer
                .memory
                .read(guard)
                .iter()
                .position(|&byte| byte != GUARD)
            {
                let distance = if side == "after" {
                    at + 1
                } else {
                    GUARD_BYTES - at
                };
                return Err(format!(
                    "wrote {distance} bytes {side} a buffer of {} bytes",
                    buffer.bytes
                ));
            }
        }
        Ok(())
    }

    /// A digest of each download, in order.
    fn into_downloads(self) -> Vec<u64> {
        self.downloads.into_inner()
    }
}

impl Arg<'_> {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Arg::Buffer(buffer) => buffer.address().to_ne_bytes().to_vec(),
            Arg::Null => 0u64.to_ne_bytes().to_vec(),
            Arg::U32(value) => value.to_ne_bytes().to_vec(),
            Arg::U64(value) => value.to_ne_bytes().to_vec(),
            Arg::F32(value) => value.to_ne_bytes().to_vec(),
        }
    }
}

/// The CPU as a CUDA device.
#[derive(Clone, Debug)]
pub struct Emulator {
    pub order: Order,
    /// Report races and accesses outside the arguments' buffers.
    pub watch: bool,
    /// The synchronization to leave out.
    pub without: Option<Synchronization>,
    /// The fault that is planted in the kernels.
    pub mutant: Option<Mutant>,
}

impl Emulator {
    /// Every way in which a kernel has to give the same bits.
    pub fn all() -> [Emulator; 5] {
        let plain = |order| Emulator {
            order,
            watch: false,
            without: None,
            mutant: None,
        };
        [
            plain(Order::Forward),
            plain(Order::Reverse),
            plain(Order::Random(1)),
            plain(Order::Random(2)),
            Emulator {
                watch: true,
                ..plain(Order::Random(3))
            },
        ]
    }

    /// Like [`Device::launch`], with the fault itself and, in success, where the kernel synchronized.
    pub fn run(
        &self,
        kernel: &str,
        grid: [u32; 3],
        shared_bytes: usize,
        arguments: &[Vec<u8>],
        buffers: &[Range<usize>],
    ) -> Result<Vec<Synchronization>, Fault> {
        if let Some(found) = qlora_emulator::find(kernel) {
            let given: Vec<u8> = arguments.iter().map(|value| value.len() as u8).collect();
            assert_eq!(
                given, found.argument_bytes,
                "{kernel}: the sizes of the arguments (left: given) are not those declared"
            );
        }
        let launch = Launch {
            kernel,
            grid,
            shared_bytes,
            order: self.order,
            watch: self.watch.then_some(buffers),
            without: self.without.as_ref(),
            mutant: self.mutant,
        };
        let pointers: Vec<_> = arguments
            .iter()
            .map(|value| value.as_ptr().cast())
            .collect();
        // SAFETY: the sizes are those that the kernel declares; a kernel that misuses its pointers is what the tests look for.
        unsafe { qlora_emulator::launch(&launch, &pointers) }
    }
}

impl Device for Emulator {
    fn allocate(&self, contents: &[u8]) -> Box<dyn Memory> {
        Box::new(HostMemory::new(contents))
    }

    fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        shared_bytes: usize,
        arguments: &[Vec<u8>],
        buffers: &[Range<usize>],
    ) -> Result<(), String> {
        self.run(kernel, grid, shared_bytes, arguments, buffers)
            .map(|_| ())
            .map_err(|fault| fault.to_string())
    }
}

/// Aligned memory that kernels write behind Rust's back: touched only through its pointer.
struct HostMemory {
    start: *mut u8,
    layout: std::alloc::Layout,
}

impl HostMemory {
    fn new(contents: &[u8]) -> Self {
        let layout = std::alloc::Layout::from_size_align(contents.len(), ALIGNMENT)
            .expect("a test's buffer is small");
        // SAFETY: the layout is not empty, since there are always guards; the copy fills it.
        let start = unsafe {
            let start = std::alloc::alloc(layout);
            assert!(!start.is_null(), "out of memory");
            start.copy_from_nonoverlapping(contents.as_ptr(), contents.len());
            start
        };
        Self { start, layout }
    }
}

impl Memory for HostMemory {
    fn address(&self) -> u64 {
        self.start as u64
    }

    fn read(&self, range: Range<usize>) -> Vec<u8> {
        assert!(range.end <= self.layout.size());
        // SAFETY: the range is inside the allocation, which was filled when it was made; no kernel is running.
        unsafe { std::slice::from_raw_parts(self.start.add(range.start), range.len()).to_vec() }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { std::alloc::dealloc(self.start, self.layout) }
    }
}

/// Runs `body` on the emulator in every way; every download must have the same bits each time.
pub fn on_the_emulator(body: impl Fn(&DeviceUnderTest)) {
    let mut first: Option<Vec<u64>> = None;
    for emulator in Emulator::all() {
        let device = DeviceUnderTest::new(emulator.clone());
        body(&device);
        let downloads = device.into_downloads();
        let expected = first.get_or_insert_with(|| downloads.clone());
        let differing = downloads
            .iter()
            .zip(expected.iter())
            .position(|(got, expected)| got != expected);
        assert_eq!(
            differing, None,
            "download number {differing:?} depends on the order of the threads: {emulator:?}"
        );
    }
}

/// Declares a test of a kernel; see the module.
#[macro_export]
macro_rules! kernel_test {
    ($name:ident, |$device:ident| $body:block) => {
        pub mod $name {
            #[allow(unused_imports)]
            use super::*;

            pub fn body($device: &$crate::device_under_test::DeviceUnderTest) $body

            #[test]
            fn on_the_emulator() {
                $crate::device_under_test::on_the_emulator(body);
            }

            #[cfg(feature = "cuda")]
            #[test]
            #[ignore = "needs a GPU"]
            fn on_the_gpu() {
                $crate::gpu::on_the_gpu(body);
            }
        }
    };
}

/// Holds a kernel's result against `exact`, the same mathematics in f64.
///
/// The worst error may be twice that of `low_precision`, the same mathematics in the kernel's own formats: f32 within, rounded to
/// bf16 where the kernel stores bf16. Panics also if that bound is no bound: above a quarter of the RMS of `exact`.
#[track_caller]
pub fn assert_kernel_close<T, L>(name: &str, got: &[T], exact: &[f64], low_precision: &[L])
where
    T: Copy + Into<f64>,
    L: Copy + Into<f64>,
{
    assert_eq!(got.len(), exact.len(), "{name}: the number of values");
    assert_eq!(
        low_precision.len(),
        exact.len(),
        "{name}: the number of values in low precision"
    );
    let bound = 2.0 * worst_error(low_precision, exact).1;
    let rms = (exact.iter().map(|value| value * value).sum::<f64>() / exact.len() as f64).sqrt();
    assert!(
        bound <= rms / 4.0,
        "{name}: an error of {bound:e} would be allowed where the values have an RMS of {rms:e}"
    );
    let (index, error) = worst_error(got, exact);
    assert!(
        error <= bound,
        "{name}[{index}] = {:e}, exactly {:e}: the error {error:e} is above {bound:e}, twice that of low precision",
        got[index].into(),
        exact[index],
    );
}

/// The index and size of the largest error; a NaN is an infinite error.
fn worst_error<T: Copy + Into<f64>>(values: &[T], exact: &[f64]) -> (usize, f64) {
    let mut worst = (0, 0.0);
    for (index, (&value, &exact)) in values.iter().zip(exact).enumerate() {
        let value: f64 = value.into();
        let error = (value - exact).abs();
        let error = if error.is_nan() { f64::INFINITY } else { error };
        if error > worst.1 {
            worst = (index, error);
        }
    }
    worst
}
