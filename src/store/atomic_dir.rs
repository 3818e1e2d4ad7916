//! A directory that is complete under its final name or not there at all.
//!
//! It is written under a temporary sibling name, synced file by file, and renamed; what is dropped before `commit` is
//! removed, and what a kill leaves behind is recognised by its name ([`remove_leftovers`]).

use std::fs::{self, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::atomic::{SUFFIX, parent, temporary_prefix, without_temporary_name};
use super::disk::{Disk, SystemDisk};
use crate::{Error, Result};

/// What to do about a directory that already has the final name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    Refuse,
    Replace,
}

/// Refuses to write a directory over what is at `destination`: over anything unless `existing` allows it, over what one of
/// `sources` lies in, and over what lacks the file that makes a directory one of its `kind`, which comes with its name.
///
/// # Errors
/// [`Error::Malformed`] with the reason.
pub fn expect_replaceable(
    destination: &Path,
    existing: Existing,
    sources: &[&Path],
    (file, kind): (&str, &str),
) -> Result<()> {
    if destination.symlink_metadata().is_err() {
        return Ok(());
    }
    let refuse = |reason: &str| Err(Error::malformed(destination, reason));
    if existing == Existing::Refuse {
        return refuse("already exists, choose another name or --overwrite");
    }
    let canonical = |path: &Path| path.canonicalize().map_err(Error::io(path));
    for source in sources {
        if canonical(source)?.starts_with(canonical(destination)?) {
            return refuse("is or contains the source, choose another name");
        }
    }
    match destination.join(file).is_file() {
        true => Ok(()),
        false => refuse(&format!("is not {kind} and will not be replaced")),
    }
}

/// A directory that appears at its path, with everything in it, when it is committed.
#[derive(Debug)]
pub struct AtomicDir {
    destination: PathBuf,
    existing: Existing,
    disk: Arc<dyn Disk>,
    temporary: PathBuf,
    is_committed: bool,
}

impl AtomicDir {
    /// Starts the directory beside `path`; the directories above it are made.
    ///
    /// # Errors
    /// [`Error::Malformed`] if `path` exists and that is to be refused.
    pub fn create(path: impl AsRef<Path>, existing: Existing) -> Result<Self> {
        Self::create_on(Arc::new(SystemDisk), path, existing)
    }

    /// As [`create`](Self::create), on `disk`.
    ///
    /// # Errors
    /// Those of [`create`](Self::create).
    pub fn create_on(
        disk: Arc<dyn Disk>,
        path: impl AsRef<Path>,
        existing: Existing,
    ) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        check_existing(&path, existing)?;
        let parent = parent(&path);
        fs::create_dir_all(&parent).map_err(Error::io(&parent))?;
        let temporary = temporary_dir(&path)?;
        Ok(Self {
            destination: path,
            existing,
            disk,
            temporary,
            is_committed: false,
        })
    }

    /// Where to write the directory's files.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Starts a file of the directory.
    ///
    /// # Errors
    /// [`Error::Io`] with the name that the file will have.
    pub fn file(&self, name: &str) -> Result<impl Write + use<>> {
        let file = self.disk.create_file(&self.temporary.join(name));
        let file = file.map_err(Error::io(self.destination.join(name)))?;
        Ok(BufWriter::with_capacity(1 << 20, file))
    }

    /// An error of the file `name`, under the name that it will have.
    pub(super) fn io_error(&self, name: &str, error: io::Error) -> Error {
        Error::io(self.destination.join(name))(error)
    }

    /// Syncs every file and gives the directory its name. One that has the name already is swapped with it and removed
    /// last.
    ///
    /// # Errors
    /// [`Error::Io`]; the directory that had the name keeps it then.
    pub fn commit(mut self) -> Result<()> {
        sync_tree(&*self.disk, &self.temporary, &self.destination)?;
        check_existing(&self.destination, self.existing)?;
        let parent = parent(&self.destination);
        let renamed = match self.destination.symlink_metadata().is_ok() {
            true => self.replace(),
            false => self
                .disk
                .rename(&self.temporary, &self.destination)
                .map(|()| self.is_committed = true),
        };
        renamed.map_err(Error::io(&self.destination))?;
        self.disk.sync(&parent).map_err(Error::io(&parent))?;
        match self.is_committed {
            true => Ok(()),
            // Swapped: the old one lies under the temporary name.
            false => self
                .disk
                .remove_dir_all(&self.temporary)
                .map_err(Error::io(&self.temporary)),
        }
    }

    fn replace(&mut self) -> io::Result<()> {
        match self.disk.exchange(&self.temporary, &self.destination) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            exchanged => return exchanged,
        }
        // For a moment there is none of that name: `remove_leftovers` puts the old one back if the program ends here.
        let aside = temporary_dir(&self.destination).map_err(io::Error::other)?;
        let old = aside.join(OLD);
        self.disk.rename(&self.destination, &old)?;
        if let Err(error) = self.disk.rename(&self.temporary, &self.destination) {
            self.disk.rename(&old, &self.destination)?;
            self.disk.remove_dir_all(&aside)?;
            return Err(error);
        }
        self.temporary = aside;
        Ok(())
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        if !self.is_committed {
            // Where this fails too, `remove_leftovers` does it later.
            let _ = self.disk.remove_dir_all(&self.temporary);
        }
    }
}

