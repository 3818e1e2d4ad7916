//! The host emulator as the runtime of bf16 tensors on the CPU: kernels run as they are written, products on the host.

#![allow(dead_code)]

pub mod copies;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use half::bf16;
use qlora::device::{
    self, Argument, DeviceMemory, Gemm, Launch, Marker, Matrix, PinnedMemory, Placement, Runtime,
};
use qlora::{Error, Result};
use qlora_emulator::Order;

thread_local! {
    static ORDER: Cell<Order> = const { Cell::new(Order::Forward) };
    static ONE_QUEUE: Cell<bool> = const { Cell::new(false) };
    static REQUESTS: RefCell<Requests> = const { RefCell::new(Requests::new()) };
}

/// How often the runtime was asked for what: kernels by their names, everything else by what it is.
pub type Requests = BTreeMap<String, usize>;

/// What this thread asks the runtime for while it does `work`.
pub fn requests_of<R>(work: impl FnOnce() -> R) -> (R, Requests) {
    REQUESTS.take();
    let result = work();
    (result, REQUESTS.take())
}

fn note(request: &str) {
    REQUESTS.with_borrow_mut(|requests| *requests.entry(request.to_string()).or_default() += 1);
}

/// The emulator, whose CUDA threads take turns in the order that [`use_order`] set for the calling thread.
#[derive(Debug)]
pub struct EmulatedRuntime;

/// How many want copies to the device to take longer than what is computed meanwhile.
static SLOW_COPIES: AtomicUsize = AtomicUsize::new(0);

/// Does `work` while copies to the device are slow, those of other threads too.
pub fn with_slow_copies<R>(work: impl FnOnce() -> R) -> R {
    SLOW_COPIES.fetch_add(1, Ordering::Relaxed);
    let result = work();
    SLOW_COPIES.fetch_sub(1, Ordering::Relaxed);
    result
}

/// Launches by this thread let CUDA threads take turns in `order` from now on.
pub fn use_order(order: Order) {
    ORDER.set(order);
}

/// Launches aside by this thread run where they are queued while it does `work`.
pub fn on_one_queue<R>(work: impl FnOnce() -> R) -> R {
    ONE_QUEUE.set(true);
    let result = work();
    ONE_QUEUE.set(false);
    result
}

/// Every order that tests go through.
pub const ORDERS: [Order; 4] = [
    Order::Forward,
    Order::Reverse,
    Order::Random(1),
    Order::Random(2),
];

/// bf16 on the CPU, through the emulator.
pub fn placement() -> Placement {
    device::install(&Device::Cpu, Arc::new(EmulatedRuntime));
    Placement::kernels(Device::Cpu)
}

