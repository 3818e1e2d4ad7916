//! The configuration of a training run: one flat set of keys, the same in a file and on the command line.
//!
//! Names and defaults are those of qlora.py and of `TrainingArguments` in transformers, so that a qlora.py command
//! line can be pasted. A key that nobody reads is an error, never ignored.

mod datasets;
mod file;
mod foreign;
mod lora;
mod preset;
mod values;

use std::path::{Path, PathBuf};

use chrono::NaiveDate;
use serde::{Deserialize, Serialize};

pub use datasets::{DatasetColumns, DatasetList, DatasetWeights};
pub use foreign::{FOREIGN_KEYS, SYNONYMS};
pub(super) use lora::{expect_same_adapter, other_adapter};
pub use preset::Preset;
pub use values::{ByteCount, EvalMetric, OnNonFinite, Optim, Resume, ValueKind};

use crate::data::{DatasetFormat, ExcessLength};
use crate::device::{ComputeDtype, DeviceKind};
use crate::model::InitLoraWeights;
use crate::quant::{DoubleQuant, QuantType, QuantizeOptions};
use crate::store::{MatrixDropoutScale, ModulePatterns, ModulesToSave, TargetModules};
use crate::train::schedule::SchedulerType;
use crate::{Error, Result};

/// One key of [`TrainConfig`], for help texts and for reading values from text.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    pub name: &'static str,
    /// The group the key is listed under.
    pub heading: &'static str,
    pub help: &'static str,
    pub kind: ValueKind,
}

impl Key {
    /// The default as it would be typed, or `None` for a key that is unset by default.
    pub fn default_text(&self) -> Option<String> {
        let defaults = serde_json::to_value(TrainConfig::default()).ok()?;
        match defaults.get(self.name)? {
            serde_json::Value::Null => None,
            serde_json::Value::String(text) if text.is_empty() => None,
            serde_json::Value::Array(items) if items.is_empty() => None,
            serde_json::Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        }
    }

    fn is_unset_by_default(&self) -> bool {
        let defaults = serde_json::to_value(TrainConfig::default());
        defaults.is_ok_and(|defaults| defaults[self.name].is_null())
    }

    /// Whether `text` is a value of this key; ranges and what other keys say are left to [`TrainConfig::load`].
    ///
    /// # Errors
    /// What was expected and what was found.
    pub fn check(&self, text: &str) -> Result<(), String> {
        file::with_key(&TrainConfig::default(), self, text.into()).map(|_| ())
    }
}