/// The name of a replaced directory within the temporary one that removes it.
const OLD: &str = "old";

fn temporary_dir(path: &Path) -> Result<PathBuf> {
    let dir = tempfile::Builder::new()
        .prefix(&temporary_prefix(path))
        .suffix(SUFFIX)
        .permissions(Permissions::from_mode(0o777))
        .tempdir_in(parent(path))
        .map_err(without_temporary_name)
        .map_err(Error::io(path))?;
    Ok(dir.keep())
}

/// Removes the directory `path` in a way that never leaves half of it under its name.
///
/// # Errors
/// [`Error::Io`]; what is left then is removed by [`remove_leftovers`].
pub fn remove_dir(disk: &dyn Disk, path: &Path) -> Result<()> {
    let aside = temporary_dir(path)?;
    // The new name is that of an empty directory, which a rename replaces.
    disk.rename(path, &aside).map_err(Error::io(path))?;
    disk.remove_dir_all(&aside).map_err(Error::io(&aside))
}

/// Removes what writers that were killed left in `dir`: files and directories under temporary names. A directory that was
/// moved aside for another that never came gets its name back.
///
/// No writer may be at work in `dir`.
///
/// # Errors
/// [`Error::Io`].
pub fn remove_leftovers(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let Some(name) = final_name(&path) else {
            continue;
        };
        let (old, home) = (path.join(OLD), dir.join(name));
        if old.is_dir() && !home.exists() {
            fs::rename(&old, &home).map_err(Error::io(&home))?;
        }
        let removed = match path.is_dir() {
            true => fs::remove_dir_all(&path),
            false => fs::remove_file(&path),
        };
        removed.map_err(Error::io(&path))?;
    }
    Ok(())
}

/// `checkpoint-5` of `.checkpoint-5.Xy12z.partial`.
fn final_name(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?;
    let name = name.strip_prefix('.')?.strip_suffix(SUFFIX)?;
    Some(name.rsplit_once('.')?.0)
}

fn check_existing(path: &Path, existing: Existing) -> Result<()> {
    match existing == Existing::Refuse && path.symlink_metadata().is_ok() {
        true => Err(Error::malformed(path, "already exists")),
        false => Ok(()),
    }
}

/// Syncs the files below `dir` and then `dir`; errors name them as they will be called below `named`.
fn sync_tree(disk: &dyn Disk, dir: &Path, named: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io(named))? {
        let entry = entry.map_err(Error::io(named))?;
        let path = entry.path();
        let named = named.join(entry.file_name());
        let kind = entry.file_type().map_err(Error::io(&named))?;
        if kind.is_dir() {
            sync_tree(disk, &path, &named)?;
        } else if kind.is_file() {
            disk.sync(&path).map_err(Error::io(&named))?;
        }
    }
    disk.sync(dir).map_err(Error::io(named))
}
