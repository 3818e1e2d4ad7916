//! `lora_matrix_dropout.json` beside a PEFT adapter: how its matrices were masked in training, which PEFT has no key for.
//!
//! The adapter is a plain one without it. With it the masked models of a test-time ensemble can be made again.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::atomic::AtomicFile;
use super::manifest::ManifestWriter;
use crate::{Error, Result};

/// In the directory of an adapter, the settings of its matrix dropout.
pub const FILE: &str = "lora_matrix_dropout.json";

/// Whether a masked adapter makes up for what it lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MatrixDropoutScale {
    /// In training each factor is multiplied by `1/(1-p)`.
    Inverse,
    /// The whole adapter counts `(1-p)^2` outside of training, which its `lora_alpha` says.
    None,
}

/// The masks of an adapter's matrices. The keys are those of the training configuration.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MatrixDropoutSettings {
    /// The probability that a feature is dropped, in [0, 1).
    #[serde(rename = "lora_matrix_dropout")]
    pub p: f64,
    #[serde(rename = "lora_matrix_dropout_scale")]
    pub scale: MatrixDropoutScale,
    /// Of the run.
    pub seed: u64,
}

impl MatrixDropoutSettings {
    /// Reads the file beside the adapter in `dir`; `None` where there is none.
    ///
    /// # Errors
    /// [`Error::Malformed`] for one that is not what it should be; [`Error::Io`].
    pub fn read(dir: impl AsRef<Path>) -> Result<Option<Self>> {
        let path = dir.as_ref().join(FILE);
        let json = match std::fs::read(&path) {
            Ok(json) => json,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(path)(e)),
        };
        let read: Self =
            serde_json::from_slice(&json).map_err(|e| Error::malformed(&path, e.to_string()))?;
        if !(0.0..1.0).contains(&read.p) {
            let reason = format!("`lora_matrix_dropout` = {} is not in [0, 1)", read.p);
            return Err(Error::malformed(path, reason));
        }
        Ok(Some(read))
    }

    /// Puts the file beside the adapter in `dir`, which is there; for `None` it removes one that an earlier adapter left.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(settings: Option<&Self>, dir: impl AsRef<Path>) -> Result<()> {
        let path = dir.as_ref().join(FILE);
        match settings {
            Some(settings) => AtomicFile::write(path, settings.json()),
            None => match std::fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(e)),
                _ => Ok(()),
            },
        }
    }

    /// Writes the file among the others of a directory with a manifest.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_into(&self, dir: &mut ManifestWriter) -> Result<()> {
        dir.write(FILE, |out| out.write_all(self.json().as_bytes()))
    }

    fn json(&self) -> String {
        let json = serde_json::to_string_pretty(self);
        json.expect("numbers and names are always JSON") + "\n"
    }
}
