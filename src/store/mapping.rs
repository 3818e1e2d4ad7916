//! A file in memory: mapped, read only, and known by its name to who asks what a SIGBUS comes from.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use memmap2::{Mmap, UncheckedAdvice};

use super::mapped_ranges::MappedRange;
use crate::{Error, Result};

/// A mapped file that is not empty.
#[derive(Debug)]
pub(super) struct Mapping {
    path: PathBuf,
    map: Arc<NamedMap>,
}

/// A mapping that is listed under its file's name as long as it is there.
#[derive(Debug)]
struct NamedMap {
    // Before the mapping, so that the range is taken off the list first.
    _range: MappedRange,
    map: Mmap,
}

struct SharedMap(Arc<NamedMap>);

impl AsRef<[u8]> for SharedMap {
    fn as_ref(&self) -> &[u8] {
        &self.0.map
    }
}

impl Mapping {
    /// Maps the file at `path`, which must not be changed meanwhile, and hands out the file as well.
    ///
    /// # Errors
    /// [`Error::Malformed`] if it is empty or no regular file.
    pub(super) fn open(path: &Path) -> Result<(Self, File)> {
        let file = File::open(path).map_err(Error::io(path))?;
        let metadata = file.metadata().map_err(Error::io(path))?;
        if !metadata.is_file() {
            return Err(Error::malformed(path, "is not a regular file"));
        }
        if metadata.len() == 0 {
            return Err(Error::malformed(
                path,
                "is empty, download or copy it again",
            ));
        }
        // SAFETY: the mapping is read-only; as for every reader of mapped weights, the file must not be changed meanwhile.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let map = Arc::new(NamedMap {
            _range: MappedRange::enter(&map, path),
            map,
        });
        let path = path.to_path_buf();
        Ok((Self { path, map }, file))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn all(&self) -> &[u8] {
        &self.map.map
    }

    /// The file from `start` on; what is sliced from it keeps the mapping.
    pub(super) fn bytes_from(&self, start: usize) -> Bytes {
        Bytes::from_owner(SharedMap(Arc::clone(&self.map))).slice(start..)
    }

    /// Gives the memory of these bytes' pages back; they are read from the file again when they are touched.
    pub(super) fn release(&self, bytes: Range<usize>) -> Result<()> {
        // SAFETY: the mapping is of a file and never written to, so its pages hold the same bytes when read again.
        unsafe {
            self.map
                .map
                .unchecked_advise_range(UncheckedAdvice::DontNeed, bytes.start, bytes.len())
        }
        .map_err(Error::io(&self.path))
    }
}

/// `bytes` at an address that is a multiple of `alignment` (at most 8).
pub(super) fn aligned(bytes: Bytes, alignment: usize) -> Bytes {
    if bytes.as_ptr().addr().is_multiple_of(alignment) {
        return bytes;
    }
    let mut words = vec![0u64; bytes.len().div_ceil(size_of::<u64>())];
    bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(&bytes);
    Bytes::from_owner(Words(words)).slice(..bytes.len())
}

struct Words(Vec<u64>);

impl AsRef<[u8]> for Words {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}
