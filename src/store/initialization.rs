//! `initialization.json` beside an adapter: which weights it is to be put on, where those are not the original ones.
//!
//! PEFT does not know the file. `adapter_config.json` says `init_lora_weights: true` all the while: with the name of a method
//! that changes the base, PEFT would change it once more when it loads the adapter.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::atomic::AtomicFile;
use super::checkpoint::read_json;
use super::manifest::ManifestWriter;
use crate::{Error, Result};

/// The directory of the adapter that a 4-bit model was initialized with, within the model's.
pub const INITIAL_ADAPTER: &str = "initial_adapter";

/// In the directory of an adapter, how it was made together with the weights below it.
pub const FILE: &str = "initialization.json";

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
    /// The directory of the weights that it was made of, or their name on the Hugging Face hub.
    pub original_model: String,
    /// The commit of that name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_revision: Option<String>,
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

    /// Refuses the adapter in the directory `adapter` for the model in `base` if it is a change of other weights.
    ///
    /// # Errors
    /// [`Error::Config`] with the weights that it belongs to; those of [`read`](Self::read).
    pub fn expect_base(adapter: &Path, base: &Path) -> Result<()> {
        let Some(record) = Self::read(adapter)? else {
            return Ok(());
        };
        let is_initialized = Self::of_model(base)?.is_some();
        let (adapter, base) = (adapter.display(), base.display());
        let reason = match (record.adapter_is_relative_to, is_initialized) {
            (RelativeTo::InitializedBase, false) => format!(
                "{adapter} belongs to the 4-bit weights that were made with it ({}) and not to {base}; \
                 adapter_for_original_model in its run directory does",
                record.initialized_base
            ),
            (RelativeTo::OriginalModel, true) => format!(
                "{adapter} belongs to the original model ({}) and not to {base}",
                record.original_model
            ),
            _ => return Ok(()),
        };
        Err(Error::config("adapter", reason))
    }

    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, dir: &Path) -> Result<()> {
        AtomicFile::write(dir.join(FILE), self.json())
    }

    /// Writes the file into a directory of which all files are listed.
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
