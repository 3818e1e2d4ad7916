//! `adapter_config.json` of a PEFT LoRA adapter: the long-stable keys, and a refusal of those that change the mathematics.
//!
//! Source: `LoraConfig` of PEFT 0.21; a writer emits only keys that old releases know, since those fail on others.

use std::path::Path;

use regex::Regex;
use serde_json::{Map, Value, json};

use crate::{Error, Result};

/// Which linear layers carry an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// Every linear layer but the output head.
    AllLinear,
    /// Layers by name, or by the end of their path after a dot.
    Names(Vec<String>),
    /// Layers whose whole path matches.
    Regex(String),
}

impl TargetModules {
    /// Whether the linear layer at `path`, such as `model.layers.0.self_attn.q_proj`, is one of them.
    ///
    /// # Errors
    /// [`Error::Config`] if the regular expression is not one.
    pub fn matches(&self, path: &str) -> Result<bool> {
        Ok(match self {
            Self::AllLinear => path != "lm_head",
            Self::Names(names) => names.iter().any(|name| {
                let prefix = path.strip_suffix(name.as_str());
                prefix.is_some_and(|prefix| prefix.is_empty() || prefix.ends_with('.'))
            }),
            Self::Regex(regex) => Regex::new(&format!("^(?:{regex})$"))
                .map_err(|error| Error::config("target_modules", error.to_string()))?
                .is_match(path),
        })
    }
}

/// The settings of a LoRA adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    pub base_model_name_or_path: Option<String>,
    pub revision: Option<String>,
    pub r: usize,
    pub lora_alpha: f64,
    pub lora_dropout: f64,
    pub target_modules: TargetModules,
    /// Scale by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`.
    pub use_rslora: bool,
}

/// Keys that say nothing about what a trained adapter computes.
#[rustfmt::skip]
const HARMLESS: &[&str] = &[
    "auto_mapping", "corda_config", "eva_config", "exclude_modules", "inference_mode", "loftq_config", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "runtime_config",
];

/// Initializations that leave the base model's weights as they are.
const INIT_THAT_KEEPS_THE_BASE: [&str; 3] = ["gaussian", "orthogonal", "eva"];

impl AdapterConfig {
    /// The factor of the adapter's output.
    pub fn scaling(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// Reads the parsed `adapter_config.json` found at `path`.
    ///
    /// # Errors
    /// [`Error::UnsupportedModel`] for a key that changes what the adapter computes and is not understood,
    /// [`Error::Malformed`] for a value that cannot be.
    pub fn from_json(config: &Value, path: &Path) -> Result<Self> {
        let object = config
            .as_object()
            .ok_or_else(|| Error::malformed(path, "is not a JSON object"))?;
        let keys = Keys { object, path };
        let read = Self {
            base_model_name_or_path: keys.text("base_model_name_or_path")?,
            revision: keys.text("revision")?,
            r: keys.r()?,
            lora_alpha: keys.number("lora_alpha")?.unwrap_or(8.0),
            lora_dropout: keys.number("lora_dropout")?.unwrap_or(0.0),
            target_modules: keys.target_modules()?,
            use_rslora: keys
                .value("use_rslora")
                .and_then(Value::as_bool)
                .unwrap_or(false),
        };
        if !(0.0..1.0).contains(&read.lora_dropout) {
            return Err(keys.malformed("lora_dropout", "is not in [0, 1)"));
        }
        keys.check_others()?;
        Ok(read)
    }

    /// `adapter_config.json` as PEFT writes it for inference.
    pub fn to_json(&self) -> Value {
        let target_modules = match &self.target_modules {
            TargetModules::AllLinear => json!("all-linear"),
            TargetModules::Regex(regex) => json!(regex),
            TargetModules::Names(names) => {
                let mut short: Vec<&str> = names
                    .iter()
                    .filter_map(|name| name.rsplit('.').next())
                    .collect();
                short.sort_unstable();
                short.dedup();
                json!(short)
            }
        };
        let lora_alpha = match self.lora_alpha.fract() == 0.0 && self.lora_alpha.abs() < 1e15 {
            true => json!(self.lora_alpha as i64),
            false => json!(self.lora_alpha),
        };
        json!({
            "alpha_pattern": {},
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "lora_alpha": lora_alpha,
            "lora_dropout": self.lora_dropout,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": {},
            "revision": self.revision,
            "target_modules": target_modules,
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": self.use_rslora,
        })
    }
}

struct Keys<'a> {
    object: &'a Map<String, Value>,
    path: &'a Path,
}

impl<'a> Keys<'a> {
    fn value(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn text(&self, key: &str) -> Result<Option<String>> {
        self.value(key)
            .map(|value| {
                value
                    .as_str()
                    .map(str::to_string)
                    .ok_or_else(|| self.malformed(key, "is not a string"))
            })
            .transpose()
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.value(key)
            .map(|value| {
                let number = value.as_f64().filter(|number| number.is_finite());
                number.ok_or_else(|| self.malformed(key, "is not a number"))
            })
            .transpose()
    }

    fn r(&self) -> Result<usize> {
        let r = self
            .value("r")
            .and_then(Value::as_u64)
            .filter(|r| (1..=1 << 20).contains(r));
        r.map(|r| r as usize)
            .ok_or_else(|| self.malformed("r", "is not a rank of at least 1"))
    }

    fn target_modules(&self) -> Result<TargetModules> {
        let wrong = || self.malformed("target_modules", "is neither a list of names nor a string");
        match self.value("target_modules") {
            Some(Value::String(all)) if all.eq_ignore_ascii_case("all-linear") => {
                Ok(TargetModules::AllLinear)
            }
            Some(Value::String(regex)) => Ok(TargetModules::Regex(regex.clone())),
            Some(Value::Array(names)) => {
                let names: Option<Vec<_>> = names
                    .iter()
                    .map(|name| name.as_str().map(str::to_string))
                    .collect();
                names.map(TargetModules::Names).ok_or_else(wrong)
            }
            _ => Err(wrong()),
        }
    }

    /// Refuses each key that is neither read nor known to be harmless and that has another value than "not used".
    fn check_others(&self) -> Result<()> {
        for (key, value) in self.object {
            let hint = match key.as_str() {
                "base_model_name_or_path"
                | "revision"
                | "r"
                | "lora_alpha"
                | "lora_dropout"
                | "target_modules" => continue,
                "use_rslora" if value.is_boolean() => continue,
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
                "use_dora" | "lora_bias" => "only plain LoRA is",
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

    fn malformed(&self, key: &str, reason: &str) -> Error {
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
