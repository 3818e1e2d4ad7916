//! Files and directories that are complete under their final name or not there at all.
//!
//! They are written under a temporary sibling name, synced, and renamed; what is dropped before `commit` is removed.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::{NamedTempFile, TempDir};

use crate::{Error, Result};

const SUFFIX: &str = ".partial";

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

/// What to do about a directory that already has the final name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    Refuse,
    Replace,
}

/// A directory that appears at its path, with everything in it, when it is committed.
#[derive(Debug)]
pub struct AtomicDir {
    path: PathBuf,
    existing: Existing,
    dir: TempDir,
}

impl AtomicDir {
    /// Starts the directory beside `path`; the directories above it are made.
    ///
    /// # Errors
    /// [`Error::Malformed`] if `path` exists and that is to be refused.
    pub fn create(path: impl AsRef<Path>, existing: Existing) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        check_existing(&path, existing)?;
        let parent = parent(&path);
        fs::create_dir_all(&parent).map_err(Error::io(&parent))?;
        let dir = tempfile::Builder::new()
            .prefix(&temporary_prefix(&path))
            .suffix(SUFFIX)
            .permissions(Permissions::from_mode(0o777))
            .tempdir_in(&parent)
            .map_err(without_temporary_name)
            .map_err(Error::io(&path))?;
        Ok(Self {
            path,
            existing,
            dir,
        })
    }

    /// Where to write the directory's files.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Syncs every file and gives the directory its name.
    ///
    /// A directory that is replaced is moved aside first and removed last, so for a moment there is none of that name.
    pub fn commit(self) -> Result<()> {
        let Self {
            path,
            existing,
            dir,
        } = self;
        sync_tree(dir.path())?;
        check_existing(&path, existing)?;
        let parent = parent(&path);
        let old = match path.symlink_metadata().is_ok() {
            true => Some(move_aside(&path, &parent)?),
            false => None,
        };
        if let Err(error) = fs::rename(dir.path(), &path) {
            if let Some(old) = old {
                // Kept if it cannot be moved back: it is the only copy.
                let old = old.keep();
                fs::rename(old.join(OLD), &path).map_err(Error::io(&old))?;
                fs::remove_dir(&old).map_err(Error::io(&old))?;
            }
            return Err(Error::io(&path)(error));
        }
        // Renamed: nothing of that temporary name is left to remove.
        let _ = dir.keep();
        sync(&parent)
    }
}

/// The name of a replaced directory within the temporary one that removes it.
const OLD: &str = "old";

fn move_aside(path: &Path, parent: &Path) -> Result<TempDir> {
    let aside = tempfile::Builder::new()
        .prefix(&temporary_prefix(path))
        .suffix(SUFFIX)
        .tempdir_in(parent)
        .map_err(without_temporary_name)
        .map_err(Error::io(path))?;
    fs::rename(path, aside.path().join(OLD)).map_err(Error::io(path))?;
    Ok(aside)
}

fn check_existing(path: &Path, existing: Existing) -> Result<()> {
    match existing == Existing::Refuse && path.symlink_metadata().is_ok() {
        true => Err(Error::malformed(path, "already exists")),
        false => Ok(()),
    }
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

fn temporary_prefix(path: &Path) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(path.file_name().unwrap_or_default());
    prefix.push(".");
    prefix
}

/// `tempfile` adds `at path "..."` with the temporary name, which says nothing to who gave the final one.
fn without_temporary_name(error: io::Error) -> io::Error {
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

fn sync_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let entry = entry.map_err(Error::io(dir))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(Error::io(&path))?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            sync(&path)?;
        }
    }
    sync(dir)
}
