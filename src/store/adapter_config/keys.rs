//! Reading the keys of an `adapter_config.json`, each with its own error.

use std::fmt::Display;
use std::path::Path;
use std::str::FromStr;

use serde_json::{Map, Value};

use super::super::layer_selection::LayerSelection;
use super::super::module_patterns::ModulePatterns;
use super::super::modules_to_save::ModulesToSave;
use super::super::target_modules::TargetModules;
use crate::{Error, Result};

/// Keys that say nothing about what a trained adapter computes.
#[rustfmt::skip]
const HARMLESS: &[&str] = &[
    "auto_mapping", "corda_config", "eva_config", "inference_mode", "loftq_config", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "runtime_config",
];

/// Initializations that leave the base model's weights as they are.
const INIT_THAT_KEEPS_THE_BASE: [&str; 3] = ["gaussian", "orthogonal", "eva"];

/// The keys of the file at `path`.
pub(super) struct Keys<'a> {
    object: &'a Map<String, Value>,
    path: &'a Path,
}

impl<'a> Keys<'a> {
    pub(super) fn of(config: &'a Value, path: &'a Path) -> Result<Self> {
        let object = config.as_object();
        let object = object.ok_or_else(|| Error::malformed(path, "is not a JSON object"))?;
        Ok(Self { object, path })
    }

