//! Which file lies at an address: what a handler of SIGBUS asks when a mapped file became shorter than its mapping.
//!
//! A signal handler may neither lock nor allocate. So this is the one table of the library that is global: a list of slots
//! that is only ever added to, in which every field is an atomic.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicUsize, Ordering};

/// Longer paths lose their beginning.
const PATH_BYTES: usize = 512;

#[derive(Debug)]
struct Slot {
    is_taken: AtomicBool,
    start: AtomicUsize,
    /// 0 while the slot describes nothing.
    end: AtomicUsize,
    path: [AtomicU8; PATH_BYTES],
    path_bytes: AtomicUsize,
    next: AtomicPtr<Slot>,
}

static FIRST: AtomicPtr<Slot> = AtomicPtr::new(ptr::null_mut());

/// A mapping that is in the table until this is dropped.
#[derive(Debug)]
pub(super) struct MappedRange(&'static Slot);

impl MappedRange {
    /// Enters the mapping `bytes` of the file at `path`.
    pub(super) fn enter(bytes: &[u8], path: &Path) -> Self {
        let slot = slots().find(|slot| !slot.is_taken.swap(true, Ordering::Acquire));
        let slot = slot.unwrap_or_else(add_slot);
        let path = path.as_os_str().as_bytes();
        let tail = &path[path.len().saturating_sub(PATH_BYTES)..];
        for (place, byte) in slot.path.iter().zip(tail) {
            place.store(*byte, Ordering::Relaxed);
        }
        slot.path_bytes.store(tail.len(), Ordering::Relaxed);
        slot.start.store(bytes.as_ptr().addr(), Ordering::Relaxed);
        // Last, so that who sees the range sees its path.
        slot.end
            .store(bytes.as_ptr().addr() + bytes.len(), Ordering::Release);
        Self(slot)
    }
}

impl Drop for MappedRange {
    fn drop(&mut self) {
        self.0.end.store(0, Ordering::Release);
        self.0.is_taken.store(false, Ordering::Release);
    }
}

/// Writes the path of the file that is mapped at `address` into `path`, and gives its length; `None` if there is none.
///
/// Async-signal-safe.
pub fn mapped_path_at(address: usize, path: &mut [u8]) -> Option<usize> {
    // A mapping of a file covers its last page, of which the file may have only a part.
    const PAGE: usize = 4096;
    let covers = |slot: &&Slot| {
        let end = slot.end.load(Ordering::Acquire);
        end != 0
            && (slot.start.load(Ordering::Relaxed)..end.next_multiple_of(PAGE)).contains(&address)
    };
    let slot = slots().find(covers)?;
    let length = slot.path_bytes.load(Ordering::Relaxed).min(path.len());
    for (to, from) in path[..length].iter_mut().zip(&slot.path) {
        *to = from.load(Ordering::Relaxed);
    }
    Some(length)
}

fn slots() -> impl Iterator<Item = &'static Slot> {
    let at = |pointer: &AtomicPtr<Slot>| {
        // SAFETY: a pointer in the list is null or of a slot that was leaked for good.
        unsafe { pointer.load(Ordering::Acquire).as_ref() }
    };
    std::iter::successors(at(&FIRST), move |slot: &&'static Slot| at(&slot.next))
}

fn add_slot() -> &'static Slot {
    let slot: &'static Slot = Box::leak(Box::new(Slot {
        is_taken: AtomicBool::new(true),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        path: [const { AtomicU8::new(0) }; PATH_BYTES],
        path_bytes: AtomicUsize::new(0),
        next: AtomicPtr::new(ptr::null_mut()),
    }));
    let pointer = ptr::from_ref(slot).cast_mut();
    let mut first = FIRST.load(Ordering::Acquire);
    loop {
        slot.next.store(first, Ordering::Relaxed);
        match FIRST.compare_exchange_weak(first, pointer, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return slot,
            Err(other) => first = other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path_at(address: usize) -> Option<String> {
        let mut path = [0; PATH_BYTES];
        let length = mapped_path_at(address, &mut path)?;
        Some(String::from_utf8(path[..length].to_vec()).unwrap())
    }

    /// Addresses that no allocation of a test has: the table never follows them.
    fn bytes(address: usize, length: usize) -> &'static [u8] {
        // SAFETY: only the address and the length are looked at.
        unsafe { std::slice::from_raw_parts(ptr::without_provenance(address), length) }
    }

    #[test]
    fn an_address_is_told_by_its_file_while_it_is_mapped() {
        let one = MappedRange::enter(bytes(0x7000_0000_0000, 10_000), Path::new("/m/one"));
        let long = "/x".repeat(PATH_BYTES);
        let other = MappedRange::enter(bytes(0x7000_1000_0000, 1), Path::new(&long));
        assert_eq!(path_at(0x7000_0000_0000).unwrap(), "/m/one");
        assert_eq!(path_at(0x7000_0000_2fff).unwrap(), "/m/one");
        assert_eq!(path_at(0x7000_0000_3000), None);
        assert_eq!(path_at(0x6fff_ffff_ffff), None);
        assert_eq!(
            path_at(0x7000_1000_0000).unwrap(),
            long[long.len() - PATH_BYTES..]
        );
        drop(one);
        assert_eq!(path_at(0x7000_0000_0000), None);
        let again = MappedRange::enter(bytes(0x7000_2000_0000, 1), Path::new("again"));
        assert_eq!(path_at(0x7000_2000_0000).unwrap(), "again");
        drop((other, again));
    }
}
