//! Launching the crate's own test kernels on Rust slices.

use std::ffi::c_void;
use std::ops::Range;

use qlora_emulator::{Fault, FaultKind, Launch, Order, Synchronization};

pub const ORDERS: [Order; 4] = [
    Order::Forward,
    Order::Reverse,
    Order::Random(1),
    Order::Random(2),
];

/// Arguments of a kernel: the values, and the memory that the pointers among them refer to.
#[derive(Default)]
pub struct Arguments {
    values: Vec<u64>,
    memory: Vec<Range<usize>>,
}

impl Arguments {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn buffer<T>(mut self, values: &mut [T]) -> Self {
        let range = values.as_mut_ptr_range();
        self.memory.push(range.start as usize..range.end as usize);
        self.values.push(range.start as u64);
        self
    }

    /// An integer of 4 or 8 bytes.
    pub fn number(mut self, value: u64) -> Self {
        self.values.push(value);
        self
    }
}

/// A launch of `blocks` blocks without dynamic shared memory.
pub fn launch_of(kernel: &str, blocks: u32, order: Order) -> Launch<'_> {
    Launch {
        kernel,
        grid: [blocks, 1, 1],
        shared_bytes: 0,
        order,
        watch: None,
        without: None,
        mutant: None,
    }
}

pub fn run(launch: &Launch, arguments: &Arguments) -> Result<Vec<Synchronization>, Fault> {
    let pointers: Vec<*const c_void> = arguments
        .values
        .iter()
        .map(|value| (value as *const u64).cast())
        .collect();
    // SAFETY: a little-endian u64 serves for 4 bytes too; the tests pass what their kernels declare, and the buffers are alive.
    unsafe { qlora_emulator::launch(launch, &pointers) }
}

/// Runs with every access followed.
pub fn run_watched(launch: &Launch, arguments: &Arguments) -> Result<Vec<Synchronization>, Fault> {
    run(
        &Launch {
            watch: Some(&arguments.memory),
            ..launch.clone()
        },
        arguments,
    )
}

/// Whether two threads meet as a race or before the other has written is a matter of their order.
#[track_caller]
pub fn assert_is_disorder(fault: &Fault) {
    assert!(
        matches!(fault.kind, FaultKind::Race | FaultKind::Uninitialized),
        "{fault}"
    );
}
