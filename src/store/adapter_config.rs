//! `adapter_config.json` of a PEFT LoRA adapter: the long-stable keys, and a refusal of those that change the mathematics.
//!
//! Source: `LoraConfig` of PEFT 0.21; a writer emits only keys that old releases know, since those fail on others.

mod keys;

use std::path::Path;

use serde_json::{Value, json};

use super::layer_selection::LayerSelection;
use super::module_patterns::ModulePatterns;
use super::modules_to_save::ModulesToSave;
use super::target_modules::TargetModules;
use crate::Result;
use keys::Keys;

/// The settings of a LoRA adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    pub base_model_name_or_path: Option<String>,
    pub revision: Option<String>,
    pub r: usize,
    pub lora_alpha: f64,
    pub lora_dropout: f64,
    pub target_modules: TargetModules,
    /// Of the target modules, those that get no adapter all the same.
    pub exclude_modules: Option<TargetModules>,
    /// The layers that get an adapter; `None` for all.
    pub layers_to_transform: Option<LayerSelection>,
    /// The rank of modules that have another one than `r`.
    pub rank_pattern: ModulePatterns<usize>,
    /// The alpha of modules that have another one than `lora_alpha`.
    pub alpha_pattern: ModulePatterns<f64>,
    /// Scale by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`.
    pub use_rslora: bool,
    /// Scale the rows of the merged weight to trained magnitudes.
    pub use_dora: bool,
    /// The modules that are trained whole and saved with the adapter.
    pub modules_to_save: ModulesToSave,
}

/// Those of PEFT, on all linear layers.
impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            base_model_name_or_path: None,
            revision: None,
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: TargetModules::AllLinear,
            exclude_modules: None,
            layers_to_transform: None,
            rank_pattern: ModulePatterns::default(),
            alpha_pattern: ModulePatterns::default(),
            use_rslora: false,
            use_dora: false,
            modules_to_save: ModulesToSave::default(),
        }
    }
}

impl AdapterConfig {
    /// Whether the linear layer at `path`, for example `model.layers.0.self_attn.q_proj`, gets an adapter.
    pub fn targets(&self, path: &str) -> bool {
        let is_excluded = self
            .exclude_modules
            .as_ref()
            .is_some_and(|e| e.matches(path));
        let is_in_layers = match &self.layers_to_transform {
            None => true,
            // As in PEFT, a whole path is a target whatever its layer.
            Some(layers) => self.target_modules.names(path) || layers.contains(path),
        };
        self.target_modules.matches(path) && !is_excluded && is_in_layers
    }

    /// The rank of the adapter at `path`.
    pub fn rank_of(&self, path: &str) -> usize {
        self.rank_pattern.of(path).unwrap_or(self.r)
    }

    /// The factor of the output of the adapter at `path`.
    pub fn scaling_of(&self, path: &str) -> f64 {
        let alpha = self.alpha_pattern.of(path).unwrap_or(self.lora_alpha);
        self.ratio(alpha, self.rank_of(path))
    }

    /// The factor of adapters that no pattern matches.
    pub fn scaling(&self) -> f64 {
        self.ratio(self.lora_alpha, self.r)
    }

    fn ratio(&self, alpha: f64, r: usize) -> f64 {
        let r = r as f64;
        alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// Reads the parsed `adapter_config.json` found at `path`.
    ///
    /// # Errors
    /// [`Error::UnsupportedModel`](crate::Error::UnsupportedModel) for a key that changes what the adapter computes and is
    /// not understood, [`Error::Malformed`](crate::Error::Malformed) for a value that cannot be.
    pub fn from_json(config: &Value, path: &Path) -> Result<Self> {
        let keys = Keys::of(config, path)?;
        let read = Self {
            base_model_name_or_path: keys.text("base_model_name_or_path")?,
            revision: keys.text("revision")?,
            r: keys.r()?,
            lora_alpha: keys.number("lora_alpha")?.unwrap_or(8.0),
            lora_dropout: keys.number("lora_dropout")?.unwrap_or(0.0),
            target_modules: keys.target_modules()?,
            exclude_modules: keys.exclude_modules()?,
            layers_to_transform: keys.layers_to_transform()?,
            rank_pattern: keys.patterns("rank_pattern")?,
            alpha_pattern: keys.patterns("alpha_pattern")?,
            use_rslora: keys.flag("use_rslora"),
            use_dora: keys.flag("use_dora"),
            modules_to_save: keys.modules_to_save()?,
        };
        if !(0.0..1.0).contains(&read.lora_dropout) {
            return Err(keys.malformed("lora_dropout", "is not in [0, 1)"));
        }
        let is_regex = matches!(read.target_modules, TargetModules::Pattern { .. });
        if is_regex && read.layers_to_transform.is_some() {
            let reason = "cannot be used when `target_modules` is a regex";
            return Err(keys.malformed("layers_to_transform", reason));
        }
        keys.check_others()?;
        Ok(read)
    }

    /// `adapter_config.json` as PEFT writes it for inference.
    pub fn to_json(&self) -> Value {
        let lora_alpha = match self.lora_alpha.fract() == 0.0 && self.lora_alpha.abs() < 1e15 {
            true => json!(self.lora_alpha as i64),
            false => json!(self.lora_alpha),
        };
        let layers = self.layers_to_transform.as_ref();
        let mut json = json!({
            "alpha_pattern": self.alpha_pattern.to_json(),
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": layers.and_then(LayerSelection::patterns_json),
            "layers_to_transform": layers.map(LayerSelection::indices),
            "lora_alpha": lora_alpha,
            "lora_dropout": self.lora_dropout,
            "modules_to_save": Some(&self.modules_to_save).filter(|names| !names.is_empty()),
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": self.rank_pattern.to_json(),
            "revision": self.revision,
            "target_modules": self.target_modules.to_json(),
            "task_type": "CAUSAL_LM",
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
        });
        // Younger than the others: releases that do not know it fail on it.
        if let Some(excluded) = &self.exclude_modules {
            json["exclude_modules"] = excluded.to_json();
        }
        json
    }
}
