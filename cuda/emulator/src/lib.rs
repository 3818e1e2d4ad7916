//! Runs the CUDA kernels of `cuda/*.cu` on the CPU: one fiber per CUDA thread, barriers, warp operations, shared memory,
//! asynchronous copies and tensor-core instructions, in a chosen order of threads. What breaks a rule of the machine comes back
//! as a [`Fault`]. `README.md` says what this proves and what it does not.

mod fault;
mod kernels;

pub use fault::{Fault, FaultKind, ThreadCounts};
pub use kernels::{Kernel, Mutant, find, kernels, mutants};

use std::ffi::{CString, c_char, c_void};
use std::ops::Range;

/// Which thread runs when several could; blocks follow the same direction.
///
/// An asynchronous copy lands at its wait in `Forward`, at once in `Reverse`, and by chance at either in `Random`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Forward,
    Reverse,
    Random(u64),
}

/// A place in a kernel file where threads synchronize: a barrier, or a commit or wait of asynchronous copies.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Synchronization {
    /// The name of the file, without folders.
    pub file: String,
    pub line: u32,
}

/// How to run a kernel. The threads of a block are the kernel's own.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    pub kernel: &'a str,
    pub grid: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared_bytes: usize,
    pub order: Order,
    /// Follow every access to memory and report races, reads of unwritten shared memory, and global accesses outside these
    /// ranges of addresses. Several times slower; without effect in a build with sanitizers.
    pub watch: Option<&'a [Range<usize>]>,
    /// Do not synchronize at this place: tests show with it that its absence would be noticed.
    pub without: Option<&'a Synchronization>,
    /// Run the kernel as it is in this mutant of its file.
    pub mutant: Option<Mutant>,
}

/// The shared memory that a block may have on every GPU that we build for; compute capability 8.6, 8.9 and 12.0 have the least.
const SHARED_LIMIT: usize = 99 << 10;
/// What 9.0 has, for which the files `*_hopper.cu` alone are.
const SHARED_LIMIT_OF_HOPPER: usize = 227 << 10;
/// What `cuLaunchKernel` takes on every supported GPU.
const LARGEST_GRID: [u32; 3] = [(1 << 31) - 1, (1 << 16) - 1, (1 << 16) - 1];

/// Runs a kernel to its end and returns the places where it synchronized.
///
/// Each of `arguments` points to the value of one argument, as `cuLaunchKernel` takes them.
///
/// # Errors
/// The [`Fault`] that ended the launch. What the kernel had written until then stays written.
///
/// # Safety
/// Each argument must point to a value of the type that the kernel declares, and pointers among them to memory that the kernel
/// may use as it does.
pub unsafe fn launch(
    launch: &Launch,
    arguments: &[*const c_void],
) -> Result<Vec<Synchronization>, Fault> {
    let refuse = |kind, message| Fault {
        kind,
        kernel: launch.kernel.to_owned(),
        block: [0; 3],
        thread: 0,
        threads: ThreadCounts::default(),
        message,
    };
    let kernel = find(launch.kernel).ok_or_else(|| {
        refuse(
            FaultKind::UnknownKernel,
            "no kernel has this name".to_owned(),
        )
    })?;
    let count = kernel.argument_bytes.len();
    if arguments.len() != count {
        return Err(refuse(
            FaultKind::ArgumentCount,
            format!("takes {count} arguments, got {}", arguments.len()),
        ));
    }

    if !launch
        .grid
        .iter()
        .zip(LARGEST_GRID)
        .all(|(&blocks, most)| (1..=most).contains(&blocks))
    {
        let message = format!(
            "the grid {:?} is not within 1 to {LARGEST_GRID:?}",
            launch.grid
        );
        return Err(refuse(FaultKind::Grid, message));
    }

    let mutant_body = launch
        .mutant
        .and_then(|mutant| kernels::body_in_mutant(mutant, kernel.name));
    let watched_body = mutant_body
        .or(kernel.watched_body)
        .filter(|_| launch.watch.is_some());
    let body = watched_body.or(mutant_body).unwrap_or(kernel.body);
    let memory: Vec<RawRange> = launch
        .watch
        .iter()
        .copied()
        .flatten()
        .map(|range| RawRange {
            begin: range.start,
            bytes: range.len(),
        })
        .collect();
    let removed_file = launch
        .without
        .map(|removed| CString::new(removed.file.as_str()).unwrap_or_default());
    let (order_kind, order_seed) = match launch.order {
        Order::Forward => (0, 0),
        Order::Reverse => (1, 0),
        Order::Random(seed) => (2, seed),
    };
    let raw = RawLaunch {
        body,
        arguments: arguments.as_ptr(),
        threads: kernel.threads,
        grid: launch.grid,
        shared_bytes: launch.shared_bytes,
        shared_limit: match kernel.file.ends_with("_hopper") {
            true => SHARED_LIMIT_OF_HOPPER,
            false => SHARED_LIMIT,
        },
        order_seed,
        order_kind,
        removed_line: launch.without.map_or(0, |removed| removed.line),
        removed_file: removed_file
            .as_ref()
            .map_or(std::ptr::null(), |file| file.as_ptr()),
        memory: memory.as_ptr(),
        memory_count: memory.len(),
        watched: watched_body.is_some(),
    };
    let mut fault = RawFault::default();
    let mut met: Vec<Synchronization> = Vec::new();
    // SAFETY: the structs are those of `host/`, and all that they point to outlives the call. The caller vouches for the arguments.
    let succeeded = unsafe {
        qlora_emulator_run(
            &raw,
            &mut fault,
            note_synchronization,
            (&raw mut met).cast(),
        )
    };
    if succeeded {
        Ok(met)
    } else {
        Err(fault.into_fault(launch.kernel))
    }
}

