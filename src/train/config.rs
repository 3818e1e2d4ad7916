//! The configuration of a training run: one flat set of keys, the same in a file and on the command line.
//!
//! Names and defaults are those of qlora.py and of `TrainingArguments` in transformers, so that a qlora.py command
//! line can be pasted. A key that nobody reads is an error, never ignored.

mod datasets;
mod file;
mod foreign;
mod lora;
mod preset;
mod validate;
mod values;

use std::path::{Path, PathBuf};

use chrono::NaiveDate;
use serde::{Deserialize, Serialize};

pub use datasets::{DatasetColumns, DatasetList, DatasetWeights};
pub use foreign::{FOREIGN_KEYS, SYNONYMS};
pub(super) use lora::{expect_same_adapter, other_adapter};
pub use preset::Preset;
pub use validate::MAX_COUNT;
pub use values::{ByteCount, EvalMetric, OnNonFinite, Optim, Resume, ValueKind};

use crate::data::{DatasetFormat, ExcessLength};
use crate::device::{ComputeDtype, DeviceKind};
use crate::model::InitLoraWeights;
use crate::quant::{DoubleQuant, QuantType, QuantizeOptions};
use crate::store::{Checkpoint, MatrixDropoutScale, ModulePatterns, ModulesToSave, TargetModules};
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
    /// Hugging Face model, its directory or its name on the hub: 4-bit, or bf16/f16/f32, which is quantized on load (required)
    model_name_or_path: PathBuf = PathBuf::new();
    /// PEFT adapter to start from, its directory or its name on the hub
    adapter: Option<PathBuf> = None;
    /// Run directory: metrics, checkpoints and the final adapter
    output_dir: PathBuf = PathBuf::from("./output");
    /// Training data (required): a file, a directory of them, a name on the Hugging Face hub, or several of these with commas between them
    dataset: DatasetList = DatasetList::default();
    /// How often each data set of several is used in an epoch: 2 twice, 0.5 half of its rows; unset: once
    dataset_weights: Option<DatasetWeights> = None;
    /// Evaluation data, named in the same ways
    eval_dataset: Option<PathBuf> = None;
    /// What a row looks like; unset: recognised from the first row, see docs/data.md
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

    /// How the weights of `base` are quantized on load, if it is not in 4 bits. What a 4-bit model has in 16 bits, as
    /// `llm_int8_skip_modules` says, stays so.
    pub fn quantization_of(&self, base: &Checkpoint) -> Option<QuantizeOptions> {
        (!base.is_quantized()).then(|| self.quantize_options())
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
}
