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

impl Entry {
    fn name(&'static self) -> &'static str {
        // SAFETY: the C++ side points to a string literal.
        let name = unsafe { CStr::from_ptr(self.name) };
        name.to_str()
            .expect("C++ names of this repository are ASCII")
    }

    fn argument_bytes(&'static self) -> &'static [u8] {
        // SAFETY: the C++ side points to an array of at least this many bytes.
        unsafe { slice::from_raw_parts(self.argument_bytes, self.argument_count as usize) }
    }
}

/// Runs one thread of a kernel.
pub(crate) type Body = unsafe extern "C" fn(*const c_void);

/// The kernels of one file, compiled twice in the same order.
struct File {
    stem: &'static str,
    entries: &'static [Entry],
    watched: Option<&'static [Entry]>,
}

/// The kernels of a file with a fault planted in it, watched only.
struct MutantFile {
    name: &'static str,
    file: &'static str,
    entries: &'static [Entry],
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

/// A kernel file with a fault planted in it (`build/mutants.rs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mutant {
    pub name: &'static str,
    /// The kernel file, without `.cu`.
    pub file: &'static str,
}

/// All mutants; none in a build with sanitizers.
pub fn mutants() -> impl Iterator<Item = Mutant> {
    MUTANTS.iter().map(|mutant| Mutant {
        name: mutant.name,
        file: mutant.file,
    })
}

/// The mutant's version of a kernel, if the fault is planted in its file.
pub(crate) fn body_in_mutant(mutant: Mutant, kernel: &str) -> Option<Body> {
    let is_this = |file: &&MutantFile| file.name == mutant.name && file.file == mutant.file;
    let entries = MUTANTS.iter().find(is_this)?.entries;
    entries
        .iter()
        .find(|entry| entry.name() == kernel)
        .map(|entry| entry.body)
}

fn kernels_of(file: &'static File) -> impl Iterator<Item = Kernel> {
    file.entries
        .iter()
        .enumerate()
        .map(|(index, entry)| Kernel {
            file: file.stem,
            name: entry.name(),
            threads: entry.threads,
            argument_bytes: entry.argument_bytes(),
            body: entry.body,
            watched_body: file.watched.map(|watched| watched[index].body),
        })
}