unsafe extern "C" {
    fn qlora_emulator_run(
        launch: *const RawLaunch,
        fault: *mut RawFault,
        visit: unsafe extern "C" fn(*mut c_void, RawSite),
        context: *mut c_void,
    ) -> bool;
}

/// The layout is that of `RawLaunch` in `host/rust_interface.cpp`.
#[repr(C)]
struct RawLaunch {
    body: kernels::Body,
    arguments: *const *const c_void,
    threads: u32,
    grid: [u32; 3],
    shared_bytes: usize,
    shared_limit: usize,
    order_seed: u64,
    order_kind: u32,
    removed_line: u32,
    removed_file: *const c_char,
    memory: *const RawRange,
    memory_count: usize,
    watched: bool,
}

/// The layout is that of `MemoryRange` in `host/machine.h`.
#[repr(C)]
struct RawRange {
    begin: usize,
    bytes: usize,
}

/// The layout is that of `Site` in `host/fault.h`.
#[repr(C)]
struct RawSite {
    file: *const c_char,
    line: u32,
}

unsafe extern "C" fn note_synchronization(context: *mut c_void, site: RawSite) {
    // SAFETY: `launch` passes its list as the context, and the file is a string literal of the kernel.
    let (met, path) = unsafe {
        (
            &mut *context.cast::<Vec<Synchronization>>(),
            std::ffi::CStr::from_ptr(site.file),
        )
    };
    let path = path.to_string_lossy();
    let file = path.rsplit('/').next().unwrap_or_default().to_owned();
    met.push(Synchronization {
        file,
        line: site.line,
    });
}

/// The layout is that of `Fault` in `host/fault.h`.
#[repr(C)]
struct RawFault {
    kind: u32,
    block: [u32; 3],
    thread: u32,
    ready: u32,
    in_warp_operation: u32,
    at_barrier: u32,
    exited: u32,
    message: [u8; 512],
}

impl Default for RawFault {
    fn default() -> Self {
        Self {
            kind: 0,
            block: [0; 3],
            thread: 0,
            ready: 0,
            in_warp_operation: 0,
            at_barrier: 0,
            exited: 0,
            message: [0; 512],
        }
    }
}

impl RawFault {
    fn into_fault(self, kernel: &str) -> Fault {
        let message = self
            .message
            .split(|&byte| byte == 0)
            .next()
            .unwrap_or_default();
        Fault {
            kind: FaultKind::from_number(self.kind)
                .expect("host/fault.h and src/fault.rs number the faults alike"),
            kernel: kernel.to_owned(),
            block: self.block,
            thread: self.thread,
            threads: ThreadCounts {
                ready: self.ready,
                in_warp_operation: self.in_warp_operation,
                at_barrier: self.at_barrier,
                exited: self.exited,
            },
            message: String::from_utf8_lossy(message).into_owned(),
        }
    }
}
