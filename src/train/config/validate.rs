//! Which values a configuration may have, alone and together: every refusal names the key.

use super::{DEFAULT_EPOCHS, TrainConfig};
use crate::store::TargetModules;
use crate::train::schedule::SchedulerType;
use crate::{Error, Result};

/// The largest rank: more than any layer has columns.
const MAX_RANK: usize = 1 << 16;
/// The most sequences, micro-batches or tokens that are taken together.
pub const MAX_COUNT: usize = 1 << 28;

impl TrainConfig {
    pub(super) fn validate(&self) -> Result<()> {
        self.validate_sizes()?;
        self.validate_targets()?;
        self.validate_optimization()?;
        self.validate_best_model()?;
        self.validate_batches()?;
        self.validate_matrix_dropout()?;
        if self.eval_dataset.is_some() && self.eval_dataset_size.is_some() {
            return Err(Error::config(
                "eval_dataset_size",
                "splits rows off `dataset`; give it or `eval_dataset`, not both",
            ));
        }
        self.device.compute_dtype(self.compute_dtype)?;
        Ok(())
    }

    /// As transformers has it: every checkpoint that may be the best one has an evaluation.
    fn validate_best_model(&self) -> Result<()> {
        let key = match (self.load_best_model_at_end, self.metric_for_best_model) {
            (true, _) => "load_best_model_at_end",
            (false, Some(_)) => "metric_for_best_model",
            (false, None) => return Ok(()),
        };
        if self.eval_dataset.is_none() && self.eval_dataset_size.is_none() {
            return Err(Error::config(
                key,
                "needs evaluation rows; give eval_dataset or eval_dataset_size",
            ));
        }
        match self.eval_steps {
            Some(eval_steps) if self.save_steps.is_multiple_of(eval_steps) => Ok(()),
            eval_steps => {
                let eval_steps = eval_steps.map_or("unset".into(), |steps| steps.to_string());
                let reason = format!(
                    "needs save_steps to be a multiple of eval_steps; they are {} and {eval_steps}",
                    self.save_steps
                );
                Err(Error::config(key, reason))
            }
        }
    }

    fn validate_sizes(&self) -> Result<()> {
        let at_least_one = [
            ("lora_r", self.lora_r),
            (
                "lora_matrix_dropout_instances",
                Some(self.lora_matrix_dropout_instances),
            ),
            ("source_max_len", Some(self.source_max_len)),
            ("target_max_len", self.target_max_len),
            ("max_train_samples", self.max_train_samples),
            ("max_eval_samples", self.max_eval_samples),
            ("eval_dataset_size", self.eval_dataset_size),
            (
                "per_device_train_batch_size",
                Some(self.per_device_train_batch_size),
            ),
            (
                "per_device_train_batch_tokens",
                self.per_device_train_batch_tokens,
            ),
            (
                "per_device_eval_batch_size",
                Some(self.per_device_eval_batch_size),
            ),
            (
                "gradient_accumulation_steps",
                Some(self.gradient_accumulation_steps),
            ),
            ("eval_steps", self.eval_steps),
            ("save_steps", Some(self.save_steps)),
            ("logging_steps", Some(self.logging_steps)),
            ("threads", self.threads),
        ];
        for (key, value) in at_least_one {
            if value == Some(0) {
                return Err(Error::config(key, "must be at least 1, found 0"));
            }
        }
        // More would only be found out by running out of memory, or of time.
        for (key, value, largest) in [
            ("lora_r", self.lora_r, MAX_RANK),
            (
                "lora_matrix_dropout_instances",
                Some(self.lora_matrix_dropout_instances),
                MAX_COUNT,
            ),
            (
                "per_device_train_batch_size",
                Some(self.per_device_train_batch_size),
                MAX_COUNT,
            ),
            (
                "per_device_train_batch_tokens",
                self.per_device_train_batch_tokens,
                MAX_COUNT,
            ),
            (
                "gradient_accumulation_steps",
                Some(self.gradient_accumulation_steps),
                MAX_COUNT,
            ),
            (
                "max_seq_len",
                self.max_seq_len.filter(|_| self.packing),
                MAX_COUNT,
            ),
        ] {
            if let Some(value) = value.filter(|value| *value > largest) {
                let reason = format!("must be at most {largest}, found {value}");
                return Err(Error::config(key, reason));
            }
        }
        if self.max_seq_len.is_some_and(|len| len < 2) {
            return Err(Error::config(
                "max_seq_len",
                "must be at least 2: the first token of a sequence has no loss",
            ));
        }
        if self.max_steps < 1 && self.max_steps != -1 {
            return Err(Error::config(
                "max_steps",
                format!(
                    "must be at least 1, or -1 to let num_train_epochs decide, found {}",
                    self.max_steps
                ),
            ));
        }
        // TOML has no integers beyond i64, and the resolved configuration has to be written as TOML.
        for (key, seed) in [("seed", self.seed), ("data_seed", self.data_seed)] {
            if i64::try_from(seed).is_err() {
                return Err(Error::config(
                    key,
                    format!("must be below 2^63, found {seed}"),
                ));
            }
        }
        Ok(())
    }

    fn validate_targets(&self) -> Result<()> {
        if self.exclude_modules == Some(TargetModules::AllLinear) {
            let reason = "would leave nothing to train; give names or a regex";
            return Err(Error::config("exclude_modules", reason));
        }
        let is_regex = matches!(
            self.lora_target_modules,
            Some(TargetModules::Pattern { .. })
        );
        if is_regex && self.layers_to_transform.is_some() {
            let reason = "needs names in lora_target_modules: a regex tells the layers by itself";
            return Err(Error::config("layers_to_transform", reason));
        }
        Ok(())
    }

