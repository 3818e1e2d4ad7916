//! From files and texts to a [`TrainConfig`]: every message names the key it concerns.

use std::path::Path;

use serde_json::{Map, Value};

use super::foreign::{self, FOREIGN_KEYS};
use super::preset::Preset;
use super::{KEYS, Key, TrainConfig};
use crate::{Error, Result};

/// How alike two names must be for one to be offered instead of the other.
pub(super) const NEAREST_SIMILARITY: f64 = 0.8;

/// Reads a config file into its keys and values.
pub(super) fn read(path: &Path) -> Result<Map<String, Value>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    // Editors on Windows put a byte order mark there.
    let text = text.trim_start_matches('\u{feff}');
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
    let value = match extension {
        "toml" => from_toml(path, text)?,
        "yaml" | "yml" => serde_yaml_ng::from_str::<Value>(text)
            .map_err(|e| Error::malformed(path, e.to_string()))?,
        "json" => serde_json::from_str(text).map_err(|e| Error::malformed(path, e.to_string()))?,
        _ => {
            return Err(Error::malformed(
                path,
                "a config file ends in .toml, .yaml, .yml or .json",
            ));
        }
    };
    match value {
        Value::Object(map) => Ok(map),
        Value::Null => Ok(Map::new()),
        _ => Err(Error::malformed(path, "expected keys and values")),
    }
}

fn from_toml(path: &Path, text: &str) -> Result<Value> {
    toml::from_str(text).map_err(|e| {
        let start = e.span().map_or(0, |span| span.start.min(text.len()));
        let line = 1 + text.as_bytes()[..start]
            .iter()
            .filter(|b| **b == b'\n')
            .count();
        Error::malformed(
            path,
            format!("line {line}: {}", e.message().replace('\n', ", ")),
        )
    })
}

/// Sets the given keys over the defaults.
pub(super) fn resolve(mut given: Map<String, Value>) -> Result<TrainConfig> {
    let mut config = TrainConfig::default();
    let is_given = |given: &Map<String, Value>, name: &str| {
        given.get(name).is_some_and(|value| !value.is_null())
    };
    let epochs_decide = is_given(&given, "num_train_epochs") && !is_given(&given, "max_steps");
    if let Some(name) = given.get("preset").filter(|name| !name.is_null()) {
        let preset: Preset = serde_json::from_value(name.clone())
            .map_err(|e| Error::config("preset", e.to_string()))?;
        for (key, value) in preset.values() {
            if !is_given(&given, &key) {
                given.insert(key, value);
            }
        }
    }
    let mut foreign = Vec::new();
    for (name, value) in given {
        if let Some(key) = foreign::find(&name) {
            foreign.push((key, value));
            continue;
        }
        let key = KEYS
            .iter()
            .find(|key| key.name == name)
            .ok_or_else(|| Error::UnknownKey {
                nearest: nearest(&name),
                key: name.clone(),
            })?;
        if value.is_null() && key.is_unset_by_default() {
            continue;
        }
        config = with_key(&config, key, value).map_err(|reason| Error::config(key.name, reason))?;
    }
    if epochs_decide {
        config.max_steps = -1;
    }
    for (key, value) in foreign {
        key.check(&value, &config)?;
    }
    Ok(config)
}

/// Sets one key; one at a time, so that an error of serde can be told by the key it came from.
pub(super) fn with_key(
    config: &TrainConfig,
    key: &Key,
    value: Value,
) -> Result<TrainConfig, String> {
    let value = key.kind.coerce(value)?;
    let mut fields = serde_json::to_value(config).map_err(|e| e.to_string())?;
    fields[key.name] = value;
    serde_json::from_value(fields).map_err(|e| e.to_string())
}

/// The known key that `name` probably means.
fn nearest(name: &str) -> Option<String> {
    let name = name.replace('-', "_");
    if let Some(key) = foreign::synonym(&name) {
        return Some(key.to_string());
    }
    let known = KEYS.iter().map(|key| key.name);
    known
        .chain(FOREIGN_KEYS.iter().map(|key| key.name))
        .map(|known| (strsim::jaro_winkler(&name, known), known))
        .filter(|(similarity, _)| *similarity >= NEAREST_SIMILARITY)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known.to_string())
}
