//! The cache of tokenized rows: a file for each (files, tokenizer, options).

use std::path::{Path, PathBuf};

use blake3::Hasher;

use super::token_rows::TokenRows;
use super::{LoadOptions, Tokenizer};
use crate::{Error, Result};

/// Changes whenever the same file, tokenizer and options would give other rows than before.
const VERSION: u32 = 3;
const EXTENSION: &str = "rows";

/// The place of one data set's rows.
pub(super) struct Cache {
    path: PathBuf,
}

impl Cache {
    /// Hashes what the rows depend on, and makes the directory `dir`.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read or the directory cannot be made.
    pub fn new(
        dir: &Path,
        files: &[PathBuf],
        options: &LoadOptions,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let mut key = Hasher::new();
        key.update(&VERSION.to_le_bytes());
        key.update(env!("CARGO_PKG_VERSION").as_bytes());
        for file in files {
            let mut content = Hasher::new();
            content.update_mmap_rayon(file).map_err(Error::io(file))?;
            key.update(content.finalize().as_bytes());
            // The name says how the file is read.
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let extensions = name
                .split_once('.')
                .map_or("", |(_, extensions)| extensions);
            update(&mut key, extensions.as_bytes());
        }
        let options =
            serde_json::to_vec(options).map_err(|e| Error::malformed(dir, e.to_string()))?;
        update(&mut key, &options);
        if let Some(tokenizer) = tokenizer {
            key.update(&tokenizer.fingerprint());
        }
        let name = format!("{}.{EXTENSION}", key.finalize().to_hex());
        Ok(Self {
            path: dir.join(name),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The rows and their summary, if they have been kept.
    ///
    /// # Errors
    /// [`Error::Io`] if they are there and cannot be read.
    pub fn open(&self) -> Result<Option<(TokenRows, Vec<u8>)>> {
        match self.path.exists() {
            true => TokenRows::open(&self.path),
            false => Ok(None),
        }
    }
}

/// Adds `bytes` with their length, so that neighbours cannot be confused.
fn update(key: &mut Hasher, bytes: &[u8]) {
    key.update(&(bytes.len() as u64).to_le_bytes());
    key.update(bytes);
}