    fn value(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<String>> {
        self.value(key)
            .map(|value| {
                value
                    .as_str()
                    .map(str::to_string)
                    .ok_or_else(|| self.malformed(key, "is not a string"))
            })
            .transpose()
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.value(key)
            .map(|value| {
                let number = value.as_f64().filter(|number| number.is_finite());
                number.ok_or_else(|| self.malformed(key, "is not a number"))
            })
            .transpose()
    }

    pub(super) fn r(&self) -> Result<usize> {
        let r = self
            .value("r")
            .and_then(Value::as_u64)
            .filter(|r| (1..=1 << 20).contains(r));
        r.map(|r| r as usize)
            .ok_or_else(|| self.malformed("r", "is not a rank of at least 1"))
    }

    pub(super) fn flag(&self, key: &str) -> bool {
        self.value(key).and_then(Value::as_bool).unwrap_or(false)
    }

    pub(super) fn target_modules(&self) -> Result<TargetModules> {
        let is_all = |text: &str| text.eq_ignore_ascii_case("all-linear");
        match self.value("target_modules") {
            Some(Value::String(text)) if is_all(text) => Ok(TargetModules::AllLinear),
            value => self.names_or_regex("target_modules", value.unwrap_or(&Value::Null)),
        }
    }

    pub(super) fn exclude_modules(&self) -> Result<Option<TargetModules>> {
        let value = self
            .value("exclude_modules")
            .filter(|value| !is_unused(value));
        let read = |value| self.names_or_regex("exclude_modules", value);
        value.map(read).transpose()
    }

    pub(super) fn modules_to_save(&self) -> Result<ModulesToSave> {
        let key = "modules_to_save";
        let names = match self.value(key) {
            None => Vec::new(),
            Some(names @ Value::Array(_)) => self.names(key, names)?,
            Some(_) => return Err(self.malformed(key, "is not a list of names")),
        };
        ModulesToSave::of(names)
            .map_err(|reason| self.malformed(key, &format!("cannot be used: {reason}")))
    }

    fn names_or_regex(&self, key: &str, value: &Value) -> Result<TargetModules> {
        match value {
            Value::String(regex) => {
                TargetModules::pattern(regex).map_err(|reason| self.malformed(key, &reason))
            }
            Value::Array(_) => Ok(TargetModules::named(&self.names(key, value)?)),
            _ => Err(self.malformed(key, "is neither a list of names nor a string")),
        }
    }

    fn names(&self, key: &str, value: &Value) -> Result<Vec<String>> {
        let names = value.as_array().into_iter().flatten();
        let names = names.map(|name| name.as_str().map(str::to_string));
        let names: Option<_> = names.collect();
        names.ok_or_else(|| self.malformed(key, "is not a list of names"))
    }

    /// The layers, with `layers_pattern`.
    pub(super) fn layers_to_transform(&self) -> Result<Option<LayerSelection>> {
        let wrong = || self.malformed("layers_to_transform", "is not a list of indices of layers");
        let index = |value: &Value| value.as_u64().map(|index| index as usize);
        let indices: Option<Vec<usize>> = match self.value("layers_to_transform") {
            None => return self.no_layers(),
            Some(Value::Array(layers)) => layers.iter().map(index).collect(),
            Some(one) => index(one).map(|index| vec![index]),
        };
        let indices = indices.ok_or_else(wrong)?;
        if indices.is_empty() {
            return self.no_layers();
        }
        let patterns = match self.value("layers_pattern") {
            None => Vec::new(),
            Some(Value::String(text)) if text.is_empty() => Vec::new(),
            Some(Value::String(one)) => vec![one.clone()],
            Some(several @ Value::Array(_)) => self.names("layers_pattern", several)?,
            Some(_) => return Err(self.malformed("layers_pattern", "is not a list of names")),
        };
        let selection = LayerSelection::new(indices, patterns);
        selection
            .map(Some)
            .map_err(|reason| self.malformed("layers_pattern", &reason))
    }

    fn no_layers(&self) -> Result<Option<LayerSelection>> {
        match self.value("layers_pattern").is_none_or(is_unused) {
            true => Ok(None),
            false => Err(self.malformed("layers_pattern", "needs layers_to_transform")),
        }
    }

    /// Values by the pattern of a module's path.
    pub(super) fn patterns<V>(&self, key: &str) -> Result<ModulePatterns<V>>
    where
        V: Copy + Default + PartialOrd + FromStr + Display,
    {
        match self.value(key) {
            None => Ok(ModulePatterns::default()),
            Some(Value::Object(pairs)) => ModulePatterns::from_json(pairs)
                .map_err(|reason| self.malformed(key, &format!("cannot be used: {reason}"))),
            Some(_) => Err(self.malformed(key, "is not an object of numbers")),
        }
    }

    /// Refuses each key that is neither read nor known to be harmless and that has another value than "not used".
    pub(super) fn check_others(&self) -> Result<()> {
        for (key, value) in self.object {
            let hint = match key.as_str() {
                "base_model_name_or_path"
                | "revision"
                | "r"
                | "lora_alpha"
                | "lora_dropout"
                | "target_modules"
                | "exclude_modules"
                | "layers_to_transform"
                | "layers_pattern"
                | "rank_pattern"
                | "alpha_pattern"
                | "modules_to_save" => continue,
                "use_rslora" | "use_dora" if value.is_boolean() => continue,
                "peft_type" if value == "LORA" => continue,
                "peft_type" => "only LORA adapters are",
                "task_type" if value == "CAUSAL_LM" => continue,
                "task_type" => "only CAUSAL_LM adapters are",
                "bias" if value == "none" => continue,
                "bias" => "train without biases",
                "init_lora_weights" if keeps_the_base(value) => continue,
                "init_lora_weights" => {
                    "it changes the base weights; convert the adapter to plain LoRA with PEFT first"
                }
                key if HARMLESS.contains(&key) || is_unused(value) => continue,
                "lora_bias" => "only LoRA and DoRA without biases are",
                _ => "it could change what the adapter computes",
            };
            if !value.is_null() {
                return Err(self.unsupported(key, hint));
            }
        }
        match self.object.contains_key("peft_type") {
            true => Ok(()),
            false => Err(self.malformed("peft_type", "is missing")),
        }
    }

    fn unsupported(&self, key: &str, hint: &str) -> Error {
        Error::UnsupportedModel {
            path: self.path.to_path_buf(),
            field: key.to_string(),
            value: self
                .object
                .get(key)
                .map_or_else(|| "null".into(), Value::to_string),
            hint: hint.to_string(),
        }
    }

    pub(super) fn malformed(&self, key: &str, reason: &str) -> Error {
        let reason = match self.object.get(key) {
            Some(value) => format!("`{key}` = {value} {reason}"),
            None => format!("`{key}` {reason}"),
        };
        Error::malformed(self.path, reason)
    }
}

fn keeps_the_base(init: &Value) -> bool {
    match init {
        Value::Null | Value::Bool(_) => true,
        Value::String(name) => INIT_THAT_KEEPS_THE_BASE.contains(&name.as_str()),
        _ => false,
    }
}

/// Whether a value says that a feature is off.
fn is_unused(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}
