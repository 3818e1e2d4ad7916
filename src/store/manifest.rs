//! `manifest.json`: the size and the SHA-256 of every other file of a directory, written last.
//!
//! The digest is taken of what was to be written, not of what is on disk: a disk that lost or changed a byte is found out.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::atomic_dir::AtomicDir;
use super::checkpoint::read_json;
use crate::{Error, Result};

const MANIFEST_FILE: &str = "manifest.json";

/// What a directory must hold.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// By file name.
    files: BTreeMap<String, FileDigest>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileDigest {
    bytes: u64,
    /// In hexadecimal.
    sha256: String,
}

impl Manifest {
    /// Reads the manifest of `dir` and holds every file against it.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Malformed`] naming the file that is missing, of another size, or of other bytes.
    pub fn verify(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST_FILE);
        if !path.exists() {
            return Err(Error::malformed(dir, format!("has no {MANIFEST_FILE}")));
        }
        let manifest: Self = serde_json::from_value(read_json(&path)?)
            .map_err(|error| Error::malformed(&path, error.to_string()))?;
        for (name, expected) in &manifest.files {
            let mut parts = Path::new(name).components();
            let is_plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name.as_str());
            if !is_plain {
                let reason = format!("names `{name}`, which is not a file of this directory");
                return Err(Error::malformed(path, reason));
            }
            expected.expect_in(&dir.join(name))?;
        }
        Ok(manifest)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }
}

impl FileDigest {
    fn expect_in(&self, path: &Path) -> Result<()> {
        let file = File::open(path).map_err(Error::io(path))?;
        let bytes = file.metadata().map_err(Error::io(path))?.len();
        if bytes != self.bytes {
            let reason = format!(
                "is damaged: {bytes} bytes instead of the {} that were written",
                self.bytes
            );
            return Err(Error::malformed(path, reason));
        }
        if hex(&sha256(file.take(bytes)).map_err(Error::io(path))?) != self.sha256 {
            return Err(Error::malformed(
                path,
                "is damaged: its SHA-256 is not that of what was written",
            ));
        }
        Ok(())
    }
}

/// A directory with a manifest, being written.
#[derive(Debug)]
pub struct ManifestWriter {
    dir: AtomicDir,
    manifest: Manifest,
}

impl ManifestWriter {
    pub fn new(dir: AtomicDir) -> Self {
        Self {
            dir,
            manifest: Manifest::default(),
        }
    }

    /// Writes the file `name` with what `content` gives.
    ///
    /// # Errors
    /// [`Error::Io`] with the name that the file will have.
    pub fn write(
        &mut self,
        name: &str,
        content: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<()> {
        let mut file = HashingWriter {
            inner: self.dir.file(name)?,
            hash: Sha256::new(),
            bytes: 0,
        };
        let written = content(&mut file).and_then(|()| file.flush());
        written.map_err(|error| self.dir.io_error(name, error))?;
        let digest = FileDigest {
            bytes: file.bytes,
            sha256: hex(&file.hash.finalize()),
        };
        self.manifest.files.insert(name.to_string(), digest);
        Ok(())
    }

    /// Writes the manifest, syncs everything and gives the directory its name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn commit(self) -> Result<()> {
        let mut file = self.dir.file(MANIFEST_FILE)?;
        let json = serde_json::to_string_pretty(&self.manifest).map_err(io::Error::other);
        let written = json
            .and_then(|json| writeln!(file, "{json}"))
            .and_then(|()| file.flush());
        written.map_err(|error| self.dir.io_error(MANIFEST_FILE, error))?;
        self.dir.commit()
    }
}

struct HashingWriter<W> {
    inner: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(buffer)?;
        self.hash.update(&buffer[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn sha256(mut reader: impl Read) -> io::Result<Vec<u8>> {
    let mut hash = Sha256::new();
    io::copy(&mut reader, &mut hash)?;
    Ok(hash.finalize().to_vec())
}

/// Bytes in lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
