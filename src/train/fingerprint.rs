//! What makes a run the run that it is: the values that its mathematics depends on, its base model and its rows.
//!
//! A checkpoint keeps it, so that a run that is continued with something else is noticed, and told what.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::config::TrainConfig;
use crate::data::Example;
use crate::store::{Checkpoint, hex};
use crate::{Error, Result};

/// Keys that may change between two parts of a run: they say where things are and what is kept and shown, or how the same
/// numbers are computed. A key that is not here changes the mathematics.
///
/// Paths are compared by what they lead to, a date by the rows, and the number of steps by the learning rates that come of it.
pub const KEYS_WITHOUT_EFFECT: &[&str] = &[
    "preset",
    "model_name_or_path",
    "adapter",
    "output_dir",
    "dataset",
    "chat_template_date",
    "dataset_cache_dir",
    "eval_dataset",
    "max_eval_samples",
    "per_device_eval_batch_size",
    "max_steps",
    "num_train_epochs",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "resume_from_checkpoint",
    "resume_with_changes",
    "gradient_checkpointing",
    "vram_limit",
    "threads",
];

/// Those of the others that decide which rows come in which micro-batch of a step.
const KEYS_OF_BATCHES: &[&str] = &[
    "per_device_train_batch_size",
    "per_device_train_batch_tokens",
    "gradient_accumulation_steps",
    "max_seq_len",
    "packing",
    "shuffle",
    "group_by_length",
    "data_seed",
];

/// The identity of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// Every key of the configuration that changes the mathematics.
    pub config: BTreeMap<String, Value>,
    /// [`Checkpoint::fingerprint`] of the base model.
    pub base_model_sha256: String,
    /// Of all token ids and labels, in the order of the training rows.
    pub dataset_sha256: String,
}

impl Fingerprint {
    /// # Errors
    /// Those of [`Checkpoint::fingerprint`].
    pub fn new(
        config: &TrainConfig,
        base: &Checkpoint,
        rows: impl Iterator<Item = Example>,
    ) -> Result<Self> {
        Ok(Self {
            config: effective_keys(config)?,
            base_model_sha256: base.fingerprint()?,
            dataset_sha256: rows_sha256(rows),
        })
    }

    /// Whether a step has the micro-batches that it had in the `earlier` part of the run.
    pub fn has_batches_of(&self, earlier: &Self) -> bool {
        let value = |of: &Self, key: &str| of.config.get(key).cloned();
        let mut keys = KEYS_OF_BATCHES.iter();
        keys.all(|key| value(self, key) == value(earlier, key))
            && self.dataset_sha256 == earlier.dataset_sha256
    }

    /// What is different in `self` from the `earlier` part of the run, a sentence each. A key that the earlier part did not
    /// have counts as its default then.
    ///
    /// # Errors
    /// [`Error::Config`] if the defaults cannot be told, which no caller can cause.
    pub fn changes_since(&self, earlier: &Self) -> Result<Vec<String>> {
        let defaults = effective_keys(&TrainConfig::default())?;
        let mut changes = Vec::new();
        for (key, now) in &self.config {
            let before = earlier.config.get(key).or_else(|| defaults.get(key));
            if before != Some(now) {
                let before = before.map_or("unset".into(), Value::to_string);
                changes.push(format!("`{key}` is {now}, it was {before}"));
            }
        }
        let removed = earlier
            .config
            .iter()
            .filter(|(key, _)| !self.config.contains_key(*key));
        changes.extend(removed.map(|(key, before)| format!("`{key}` is gone, it was {before}")));
        for (what, now, before) in [
            (
                "the base model",
                &self.base_model_sha256,
                &earlier.base_model_sha256,
            ),
            (
                "the training rows",
                &self.dataset_sha256,
                &earlier.dataset_sha256,
            ),
        ] {
            if now != before {
                changes.push(format!("{what} changed"));
            }
        }
        Ok(changes)
    }
}

fn effective_keys(config: &TrainConfig) -> Result<BTreeMap<String, Value>> {
    let unreadable = |reason: String| Error::config("config.toml", reason);
    // Where the moments lie changes no result.
    let config = TrainConfig {
        optim: config.optim.resident(),
        ..config.clone()
    };
    let value = serde_json::to_value(config).map_err(|error| unreadable(error.to_string()))?;
    let Value::Object(keys) = value else {
        return Err(unreadable("is not a set of keys".into()));
    };
    let has_effect = |key: &String| !KEYS_WITHOUT_EFFECT.contains(&key.as_str());
    Ok(keys
        .into_iter()
        .filter(|(key, _)| has_effect(key))
        .collect())
}

fn rows_sha256(rows: impl IntoIterator<Item = Example>) -> String {
    let mut hash = Sha256::new();
    for row in rows {
        hash.update((row.input_ids.len() as u64).to_le_bytes());
        row.input_ids
            .iter()
            .for_each(|id| hash.update(id.to_le_bytes()));
        row.labels
            .iter()
            .for_each(|label| hash.update(label.to_le_bytes()));
    }
    hex(&hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::config::KEYS;

    fn fingerprint(config: &TrainConfig) -> Fingerprint {
        Fingerprint {
            config: effective_keys(config).unwrap(),
            base_model_sha256: "b".into(),
            dataset_sha256: "d".into(),
        }
    }

    #[test]
    fn every_key_that_is_named_is_a_key() {
        for name in KEYS_WITHOUT_EFFECT.iter().chain(KEYS_OF_BATCHES) {
            assert!(KEYS.iter().any(|key| key.name == *name), "{name}");
        }
    }

    #[test]
    fn a_change_is_told_with_both_values() {
        let before = fingerprint(&TrainConfig::default());
        let mut now = fingerprint(&TrainConfig {
            learning_rate: 0.5,
            threads: Some(3),
            ..TrainConfig::default()
        });
        let changes = now.changes_since(&before).unwrap();
        assert_eq!(changes, ["`learning_rate` is 0.5, it was 0.0002"]);
        now.base_model_sha256 = "other".into();
        now.dataset_sha256 = "other".into();
        assert_eq!(now.changes_since(&before).unwrap().len(), 3);
        assert_eq!(before.changes_since(&before).unwrap(), [] as [&str; 0]);
    }

    #[test]
    fn a_key_that_is_new_counts_as_its_default() {
        let now = fingerprint(&TrainConfig::default());
        let mut before = now.clone();
        before.config.remove("lora_r").unwrap();
        assert_eq!(now.changes_since(&before).unwrap(), [] as [&str; 0]);
        before.config.insert("gone".into(), Value::from(1));
        assert_eq!(
            now.changes_since(&before).unwrap(),
            ["`gone` is gone, it was 1"]
        );
    }

    #[test]
    fn a_token_and_a_row_border_change_the_digest() {
        let row = |ids: &[u32]| Example {
            input_ids: ids.to_vec(),
            labels: ids.iter().map(|&id| i64::from(id)).collect(),
            line: 1,
        };
        let digests = [
            rows_sha256([row(&[1, 2]), row(&[3])]),
            rows_sha256([row(&[1]), row(&[2, 3])]),
            rows_sha256([row(&[1, 2]), row(&[4])]),
        ];
        assert!(digests[0] != digests[1] && digests[0] != digests[2]);
    }
}
