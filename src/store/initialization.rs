//! `initialization.json` beside an adapter: which weights it is to be put on, where those are not the original ones.
//!
//! PEFT does not know the file. `adapter_config.json` says `init_lora_weights: true` all the while: with the name of a method
//! that changes the base, PEFT would change it once more when it loads the adapter.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::atomic::AtomicFile;
use super::checkpoint::read_json;
use crate::{Error, Result};

/// The directory of the adapter that a 4-bit model was initialized with, within the model's.
pub const INITIAL_ADAPTER: &str = "initial_adapter";

const FILE: &str = "initialization.json";

/// Which weights an adapter is a change of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RelativeTo {
    /// The 4-bit weights that were made together with the initial adapter.
    InitializedBase,
    /// The weights that those were made of.
    OriginalModel,
}

/// How an adapter and the 4-bit weights below it were made out of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Initialization {
    /// PEFT's name of the method.
    pub init_lora_weights: String,
    /// How many times the weights were quantized.
    pub quantization_iterations: usize,
    /// Of the random subspace.
    pub seed: u64,
    /// The directory of the weights that it was made of.
    pub original_model: String,
    /// The directory of the 4-bit weights.
    pub initialized_base: String,
    pub adapter_is_relative_to: RelativeTo,
}

impl Initialization {
    /// The adapter that the model in the directory `model` was made together with, and how; `None` for other models.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the directory of the adapter is there and the file is not; those of [`read`](Self::read).
    pub fn of_model(model: &Path) -> Result<Option<(PathBuf, Self)>> {
        let dir = model.join(INITIAL_ADAPTER);
        match Self::read(&dir)? {
            Some(record) => Ok(Some((dir, record))),
            None if dir.exists() => {
                let reason = "is missing, and says how the weights beside it were made";
                Err(Error::malformed(dir.join(FILE), reason))
            }
            None => Ok(None),
        }
    }

    /// What the file beside the adapter in `dir` says; `None` if there is none.
    ///
    /// # Errors
    /// [`Error::Malformed`] or [`Error::Io`] with the file.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let record = serde_json::from_value(read_json(&path)?)
            .map_err(|error| Error::malformed(&path, error.to_string()))?;
        Ok(Some(record))
    }

    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(FILE);
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| Error::malformed(&path, error.to_string()))?;
        AtomicFile::write(path, text + "\n")
    }
}