impl Runtime for EmulatedRuntime {
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        note(launch.kernel);
        let mut uses = copies::addresses(launch.arguments);
        uses.extend(written(launch));
        copies::note_launch(&uses)?;
        // SAFETY: as the caller promises.
        unsafe { run(launch) }
    }

    unsafe fn launch_aside(&self, launch: &Launch<'_>, after: &Marker) -> Result<Marker> {
        if ONE_QUEUE.get() {
            // SAFETY: as the caller promises.
            unsafe { self.launch(launch)? };
            return self.mark();
        }
        note(&format!("{} aside", launch.kernel));
        let written = written(launch);
        let written = written.unwrap_or_else(|| panic!("what does {} write?", launch.kernel));
        let uses = copies::addresses(launch.arguments).into_iter();
        let uses = uses.map(|address| address.start).collect();
        let (kernel, arguments) = (launch.kernel.to_string(), launch.arguments.to_vec());
        let Launch {
            grid,
            threads,
            shared_bytes,
            ..
        } = *launch;
        let work = move || {
            let launch = Launch {
                kernel: &kernel,
                grid,
                threads,
                shared_bytes,
                arguments: &arguments,
            };
            // SAFETY: as the caller promises, until this was waited for.
            unsafe { run(&launch) }
        };
        copies::queue_aside((uses, written), after, Box::new(work))
    }

    unsafe fn gemm(&self, gemm: &Gemm) -> Result<()> {
        note("product");
        let Gemm { m, n, k, .. } = *gemm;
        let c_row_stride = gemm.c_row_stride;
        let c_bytes = (m.saturating_sub(1) * c_row_stride + n) * gemm.c_dtype.size_in_bytes();
        copies::note_launch(&[
            covered(&gemm.a, m, k),
            covered(&gemm.b, k, n),
            gemm.c_address..gemm.c_address + c_bytes as u64,
        ])?;
        // SAFETY: the caller promises that the addresses cover the matrices.
        let (a, b) = unsafe { (rows(&gemm.a, m, k), columns(&gemm.b, k, n)) };
        for (i, a) in a.chunks_exact(k.max(1)).enumerate() {
            for (j, b) in b.chunks_exact(k.max(1)).enumerate() {
                let sum: f32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                let at = i * gemm.c_row_stride + j;
                // SAFETY: as above.
                unsafe { add(gemm, at, sum) };
            }
        }
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        note("synchronization");
        Ok(())
    }

    fn pinned(&self, bytes: usize) -> Result<Box<dyn PinnedMemory>> {
        note("pinned memory");
        Ok(Box::new(HostMemory(vec![0; bytes])))
    }

    fn mark(&self) -> Result<Marker> {
        Ok(copies::mark())
    }

    unsafe fn copy(&self, from: &[u8], to: u64, after: Option<&Marker>) -> Result<Marker> {
        note("copy to the device");
        if SLOW_COPIES.load(Ordering::Relaxed) > 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        copies::queue(from, to, after)
    }

    unsafe fn copy_back(&self, from: u64, to: &mut [u8], after: Option<&Marker>) -> Result<Marker> {
        note("copy to the host");
        copies::queue_back(from, to, after)
    }

    fn wait(&self, marker: &Marker) -> Result<()> {
        note(match copies::is_aside(marker) {
            true => "wait for a launch aside",
            false => "wait for a copy",
        });
        copies::reach(marker)
    }

    fn wait_on_host(&self, marker: &Marker) -> Result<()> {
        note("wait of the host");
        copies::reach(marker)
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let started = Instant::now();
        work()?;
        Ok(started.elapsed().as_secs_f64())
    }

    fn multiprocessors(&self) -> u32 {
        1
    }

    fn has_warpgroup_products(&self) -> bool {
        true
    }

    fn memory(&self) -> Result<DeviceMemory> {
        Ok(DeviceMemory {
            free_bytes: 1 << 40,
            total_bytes: 1 << 40,
            used_bytes: 0,
            peak_bytes: 0,
            peak_reserved_bytes: 0,
        })
    }

    fn withhold(&self, _: u64) -> Result<Box<dyn Any + Send>> {
        Ok(Box::new(()))
    }

    fn reset_peak_memory(&self) -> Result<()> {
        Ok(())
    }

    fn trim(&self) -> Result<()> {
        Ok(())
    }

    fn describe(&self) -> String {
        format!("the emulator, {:?}", ORDER.get())
    }
}

/// Runs a kernel now.
///
/// # Safety
/// As for [`Runtime::launch`].
unsafe fn run(launch: &Launch<'_>) -> Result<()> {
    let known = qlora_emulator::find(launch.kernel);
    let threads = known.map(|kernel| kernel.threads);
    assert_eq!(threads, Some(launch.threads), "{}", launch.kernel);
    let arguments: Vec<*const c_void> = launch
        .arguments
        .iter()
        .map(|argument| match argument {
            Argument::Address(value) => std::ptr::from_ref(value).cast(),
            Argument::U32(value) => std::ptr::from_ref(value).cast(),
            Argument::U64(value) => std::ptr::from_ref(value).cast(),
            Argument::F32(value) => std::ptr::from_ref(value).cast(),
        })
        .collect();
    let [x, y] = launch.grid;
    let emulated = qlora_emulator::Launch {
        kernel: launch.kernel,
        grid: [x, y, 1],
        shared_bytes: launch.shared_bytes as usize,
        order: ORDER.get(),
        watch: None,
        without: None,
        mutant: None,
    };
    // SAFETY: as the caller promises.
    let outcome = unsafe { qlora_emulator::launch(&emulated, &arguments) };
    let outcome = outcome.map_err(|fault| Error::Train(fault.to_string()));
    outcome.map(|_| ())
}

/// What a kernel writes, of those that are launched aside.
fn written(launch: &Launch<'_>) -> Option<Range<u64>> {
    match (launch.kernel, launch.arguments) {
        ("nf4_dequantize_bf16", [.., Argument::U64(elements), Argument::Address(out)]) => {
            Some(*out..out + elements * size_of::<bf16>() as u64)
        }
        _ => None,
    }
}