/// Declares the struct, its defaults and the table of keys from one list: the doc comment of a field is its help line.
macro_rules! train_config {
    ($( [$heading:literal] $( #[doc = $help:literal] $name:ident: $kind:ty = $default:expr; )* )*) => {
        /// Everything that decides what a training run does.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct TrainConfig {
            $($( #[doc = $help] pub $name: $kind, )*)*
        }

        impl Default for TrainConfig {
            fn default() -> Self {
                Self { $($( $name: $default, )*)* }
            }
        }

        /// Every key of [`TrainConfig`], in the order of its fields.
        pub const KEYS: &[Key] = &[
            $($( Key {
                name: stringify!($name),
                heading: $heading,
                help: $help.trim_ascii(),
                kind: <$kind as values::ConfigValue>::KIND,
            }, )*)*
        ];
    };
}

train_config! {
    ["Model and data"]
    /// Settings of the QLoRA paper's models: guanaco-SIZE as its scripts have them, qlora-all-SIZE, qlora-oasst1-SIZE, qlora-hh-rlhf-SIZE and qlora-longform-SIZE as its table 9 has them, SIZE being 7b, 13b, 33b or 65b; every key that is given wins over them
    preset: Option<Preset> = None;
    /// Hugging Face model directory: 4-bit, or bf16/f16/f32, which is quantized on load (required)
    model_name_or_path: PathBuf = PathBuf::new();
    /// PEFT adapter directory to start from
    adapter: Option<PathBuf> = None;
    /// Run directory: metrics, checkpoints and the final adapter
    output_dir: PathBuf = PathBuf::from("./output");
    /// Training data (required): a file, a directory of them, a name on the Hugging Face hub, or several of these with commas between them
    dataset: DatasetList = DatasetList::default();
    /// How often each data set of several is used in an epoch: 2 twice, 0.5 half of its rows; unset: once
    dataset_weights: Option<DatasetWeights> = None;
    /// Evaluation data, named in the same ways
    eval_dataset: Option<PathBuf> = None;
    /// What a row looks like; unset: recognised from the first row, see README
    dataset_format: Option<DatasetFormat> = None;
    /// Columns that the format calls otherwise: instruction=question,output=answer
    dataset_columns: DatasetColumns = DatasetColumns::default();
    /// Longest source, in tokens
    source_max_len: usize = 1024;
    /// Longest target, in tokens; unset: 256, and 128 for super-natural-instructions
    target_max_len: Option<usize> = None;
    /// Longest sequence, in tokens
    max_seq_len: Option<usize> = None;
    /// What becomes of longer rows: truncate, drop or error
    excess_length_strategy: ExcessLength = ExcessLength::Truncate;
    /// Take the loss on the source as well
    train_on_source: bool = false;
    /// Of a conversation, take the loss on the last answer only
    mask_history: bool = false;
    /// Shuffle the rows anew in each epoch; false: file order
    shuffle: bool = true;
    /// Shuffle so that rows of about one length come together, the longest first
    group_by_length: bool = false;
    /// Lay rows together into sequences of max_seq_len tokens; they do not see each other
    packing: bool = false;
    /// Use only so many rows of each training data set
    max_train_samples: Option<usize> = None;
    /// Use only so many evaluation rows
    max_eval_samples: Option<usize> = None;
    /// Rows split off the training data for evaluation, chosen by data_seed
    eval_dataset_size: Option<usize> = None;
    /// Date that a chat template which prints one is given, such as 2026-11-27; unset: today's, or that of the first start of a run that is continued
    chat_template_date: Option<NaiveDate> = None;
    /// Where tokenized rows are kept for the next run; unset: for large files, qlora/ in the user's cache directory
    dataset_cache_dir: Option<PathBuf> = None;

    ["Quantization and LoRA"]
    /// 4-bit code for weights that are not quantized yet: nf4 or fp4
    quant_type: QuantType = QuantType::Nf4;
    /// Quantize the block scales as well
    double_quant: bool = true;
    /// LoRA rank; unset: 64, or that of `adapter`
    lora_r: Option<usize> = None;
    /// LoRA alpha, the adapter is scaled by lora_alpha / lora_r; unset: 16, or that of `adapter`
    lora_alpha: Option<f64> = None;
    /// Dropout on the adapter's input while training; unset: 0, or that of `adapter`
    lora_dropout: Option<f64> = None;
    /// Dropout on the adapter's matrices while training: input features of A, output features of B; unset: 0, or that of `adapter`
    lora_matrix_dropout: Option<f64> = None;
    /// inverse: scale each masked matrix by 1/(1-p) in training; none: train without, and scale the adapter by (1-p)^2 afterwards; unset: inverse, or that of `adapter`
    lora_matrix_dropout_scale: Option<MatrixDropoutScale> = None;
    /// Instances of each micro-batch with masks of their own, computed together; the loss is their mean
    lora_matrix_dropout_instances: usize = 1;
    /// all-linear (also if unset), a module name, a list of them, or a regex that matches whole module paths
    lora_target_modules: Option<TargetModules> = None;
    /// Names, or a regex, of target modules that get no adapter
    exclude_modules: Option<TargetModules> = None;
    /// Layers that get an adapter, counted from 0; unset: all
    layers_to_transform: Option<Vec<usize>> = None;
    /// Ranks of single modules, by the end of their path or a regex of it: q_proj=8,layers.0.mlp.down_proj=16
    rank_pattern: Option<ModulePatterns<usize>> = None;
    /// The lora_alpha of single modules, in the same way
    alpha_pattern: Option<ModulePatterns<f64>> = None;
    /// Scale the adapter by lora_alpha / sqrt(lora_r); unset: false, or as `adapter`
    use_rslora: Option<bool> = None;
    /// Train the magnitude of each row of the merged weights too (DoRA); unset: false, or as `adapter`
    use_dora: Option<bool> = None;
    /// Modules beside the adapters that are trained whole and saved with them: embed_tokens, lm_head or both; unset: none, or those of `adapter`
    modules_to_save: Option<ModulesToSave> = None;
    /// How a new adapter begins: true or gaussian; pissa, pissa_niter_N, loftq and olora begin with `qlora quantize`. Unset: as the base was made, else true
    init_lora_weights: Option<InitLoraWeights> = None;

    ["Optimization"]
    /// Sequences in a micro-batch
    per_device_train_batch_size: usize = 1;
    /// Tokens in a micro-batch, filled with as many rows as fit, instead of a number of sequences
    per_device_train_batch_tokens: Option<usize> = None;
    /// Taken for the sake of qlora.py; evaluation takes one sequence at a time
    per_device_eval_batch_size: usize = 1;
    /// Where micro-batches of per_device_train_batch_size rows do not fit into memory, take smaller ones, and more of them to a step
    auto_find_batch_size: bool = false;
    /// Micro-batches in an optimizer step
    gradient_accumulation_steps: usize = 16;
    /// Peak learning rate
    learning_rate: f64 = 2e-4;
    /// LoRA+: the learning rate of the adapters' B and magnitudes, as a multiple of that of A
    loraplus_lr_ratio: Option<f64> = None;
    /// constant, constant_with_warmup, linear, cosine, cosine_with_min_lr or inverse_sqrt
    lr_scheduler_type: SchedulerType = SchedulerType::Constant;
    /// Lowest learning rate of cosine_with_min_lr, as a share of learning_rate
    min_lr_rate: Option<f64> = None;
    /// Steps of linear warm-up; 0: warmup_ratio decides
    warmup_steps: usize = 0;
    /// Share of all steps used for warm-up (the constant schedule has none)
    warmup_ratio: f64 = 0.03;
    /// Optimizer steps; -1: num_train_epochs decides, as it does where it alone is given
    max_steps: i64 = 10_000;
    /// Passes over the training data; 3 where max_steps is -1 and this is unset
    num_train_epochs: Option<f64> = None;
    /// Decoupled weight decay
    weight_decay: f64 = 0.0;
    /// Decay of the first moment
    adam_beta1: f64 = 0.9;
    /// Decay of the second moment
    adam_beta2: f64 = 0.999;
    /// Added to the root of the second moment
    adam_epsilon: f64 = 1e-8;
    /// Noise on the token embeddings while training, uniform within alpha / sqrt(tokens x hidden_size): NEFTune
    neftune_noise_alpha: Option<f64> = None;
    /// Clip the gradient to this global norm; 0: never
    max_grad_norm: f64 = 0.3;
    /// AdamW with f32 moments (adamw_torch, adamw_hf, adamw_torch_fused) or 8-bit ones (adamw_8bit, adamw_bnb_8bit); paged_adamw_32bit and paged_adamw_8bit keep them in host memory
    optim: Optim = Optim::AdamwTorch;
    /// What to do about a loss or gradient that is not finite: stop the run, or skip the step
    on_non_finite: OnNonFinite = OnNonFinite::Stop;
    /// Seed of the adapter's initialization, of dropout and of noise
    seed: u64 = 0;
    /// Seed of the data order and of the evaluation split
    data_seed: u64 = 42;

    ["Evaluation and checkpoints"]
    /// Optimizer steps between evaluations; unset: only at the end
    eval_steps: Option<usize> = None;
    /// Optimizer steps between checkpoints
    save_steps: usize = 250;
    /// Checkpoints kept, the oldest are deleted, the newest and the best never; 0: all
    save_total_limit: usize = 40;
    /// Make the final adapter that of the best checkpoint
    load_best_model_at_end: bool = false;
    /// eval_loss, eval_perplexity or eval_token_accuracy; unset: eval_loss with load_best_model_at_end
    metric_for_best_model: Option<EvalMetric> = None;
    /// Whether a greater metric is a better one; unset: only an accuracy
    greater_is_better: Option<bool> = None;
    /// Optimizer steps between printed lines (metrics.jsonl has every step)
    logging_steps: usize = 10;
    /// true: continue from the last checkpoint in output_dir; or the directory of a checkpoint
    resume_from_checkpoint: Resume = Resume::Never;
    /// Continue although the base model, the rows or keys that change the mathematics are other ones
    resume_with_changes: bool = false;

    ["Machine"]
    /// Compute activations again in the backward pass; false: keep them, faster and larger; unset: keep what fits
    gradient_checkpointing: Option<bool> = None;
    /// Memory that the run may take, such as 24GiB; unset: what is free on the device
    vram_limit: Option<ByteCount> = None;
    /// cpu or cuda
    device: DeviceKind = DeviceKind::Cpu;
    /// Type that matrix products take their factors in: f32 (unset) or bf16 on the CPU, bf16 on CUDA
    compute_dtype: Option<ComputeDtype> = None;
    /// CPU threads; unset: all cores
    threads: Option<usize> = None;
}

/// Epochs where neither `max_steps` nor `num_train_epochs` says anything, as in transformers.
const DEFAULT_EPOCHS: f64 = 3.0;

/// The largest rank: more than any layer has columns.
const MAX_RANK: usize = 1 << 16;
/// The most sequences, micro-batches or tokens that are taken together.
pub const MAX_COUNT: usize = 1 << 28;

impl TrainConfig {
    /// Reads a configuration from a file (TOML, YAML or JSON by extension) and from `key = text` overrides, which win.
    ///
    /// # Errors
    /// [`Error::UnknownKey`] with the nearest name; [`Error::Config`] naming the key of a value that cannot be used, of
    /// a key of qlora.py that this build does not support, or of a required key that is missing; [`Error::Malformed`]
    /// and [`Error::Io`] for the file.
    pub fn load(path: Option<&Path>, overrides: &[(String, String)]) -> Result<Self> {
        let config = Self::load_partial(path, overrides)?;
        for (key, is_missing) in [
            (
                "model_name_or_path",
                config.model_name_or_path.as_os_str().is_empty(),
            ),
            ("dataset", config.dataset.0.is_empty()),
        ] {
            if is_missing {
                let for_any = config.preset.filter(|preset| preset.is_for_any_dataset());
                let reason = match for_any {
                    Some(preset) if key == "dataset" => {
                        format!(
                            "is required: {preset} is for any data set; name one, as in --{key} alpaca"
                        )
                    }
                    _ => format!("is required; give it in the config file or as --{key} PATH"),
                };
                return Err(Error::config(key, reason));
            }
        }
        Ok(config)
    }

    /// [`TrainConfig::load`] without the demand for a model and a data set, for runs on synthetic weights.
    ///
    /// # Errors
    /// As [`TrainConfig::load`], but for missing keys.
    pub fn load_partial(path: Option<&Path>, overrides: &[(String, String)]) -> Result<Self> {
        let mut given = match path {
            Some(path) => file::read(path)?,
            None => serde_json::Map::new(),
        };
        for (key, text) in overrides {
            given.insert(key.clone(), serde_json::Value::String(text.clone()));
        }
        let config = file::resolve(given)?;
        config.validate()?;
        Ok(config)
    }

    /// The configuration as TOML with every key that has a value: the `config.toml` of a run directory.
    ///
    /// # Errors
    /// [`Error::Config`] if a value cannot be written as TOML.
    pub fn resolved_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::config("config.toml", e.to_string()))
    }

    /// Tokens of the longest sequence: `max_seq_len`, or what source and target may have together.
    pub fn longest_sequence(&self) -> usize {
        let format = self.dataset_format.unwrap_or(DatasetFormat::Alpaca);
        let target_max_len = self
            .target_max_len
            .unwrap_or(format.default_target_max_len());
        self.max_seq_len
            .unwrap_or(self.source_max_len + target_max_len)
    }

    /// Tokens of the sequences that rows are laid together into; `None` where they are not.
    pub fn packed_tokens(&self) -> Option<usize> {
        match self.packing {
            true => self.max_seq_len,
            false => self.per_device_train_batch_tokens,
        }
    }

    /// How weights that are not in 4 bits yet are quantized.
    pub fn quantize_options(&self) -> QuantizeOptions {
        QuantizeOptions {
            quant_type: self.quant_type,
            double_quant: if self.double_quant {
                DoubleQuant::Yes
            } else {
                DoubleQuant::No
            },
            ..QuantizeOptions::default()
        }
    }

    /// Passes over the data, or `None` where `max_steps` decides.
    pub fn epochs(&self) -> Option<f64> {
        (self.max_steps < 0).then(|| self.num_train_epochs.unwrap_or(DEFAULT_EPOCHS))
    }

    fn validate(&self) -> Result<()> {
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
