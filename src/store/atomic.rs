//! A file that is complete under its final name or not there at all.
//!
//! It is written under a temporary sibling name, synced, and renamed; what is dropped before `commit` is removed.

use std::ffi::OsString;
use std::fs::{File, Permissions};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::{Error, Result};

/// What the temporary names end in.
pub(super) const SUFFIX: &str = ".partial";

/// A file that appears at its path when it is committed, in place of one that is there.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    writer: BufWriter<NamedTempFile>,
}

impl AtomicFile {
    /// Starts the file beside `path`, in a directory that must exist.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let file = tempfile::Builder::new()
            .prefix(&temporary_prefix(&path))
            .suffix(SUFFIX)
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(parent(&path))
            .map_err(without_temporary_name)
            .map_err(Error::io(&path))?;
        Ok(Self {
            path,
            writer: BufWriter::with_capacity(1 << 20, file),
        })
    }

    /// Writes, syncs and renames a whole file.
    pub fn write(path: impl AsRef<Path>, contents: impl AsRef<[u8]>) -> Result<()> {
        let mut file = Self::create(path)?;
        let path = file.path.clone();
        file.write_all(contents.as_ref()).map_err(Error::io(path))?;
        file.commit()
    }

    /// The name the file will have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Goes on at byte `end`; what was not written before it reads as zeros.
    pub(super) fn skip_to(&mut self, end: u64) -> io::Result<()> {
        self.writer.seek(SeekFrom::Start(end))?;
        self.writer.get_ref().as_file().set_len(end)
    }

    /// Syncs the file and gives it its name.
    pub fn commit(self) -> Result<()> {
        let Self { path, writer } = self;
        let file = writer
            .into_inner()
            .map_err(|error| Error::io(&path)(without_temporary_name(error.into_error())))?;
        file.as_file().sync_all().map_err(Error::io(&path))?;
        file.persist(&path)
            .map_err(|error| Error::io(&path)(without_temporary_name(error.error)))?;
        sync(&parent(&path))
    }
}

impl Write for AtomicFile {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.writer.write(buffer).map_err(without_temporary_name)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush().map_err(without_temporary_name)
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.writer.seek(position).map_err(without_temporary_name)
    }
}

/// The directory that a path lies in.
pub(super) fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// The start of a temporary name beside `path`.
pub(super) fn temporary_prefix(path: &Path) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(path.file_name().unwrap_or_default());
    prefix.push(".");
    prefix
}

/// `tempfile` adds `at path "..."` with the temporary name, which says nothing to who gave the final one.
pub(super) fn without_temporary_name(error: io::Error) -> io::Error {
    match error.to_string().split_once(" at path ") {
        Some((reason, _)) => io::Error::new(error.kind(), reason.to_string()),
        None => error,
    }
}

/// Syncs a file or a directory.
fn sync(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(Error::io(path))
}
