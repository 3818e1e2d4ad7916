//! One run at a time in a run directory.
//!
//! The lock is `flock` on a file that names its owner. The kernel takes it off when the owner ends in whatever way, so a
//! file that is left over is recognised as such. Where the file system has no locks, the owner's process is looked for.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

const LOCK_FILE: &str = "run.lock";

/// Who writes to a run directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Owner {
    pid: u32,
    host: String,
}

/// The right to write to a run directory, until it is dropped.
#[derive(Debug)]
pub struct RunLock {
    path: PathBuf,
    // Closing it gives the lock back.
    _file: File,
}

impl RunLock {
    /// Takes the lock of `dir`.
    ///
    /// # Errors
    /// [`Error::Locked`] with pid and host of the run that has it; [`Error::Io`].
    pub fn acquire(dir: &Path) -> Result<Self> {
        let path = dir.join(LOCK_FILE);
        loop {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .map_err(Error::io(&path))?;
            let found = owner(&mut file);
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(locked(dir, &path, found)),
                Err(TryLockError::Error(_)) if found.as_ref().is_some_and(may_live) => {
                    return Err(locked(dir, &path, found));
                }
                Err(TryLockError::Error(_)) => {}
            }
            // The owner before may have removed the file between the opening and the lock.
            if !is_at(&file, &path) {
                continue;
            }
            let this = Owner {
                pid: std::process::id(),
                host: host(),
            };
            let json = serde_json::to_string(&this).map_err(std::io::Error::other);
            json.and_then(|json| {
                file.rewind()?;
                file.set_len(0)?;
                writeln!(file, "{json}")
            })
            .map_err(Error::io(&path))?;
            return Ok(Self { path, _file: file });
        }
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        // Left behind, it would be recognised as nobody's.
        let _ = fs::remove_file(&self.path);
    }
}

fn owner(file: &mut File) -> Option<Owner> {
    let mut text = String::new();
    file.take(4096).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

fn locked(dir: &Path, lock: &Path, owner: Option<Owner>) -> Error {
    let owner = match owner {
        Some(Owner { pid, host }) => format!("process {pid} on {host}"),
        None => "another process".to_string(),
    };
    Error::Locked {
        dir: dir.to_path_buf(),
        owner,
        lock: lock.to_path_buf(),
    }
}

/// Whether the owner of a file that cannot be locked may still be at work: certain only for a process of this machine.
fn may_live(owner: &Owner) -> bool {
    if owner.host != host() {
        return true;
    }
    let Ok(pid) = libc::pid_t::try_from(owner.pid) else {
        return false;
    };
    // SAFETY: signal 0 is sent to nobody; the call only tells whether there is such a process.
    let exists = unsafe { libc::kill(pid, 0) } == 0
        || std::io::Error::last_os_error().raw_os_error() == Some(libc::EPERM);
    exists && owner.pid != std::process::id()
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

fn host() -> String {
    let mut name = [0u8; 256];
    // SAFETY: the buffer is as long as is said; what is written is NUL-terminated or cut, and looked at up to its length.
    let status = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len()) };
    let length = name.iter().position(|byte| *byte == 0);
    match (status, length) {
        (0, Some(length)) if length > 0 => String::from_utf8_lossy(&name[..length]).into_owned(),
        _ => "an unknown host".to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_run_is_told_who_has_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let lock = RunLock::acquire(dir.path()).unwrap();
        let error = RunLock::acquire(dir.path()).unwrap_err().to_string();
        let expected = format!("process {} on {}", std::process::id(), host());
        assert!(error.contains(&expected), "{error}");
        drop(lock);
        assert!(!dir.path().join(LOCK_FILE).exists());
        RunLock::acquire(dir.path()).unwrap();
    }

    #[test]
    fn a_lock_file_that_nobody_holds_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        for left in [r#"{"pid":1,"host":"elsewhere"}"#, "", "not json"] {
            fs::write(dir.path().join(LOCK_FILE), left).unwrap();
            let lock = RunLock::acquire(dir.path()).unwrap();
            let text = fs::read_to_string(dir.path().join(LOCK_FILE)).unwrap();
            let owner: Owner = serde_json::from_str(&text).unwrap();
            assert_eq!(owner.pid, std::process::id());
            drop(lock);
        }
    }

    #[test]
    fn without_locks_only_a_process_that_is_gone_has_lost_its_directory() {
        let owner = |pid, host: String| Owner { pid, host };
        assert!(may_live(&owner(1, host())));
        assert!(may_live(&owner(u32::MAX, "elsewhere".into())));
        // Beyond any pid of Linux.
        assert!(!may_live(&owner(i32::MAX as u32, host())));
        // A pid that was this program's own before the machine started again.
        assert!(!may_live(&owner(std::process::id(), host())));
    }
}
