//! What a kernel did wrong, and where.

use std::fmt;

/// The rule that a launch broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// No kernel has this name.
    UnknownKernel,
    /// The number of arguments is not that of the kernel.
    ArgumentCount,
    /// The grid has no blocks, or more than `cuLaunchKernel` takes.
    Grid,
    /// No thread can go on.
    Deadlock,
    /// Threads of one block wait at different `__syncthreads()`.
    DivergentBarrier,
    /// The lanes of one warp operation disagree about the operation or its mask, or one of them has exited.
    LaneMismatch,
    /// An address is not a multiple of what its access needs.
    Misaligned,
    /// Bytes beyond the end of a shared array were touched.
    SharedOverrun,
    /// The block wants more shared memory than every supported GPU has.
    SharedTooLarge,
    /// An address that is no memory of the launch; or a division by zero.
    InvalidAccess,
    /// Shared memory was read that the block has not written.
    Uninitialized,
    /// Two threads met at one address, at least one of them writing, and nothing orders them.
    Race,
    /// What C++ leaves undefined: a signed overflow, a shift too far, an index beyond its array.
    Undefined,
    /// A thread ended before its copies or products.
    UnderWay,
}

impl FaultKind {
    /// The numbers of `host/fault.h`.
    pub(crate) fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::Deadlock,
            2 => Self::DivergentBarrier,
            3 => Self::LaneMismatch,
            4 => Self::Misaligned,
            5 => Self::SharedOverrun,
            6 => Self::SharedTooLarge,
            7 => Self::InvalidAccess,
            8 => Self::Uninitialized,
            9 => Self::Race,
            10 => Self::Undefined,
            11 => Self::UnderWay,
            _ => return None,
        })
    }
}

/// How many threads of the block were in each state when it was abandoned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThreadCounts {
    pub ready: u32,
    pub in_warp_operation: u32,
    pub at_barrier: u32,
    pub exited: u32,
}

/// A launch that was abandoned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub kind: FaultKind,
    pub kernel: String,
    pub block: [u32; 3],
    /// The thread that was running.
    pub thread: u32,
    pub threads: ThreadCounts,
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.block;
        let ThreadCounts {
            ready,
            in_warp_operation,
            at_barrier,
            exited,
        } = self.threads;
        write!(
            f,
            "{}, block ({x}, {y}, {z}), thread {}: {} ({:?}; {ready} ready, {in_warp_operation} in a warp operation, \
             {at_barrier} at a barrier, {exited} exited)",
            self.kernel, self.thread, self.message, self.kind
        )
    }
}

impl std::error::Error for Fault {}
