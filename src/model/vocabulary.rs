//! The embedding and the head: frozen, or trained whole, as `modules_to_save` of PEFT says.
//!
//! A trained one begins as a copy of the base's. Where the base ties the two, they part by that, as in PEFT: the other stays
//! what it was.

use std::sync::Arc;

use candle_core::Tensor;

use super::config::DecoderConfig;
use super::parameters::Trainable;
use crate::ops::table::{PagedTable, Table};
use crate::ops::weight::Weight;
use crate::store::AdapterConfig;
use crate::store::{WEIGHT, adapter_tensor_name};
use crate::{Error, Result};

/// A module beside the linear layers of blocks that can be trained whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModuleToSave {
    Embedding,
    Head,
}

impl ModuleToSave {
    pub const ALL: [Self; 2] = [Self::Embedding, Self::Head];

    /// The path within the model.
    pub fn path(self, config: &DecoderConfig) -> String {
        match self {
            Self::Embedding => format!("{}.embed_tokens", config.decoder_path),
            Self::Head => "lm_head".into(),
        }
    }

    /// PEFT's name for its tensor.
    pub(super) fn tensor_name(self, config: &DecoderConfig) -> String {
        adapter_tensor_name(&self.path(config), WEIGHT)
    }
}

/// The matrix of the embedding or of the head, `[V, D]`.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    /// That of the base.
    pub frozen: Weight,
    /// The same for kernels, where only parts of it are on the device.
    pub paged: Option<Arc<PagedTable>>,
    /// What takes its place.
    pub trained: Option<Trainable>,
}

impl Vocabulary {
    pub(super) fn frozen(weight: Weight) -> Self {
        Self {
            frozen: weight,
            paged: None,
            trained: None,
        }
    }

    /// What forward and backward read.
    pub fn table(&self) -> Table<'_> {
        match (&self.trained, &self.paged) {
            (Some(trained), _) => Table::Trained(&trained.value, self.frozen.compute_dtype()),
            (None, Some(paged)) => Table::Paged(paged),
            (None, None) => Table::Frozen(&self.frozen),
        }
    }

    /// Where backward adds, if it is trained.
    pub fn grad(&self) -> Option<&Tensor> {
        self.trained.as_ref().map(|trained| &trained.grad)
    }
}

impl DecoderConfig {
    /// # Errors
    /// [`Error::Config`] for a name that is neither the embedding nor the head.
    pub fn expect_modules_to_save(&self, config: &AdapterConfig) -> Result<()> {
        let is_known = |name: &&str| {
            let mut modules = ModuleToSave::ALL.into_iter();
            modules.any(|module| module.path(self).ends_with(*name))
        };
        match config.modules_to_save.names().find(|name| !is_known(name)) {
            None => Ok(()),
            Some(name) => {
                let reason =
                    format!("`{name}` cannot be trained whole; embed_tokens and lm_head can");
                Err(Error::config("modules_to_save", reason))
            }
        }
    }
}
