//! The architecture of llama.cpp that computes a model, and what it cannot.
//!
//! Source: `src/models/{llama,qwen2,qwen3}.cpp` of llama.cpp.

use super::GgufBase;
use super::writer::Change;
use crate::Result;
use crate::model::{DecoderConfig, ModelTensor, Module, RopeScaling};

/// What llama.cpp knows a family of models as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    /// Mistral's models too.
    Llama,
    Qwen2,
    Qwen3,
}

impl Architecture {
    /// # Errors
    /// [`Error::UnsupportedModel`](crate::Error::UnsupportedModel) for what the architecture does not compute.
    pub(super) fn of(base: &GgufBase, config: &DecoderConfig) -> Result<Self> {
        let architecture = match base.config["model_type"].as_str() {
            Some("llama" | "mistral") => Self::Llama,
            Some("qwen2") => Self::Qwen2,
            Some("qwen3") => Self::Qwen3,
            _ => {
                let hint = "use llama, mistral, qwen2 or qwen3";
                return Err(base.unsupported("model_type", hint));
            }
        };
        architecture.check(base, config)?;
        Ok(architecture)
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// What is done to a tensor of the checkpoint.
    pub(super) fn change(self, tensor: ModelTensor, config: &DecoderConfig) -> Change {
        let is_rotated = matches!(
            tensor,
            ModelTensor::Weight(_, Module::Q | Module::K)
                | ModelTensor::Bias(_, Module::Q | Module::K)
        );
        let is_reordered = self == Self::Llama && is_rotated;
        Change {
            rotary_head_dim: is_reordered.then_some(config.head_dim),
            ..Change::NONE
        }
    }

    fn check(self, base: &GgufBase, config: &DecoderConfig) -> Result<()> {
        let refuse = |field, reason: &str| -> Result<()> {
            let hint = format!("the {} architecture of llama.cpp {reason}", self.name());
            Err(base.unsupported(field, &hint))
        };
        let is_llama = self == Self::Llama;
        if !is_llama && config.o_bias {
            return refuse("attention_bias", "has no bias after the attention");
        }
        if !is_llama && matches!(config.rope.scaling, RopeScaling::Llama3 { .. }) {
            let old = base.config.get("rope_scaling").filter(|s| !s.is_null());
            let field = if old.is_some() {
                "rope_scaling"
            } else {
                "rope_parameters"
            };
            return refuse(field, "does not scale rotary frequencies one by one");
        }
        Ok(())
    }

    /// Where llama.cpp computes something else.
    pub(super) fn notes(self, config: &DecoderConfig) -> Vec<String> {
        let windows = config.sliding_window.iter().flatten();
        let shortest = windows
            .min()
            .filter(|w| **w < config.max_position_embeddings);
        let note = shortest.map(|window| {
            format!(
                "the model attends to the last {window} tokens alone; the {} architecture of llama.cpp has no such window \
                 and attends to all, so texts of more than {window} tokens are computed otherwise",
                self.name()
            )
        });
        note.into_iter().collect()
    }
}

pub(super) fn as_u32(size: usize) -> u32 {
    u32::try_from(size).expect("a config is read with sizes below 2^31")
}

/// Reads the config of a model that llama.cpp is to compute.
pub(super) fn read(base: &GgufBase) -> Result<(DecoderConfig, Architecture)> {
    let config = DecoderConfig::from_json(base.config, &base.config_path())?;
    let architecture = Architecture::of(base, &config)?;
    Ok((config, architecture))
}