struct HostMemory(Vec<u8>);

impl PinnedMemory for HostMemory {
    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// The memory of a matrix whose operand has so many rows and columns.
fn covered(matrix: &Matrix, rows: usize, cols: usize) -> Range<u64> {
    let (rows, cols) = match matrix.is_transposed {
        true => (cols, rows),
        false => (rows, cols),
    };
    let elements = rows.saturating_sub(1) * matrix.row_stride + cols;
    matrix.address..matrix.address + (elements * size_of::<bf16>()) as u64
}

/// Element `(i, j)` of the operand.
///
/// # Safety
/// The address covers it.
unsafe fn element(matrix: &Matrix, i: usize, j: usize) -> f32 {
    let (row, col) = if matrix.is_transposed { (j, i) } else { (i, j) };
    let data = matrix.address as *const bf16;
    // SAFETY: as the caller promises.
    unsafe { data.add(row * matrix.row_stride + col).read() }.to_f32()
}

/// The operand row by row.
unsafe fn rows(matrix: &Matrix, rows: usize, cols: usize) -> Vec<f32> {
    let places = (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j)));
    // SAFETY: as the caller of `gemm` promises.
    places
        .map(|(i, j)| unsafe { element(matrix, i, j) })
        .collect()
}

/// The operand column by column.
unsafe fn columns(matrix: &Matrix, rows: usize, cols: usize) -> Vec<f32> {
    let places = (0..cols).flat_map(|j| (0..rows).map(move |i| (i, j)));
    // SAFETY: as the caller of `gemm` promises.
    places
        .map(|(i, j)| unsafe { element(matrix, i, j) })
        .collect()
}

unsafe fn add(gemm: &Gemm, at: usize, sum: f32) {
    let updated = |old: f32| match gemm.beta {
        0.0 => gemm.alpha * sum,
        beta => gemm.alpha * sum + beta * old,
    };
    // SAFETY: as the caller of `gemm` promises.
    unsafe {
        match gemm.c_dtype {
            DType::F32 => {
                let c = (gemm.c_address as *mut f32).add(at);
                c.write(updated(c.read()));
            }
            DType::BF16 => {
                let c = (gemm.c_address as *mut bf16).add(at);
                c.write(bf16::from_f32(updated(c.read().to_f32())));
            }
            other => panic!("a product into {other:?}"),
        }
    }
}

/// `placement_test!(promise, |placement| { .. })`: the body as `promise::on_the_emulator` and, ignored unless it is asked for, as
/// `promise::on_the_gpu`. With `in_every_order` before the promise, the emulator goes through [`ORDERS`]; with `also_on_the_cpu` there
/// is `promise::on_the_cpu` too, with the products of the CPU's own code in bf16.
#[allow(unused_macros)]
macro_rules! placement_test {
    (in_every_order $promise:ident, |$placement:ident| $body:block) => {
        placement_test!(&emulated::ORDERS, $promise, |$placement| $body, {});
    };
    (also_on_the_cpu $promise:ident, |$placement:ident| $body:block) => {
        placement_test!(&emulated::ORDERS[..1], $promise, |$placement| $body, {
            #[test]
            fn on_the_cpu() {
                body(&Placement {
                    compute_dtype: qlora::device::ComputeDtype::Bf16,
                    ..Placement::cpu()
                });
            }
        });
    };
    ($promise:ident, |$placement:ident| $body:block) => {
        placement_test!(&emulated::ORDERS[..1], $promise, |$placement| $body, {});
    };
    ($orders:expr, $promise:ident, |$placement:ident| $body:block, { $($other:item)* }) => {
        mod $promise {
            #[allow(unused_imports)]
            use super::*;

            fn body($placement: &Placement) $body

            $($other)*

            #[test]
            fn on_the_emulator() {
                for &order in $orders {
                    emulated::use_order(order);
                    body(&emulated::placement());
                }
            }

            #[cfg(feature = "cuda")]
            #[test]
            #[ignore = "needs a GPU"]
            fn on_the_gpu() {
                body(&Placement::open(qlora::device::DeviceKind::Cuda, None).unwrap());
            }
        }
    };
}
#[allow(unused_imports)]
pub(crate) use placement_test;
