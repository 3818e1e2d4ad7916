//! Whether mapped files are still what they were when they were mapped.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::{Error, Result};

/// An open file as it was when it was mapped.
#[derive(Debug, Clone)]
pub(super) struct WatchedFile {
    path: PathBuf,
    file: Arc<File>,
    bytes: u64,
    modified: Option<SystemTime>,
}

impl WatchedFile {
    pub(super) fn new(path: &Path, file: File) -> Result<Self> {
        let metadata = file.metadata().map_err(Error::io(path))?;
        Ok(Self {
            path: path.to_path_buf(),
            file: Arc::new(file),
            bytes: metadata.len(),
            modified: metadata.modified().ok(),
        })
    }

    fn expect_unchanged(&self) -> Result<()> {
        let metadata = self.file.metadata().map_err(Error::io(&self.path))?;
        match metadata.len() == self.bytes && metadata.modified().ok() == self.modified {
            true => Ok(()),
            false => Err(Error::malformed(
                &self.path,
                "was changed while it was mapped: what was computed since is not to be trusted; put the file back",
            )),
        }
    }
}

/// Mapped files and what they were. One that was replaced by another of its name still counts as unchanged: the mapping
/// is of the old one.
#[derive(Debug, Clone)]
pub struct FileWatch(pub(super) Vec<WatchedFile>);

impl FileWatch {
    /// # Errors
    /// [`Error::Malformed`] for a file that was written to or truncated since it was mapped.
    pub fn expect_unchanged(&self) -> Result<()> {
        self.0.iter().try_for_each(WatchedFile::expect_unchanged)
    }
}
