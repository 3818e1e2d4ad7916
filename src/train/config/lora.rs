//! The adapter that a configuration asks for: a new one, or an existing one that it has to agree with.

use std::path::Path;

use serde_json::json;

use super::TrainConfig;
use crate::model::{DecoderConfig, ModuleToSave};
use crate::store::{AdapterConfig, LayerSelection, model_name};
use crate::{Error, Result};

/// What an unset `lora_r` and `lora_alpha` are, as in qlora.py.
const LORA_R: usize = 64;
const LORA_ALPHA: f64 = 16.0;

impl TrainConfig {
    /// The adapter of a run that starts with a new one.
    pub fn new_adapter_config(&self) -> AdapterConfig {
        let (base, revision) = model_name(&self.model_name_or_path);
        self.given_over(AdapterConfig {
            base_model_name_or_path: Some(base),
            revision,
            r: LORA_R,
            lora_alpha: LORA_ALPHA,
            ..AdapterConfig::default()
        })
    }

    /// The adapter of a run that starts with the one in `dir`, which has the config `found`.
    ///
    /// # Errors
    /// [`Error::Config`] for a key that is given and would make another adapter, with both values.
    pub fn adapter_config_of(
        &self,
        found: &AdapterConfig,
        dir: &Path,
        model: &DecoderConfig,
    ) -> Result<AdapterConfig> {
        let given = self.given_over(found.clone());
        expect_no_module_left(&given, found, dir, model)?;
        let found = AdapterConfig {
            modules_to_save: given.modules_to_save.clone(),
            ..found.clone()
        };
        expect_same_adapter(&given, &found, dir, model)?;
        Ok(AdapterConfig {
            lora_dropout: given.lora_dropout,
            ..found
        })
    }

    /// `other` with the keys that are given.
    fn given_over(&self, other: AdapterConfig) -> AdapterConfig {
        let given = self.clone();
        let layers = given.layers_to_transform.map(LayerSelection::of);
        AdapterConfig {
            r: given.lora_r.unwrap_or(other.r),
            lora_alpha: given.lora_alpha.unwrap_or(other.lora_alpha),
            lora_dropout: given.lora_dropout.unwrap_or(other.lora_dropout),
            target_modules: given.lora_target_modules.unwrap_or(other.target_modules),
            exclude_modules: given.exclude_modules.or(other.exclude_modules),
            layers_to_transform: layers.or(other.layers_to_transform),
            rank_pattern: given.rank_pattern.unwrap_or(other.rank_pattern),
            alpha_pattern: given.alpha_pattern.unwrap_or(other.alpha_pattern),
            use_rslora: given.use_rslora.unwrap_or(other.use_rslora),
            use_dora: given.use_dora.unwrap_or(other.use_dora),
            modules_to_save: given.modules_to_save.unwrap_or(other.modules_to_save),
            ..other
        }
    }
}

/// A key that decides what an adapter is.
struct Setting {
    key: &'static str,
    text: fn(&AdapterConfig) -> String,
    /// Sets it in the first config as it is in the second.
    copy: fn(&mut AdapterConfig, &AdapterConfig),
    compared_by: Comparison,
}

enum Comparison {
    Value,
    /// By the adapters it makes: there are several ways to say the same.
    Effect,
}

macro_rules! setting {
    ($key:literal, $field:ident, $compared_by:ident, $text:expr) => {
        Setting {
            key: $key,
            text: |config| $text(&config.$field),
            copy: |config, other| config.$field = other.$field.clone(),
            compared_by: Comparison::$compared_by,
        }
    };
}

#[rustfmt::skip]
const SETTINGS: &[Setting] = &[
    setting!("lora_r", r, Value, ToString::to_string),
    setting!("lora_alpha", lora_alpha, Value, ToString::to_string),
    setting!("use_rslora", use_rslora, Value, ToString::to_string),
    setting!("use_dora", use_dora, Value, ToString::to_string),
    setting!("lora_target_modules", target_modules, Effect, |targets| json!(targets).to_string()),
    setting!("exclude_modules", exclude_modules, Effect, |excluded| json!(excluded).to_string()),
    setting!("layers_to_transform", layers_to_transform, Effect,
        |layers: &Option<LayerSelection>| json!(layers.as_ref().map(LayerSelection::indices)).to_string()),
    setting!("rank_pattern", rank_pattern, Effect, |ranks| json!(ranks).to_string()),
    setting!("alpha_pattern", alpha_pattern, Effect, |alphas| json!(alphas).to_string()),
    setting!("modules_to_save", modules_to_save, Value, |names| json!(names).to_string()),
];

/// An adapter cannot change its size, its scale or its place on the way.
///
/// # Errors
/// [`Error::Config`] for the first key by which `given` is another adapter than the one `found` in `dir`.
pub(in crate::train) fn expect_same_adapter(
    given: &AdapterConfig,
    found: &AdapterConfig,
    dir: &Path,
    model: &DecoderConfig,
) -> Result<()> {
    for setting in SETTINGS {
        let [ours, theirs] = [given, found].map(setting.text);
        let is_same = match setting.compared_by {
            Comparison::Value => ours == theirs,
            Comparison::Effect => {
                let mut changed = found.clone();
                (setting.copy)(&mut changed, given);
                model.adapters(&changed) == model.adapters(found)
            }
        };
        if !is_same {
            return Err(other_adapter(setting.key, &ours, &theirs, dir));
        }
    }
    Ok(())
}

/// Modules that are trained whole can join on the way, as copies of the base's, but not be left behind.
///
/// # Errors
/// [`Error::Config`] if `given` does without one of those of the config `found` in `dir`.
fn expect_no_module_left(
    given: &AdapterConfig,
    found: &AdapterConfig,
    dir: &Path,
    model: &DecoderConfig,
) -> Result<()> {
    let [ours, theirs] = [given, found].map(|config| &config.modules_to_save);
    let mut paths = ModuleToSave::ALL
        .map(|module| module.path(model))
        .into_iter();
    let is_left = paths.any(|path| theirs.matches(&path) && !ours.matches(&path));
    match is_left {
        false => Ok(()),
        true => {
            let [ours, theirs] = [ours, theirs].map(|names| json!(names).to_string());
            Err(other_adapter("modules_to_save", &ours, &theirs, dir))
        }
    }
}

/// The refusal of a key that is unlike that of the adapter in `dir`.
pub(in crate::train) fn other_adapter(
    key: &str,
    configured: &str,
    found: &str,
    dir: &Path,
) -> Error {
    let reason = format!("is {configured}, but {found} in {}", dir.display());
    Error::config(key, reason)
}
