//! Runs the CUDA kernels of `cuda/` on the CPU: the same source, one fiber for each CUDA thread.
//!
//! See the README beside this crate for what that proves and what it does not.

pub mod planted_faults;

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::sync::LazyLock;

/// How the threads of a block take turns; a kernel must give the same in any order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Forward,
    Reverse,
    /// Shuffled anew each time round, by this seed.
    Random(u64),
}

/// A kernel and the blocks to run it with; the threads of a block are the kernel's own.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    pub kernel: &'a str,
    pub grid: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: usize,
    pub order: Order,
}

/// Why a launch did not run to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault(String);

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Fault {}

/// A kernel of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    pub name: &'static str,
    pub threads: u32,
    pub argument_count: usize,
}

unsafe extern "C" {
    fn qlora_emulator_kernel_count() -> usize;
    fn qlora_emulator_kernel(
        index: usize,
        threads: *mut c_uint,
        argument_count: *mut c_uint,
    ) -> *const c_char;
    fn qlora_emulator_launch(
        index: usize,
        grid: *const c_uint,
        shared_bytes: usize,
        order: c_int,
        seed: u64,
        arguments: *const *const c_void,
        fault: *mut c_char,
        fault_bytes: usize,
    ) -> bool;
}

/// Every kernel, in the order of the files.
pub fn kernels() -> &'static [Kernel] {
    static KERNELS: LazyLock<Vec<Kernel>> = LazyLock::new(|| {
        // SAFETY: takes nothing.
        let count = unsafe { qlora_emulator_kernel_count() };
        (0..count).map(read_kernel).collect()
    });
    &KERNELS
}

fn read_kernel(index: usize) -> Kernel {
    let (mut threads, mut argument_count) = (0, 0);
    // SAFETY: the index is below the count; the name lives as long as the process.
    let name = unsafe {
        CStr::from_ptr(qlora_emulator_kernel(
            index,
            &mut threads,
            &mut argument_count,
        ))
    };
    Kernel {
        name: name.to_str().expect("kernel names are ASCII"),
        threads,
        argument_count: argument_count as usize,
    }
}

/// Runs a kernel to its end.
///
/// # Errors
/// [`Fault`] for a kernel that is not there, another number of arguments than it has, a deadlock, a barrier or warp
/// operation that not all threads reach, a misaligned access by a matrix load or asynchronous copy, or a shared array
/// written past its end.
///
/// # Safety
/// `arguments` point to values of the kernel's argument types, and the pointers among those cover what it accesses.
pub unsafe fn launch(launch: &Launch<'_>, arguments: &[*const c_void]) -> Result<(), Fault> {
    static INDICES: LazyLock<HashMap<&'static str, usize>> = LazyLock::new(|| {
        let names = kernels().iter().map(|kernel| kernel.name);
        names.zip(0..).collect()
    });
    let Some(&index) = INDICES.get(launch.kernel) else {
        return Err(Fault(format!("there is no kernel {}", launch.kernel)));
    };
    let expected = kernels()[index].argument_count;
    if arguments.len() != expected {
        return Err(Fault(format!(
            "{} takes {expected} arguments, not {}",
            launch.kernel,
            arguments.len()
        )));
    }
    let (order, seed) = match launch.order {
        Order::Forward => (0, 0),
        Order::Reverse => (1, 0),
        Order::Random(seed) => (2, seed),
    };
    let mut fault = [0; 512];
    // SAFETY: the kernel is there and has so many arguments; the rest is the caller's promise.
    let is_done = unsafe {
        qlora_emulator_launch(
            index,
            launch.grid.as_ptr(),
            launch.shared_bytes,
            order,
            seed,
            arguments.as_ptr(),
            fault.as_mut_ptr(),
            fault.len(),
        )
    };
    if is_done {
        return Ok(());
    }
    // SAFETY: the emulator ends its report with a zero within the buffer.
    let report = unsafe { CStr::from_ptr(fault.as_ptr()) };
    Err(Fault(report.to_string_lossy().into_owned()))
}
