//! The table of kernels, which `build.rs` makes of what the kernel files declare.

use std::ffi::{CStr, c_char, c_void};
use std::slice;

/// The layout is that of `Entry` in `host/kernel_table.h`.
#[repr(C)]
pub(crate) struct Entry {
    name: *const c_char,
    threads: u32,
    argument_count: u32,
    argument_bytes: *const u8,
    body: Body,
}

// SAFETY: the tables are constants of the C++ side.
unsafe impl Sync for Entry {}

/// Runs one thread of a kernel.
pub(crate) type Body = unsafe extern "C" fn(*const c_void);

/// The kernels of one file, compiled twice in the same order.
struct File {
    stem: &'static str,
    entries: &'static [Entry],
    watched: Option<&'static [Entry]>,
}

include!(concat!(env!("OUT_DIR"), "/tables.rs"));

/// A kernel as its file declares it.
#[derive(Clone, Copy)]
pub struct Kernel {
    /// The file that declares it, without `.cu`.
    pub file: &'static str,
    pub name: &'static str,
    /// Threads of a block.
    pub threads: u32,
    /// The size of each argument.
    pub argument_bytes: &'static [u8],
    pub(crate) body: Body,
    pub(crate) watched_body: Option<Body>,
}

/// All kernels of `cuda/*.cu`.
pub fn kernels() -> impl Iterator<Item = Kernel> {
    KERNELS.iter().flat_map(kernels_of)
}

/// The kernel of that name; the kernels of this crate's own tests are found too.
pub fn find(name: &str) -> Option<Kernel> {
    kernels()
        .chain(SELF_TEST_KERNELS.iter().flat_map(kernels_of))
        .find(|kernel| kernel.name == name)
}

fn kernels_of(file: &'static File) -> impl Iterator<Item = Kernel> {
    file.entries.iter().enumerate().map(|(index, entry)| {
        // SAFETY: the C++ side points to a string literal and to an array of `argument_count` bytes.
        let (name, argument_bytes) = unsafe {
            (
                CStr::from_ptr(entry.name),
                slice::from_raw_parts(entry.argument_bytes, entry.argument_count as usize),
            )
        };
        Kernel {
            file: file.stem,
            name: name
                .to_str()
                .expect("C++ names of this repository are ASCII"),
            threads: entry.threads,
            argument_bytes,
            body: entry.body,
            watched_body: file.watched.map(|watched| watched[index].body),
        }
    })
}