    fn validate_batches(&self) -> Result<()> {
        if let Some(weights) = &self.dataset_weights
            && weights.0.len() != self.dataset.0.len()
        {
            let reason = format!(
                "has {} weights for {} data sets",
                weights.0.len(),
                self.dataset.0.len()
            );
            return Err(Error::config("dataset_weights", reason));
        }
        if self.packing && self.max_seq_len.is_none() {
            return Err(Error::config(
                "packing",
                "fills sequences of max_seq_len tokens; give max_seq_len",
            ));
        }
        let has_token_budget = self.per_device_train_batch_tokens.is_some();
        #[rustfmt::skip]
        let conflicts = [
            ("group_by_length", self.group_by_length, "packing", self.packing),
            ("group_by_length", self.group_by_length, "per_device_train_batch_tokens", has_token_budget),
            ("group_by_length", self.group_by_length, "shuffle = false", !self.shuffle),
            ("packing", self.packing, "per_device_train_batch_tokens", has_token_budget),
            ("per_device_train_batch_tokens", has_token_budget, "per_device_train_batch_size", self.per_device_train_batch_size != 1),
        ];
        match conflicts
            .into_iter()
            .find(|(_, one, _, other)| *one && *other)
        {
            Some((key, _, other, _)) => Err(Error::config(
                key,
                format!("orders the rows in another way than {other}; give one of them"),
            )),
            None => Ok(()),
        }
    }

    /// What says more about dropout on matrices is nothing without it; an adapter that the run starts from may bring it.
    fn validate_matrix_dropout(&self) -> Result<()> {
        let is_off = match self.lora_matrix_dropout {
            Some(p) => p == 0.0,
            None => self.adapter.is_none(),
        };
        let instances = self.lora_matrix_dropout_instances > 1;
        let scale = self.lora_matrix_dropout_scale.is_some();
        for (key, is_given) in [
            ("lora_matrix_dropout_instances", instances),
            ("lora_matrix_dropout_scale", scale),
        ] {
            if is_off && is_given {
                let reason = "is for masked matrices; give lora_matrix_dropout";
                return Err(Error::config(key, reason));
            }
        }
        Ok(())
    }

    fn validate_optimization(&self) -> Result<()> {
        let positive = |x: f64| x > 0.0 && x.is_finite();
        let not_negative = |x: f64| x >= 0.0 && x.is_finite();
        let share = |x: f64| (0.0..=1.0).contains(&x);
        let decay = |x: f64| (0.0..1.0).contains(&x);
        let lora_dropout = self.lora_dropout.unwrap_or(0.0);
        let lora_alpha = self.lora_alpha.unwrap_or(1.0);
        let matrix_dropout = self.lora_matrix_dropout.unwrap_or(0.0);
        let lora_plus = self.loraplus_lr_ratio.unwrap_or(1.0);
        let neftune = self.neftune_noise_alpha.unwrap_or(0.0);
        let epochs = self.num_train_epochs.unwrap_or(DEFAULT_EPOCHS);
        let min_lr_rate = self.min_lr_rate.unwrap_or(0.0);
        #[rustfmt::skip]
        let rules = [
            ("learning_rate", self.learning_rate, positive(self.learning_rate), "greater than 0"),
            ("lora_alpha", lora_alpha, positive(lora_alpha), "greater than 0"),
            ("lora_dropout", lora_dropout, decay(lora_dropout), "at least 0 and less than 1"),
            ("lora_matrix_dropout", matrix_dropout, decay(matrix_dropout), "at least 0 and less than 1"),
            ("adam_epsilon", self.adam_epsilon, positive(self.adam_epsilon), "greater than 0"),
            ("num_train_epochs", epochs, positive(epochs), "greater than 0"),
            ("neftune_noise_alpha", neftune, not_negative(neftune), "0 or greater"),
            ("loraplus_lr_ratio", lora_plus, positive(lora_plus), "greater than 0"),
            ("weight_decay", self.weight_decay, not_negative(self.weight_decay), "0 or greater"),
            ("max_grad_norm", self.max_grad_norm, not_negative(self.max_grad_norm), "0 or greater"),
            ("warmup_ratio", self.warmup_ratio, share(self.warmup_ratio), "from 0 to 1"),
            ("min_lr_rate", min_lr_rate, share(min_lr_rate), "from 0 to 1"),
            ("adam_beta1", self.adam_beta1, decay(self.adam_beta1), "at least 0 and less than 1"),
            ("adam_beta2", self.adam_beta2, decay(self.adam_beta2), "at least 0 and less than 1"),
        ];
        for (key, value, holds, range) in rules {
            if !holds {
                return Err(Error::config(
                    key,
                    format!("must be {range}, found {value}"),
                ));
            }
        }
        let has_floor = self.lr_scheduler_type == SchedulerType::CosineWithMinLr;
        match (has_floor, self.min_lr_rate) {
            (true, None) => Err(Error::config(
                "min_lr_rate",
                "is required by lr_scheduler_type cosine_with_min_lr",
            )),
            (false, Some(_)) => Err(Error::config(
                "min_lr_rate",
                "is only used by lr_scheduler_type cosine_with_min_lr",
            )),
            _ => Ok(()),
        }
    }
}
