//! Keys of qlora.py and of `TrainingArguments` that this build does not have.
//!
//! A value that asks for what happens anyway is accepted, so that a pasted command line works; any other is an error that
//! says so, instead of an option that is swallowed.

use serde_json::Value;

use super::TrainConfig;
use crate::device::ComputeDtype;
use crate::{Error, Result};

/// A key known from elsewhere.
#[derive(Debug, Clone, Copy)]
pub struct ForeignKey {
    pub name: &'static str,
    accepted: Accepted,
    /// Why there is no other value; empty where it is only not built yet.
    hint: &'static str,
}

#[derive(Debug, Clone, Copy)]
enum Accepted {
    /// Whatever is asked for, the result is the same.
    Any,
    /// Compared as text in lower case, numbers by value.
    Only(&'static [&'static str]),
    /// `true` on a device that computes in bf16, `false` on one that does not.
    WhetherBf16,
}

const fn only(
    name: &'static str,
    accepted: &'static [&'static str],
    hint: &'static str,
) -> ForeignKey {
    ForeignKey {
        name,
        accepted: Accepted::Only(accepted),
        hint,
    }
}

const fn any(name: &'static str) -> ForeignKey {
    ForeignKey {
        name,
        accepted: Accepted::Any,
        hint: "",
    }
}

const NOT_YET: &str = "";
const DTYPE: &str = "compute_dtype decides: f32 or bf16 on the CPU, bf16 on CUDA";
const MMLU: &str = "`qlora eval --mmlu DIR` does it after training";
const NO_GENERATION: &str = "training generates no text; use `qlora generate`";

/// The keys of qlora.py and of `TrainingArguments` that are recognised without being supported.
#[rustfmt::skip]
pub const FOREIGN_KEYS: &[ForeignKey] = &[
    only("bits", &["4"], "the base model is always 4-bit"),
    only("lora_modules", &["all"], "use lora_target_modules"),
    only("lora_bias", &["none"], NOT_YET),
    only("full_finetune", &["false"], "only adapters are trained"),
    only("label_smoothing_factor", &["0"], NOT_YET),
    ForeignKey { name: "bf16", accepted: Accepted::WhetherBf16, hint: DTYPE },
    only("fp16", &["false"], DTYPE),
    only("tf32", &["false"], DTYPE),
    only("adam8bit", &["false"], "it is optim that decides; use adamw_8bit"),
    only("do_train", &["true"], "use `qlora eval` for an evaluation alone"),
    only("do_eval", &["true"], "evaluation runs where there are evaluation rows: leave out eval_dataset and eval_dataset_size"),
    only("do_mmlu_eval", &["false"], MMLU),
    only("mmlu_dataset", &[], MMLU),
    only("mmlu_split", &[], MMLU),
    only("mmlu_source_max_len", &[], MMLU),
    only("max_mmlu_samples", &[], MMLU),
    only("do_predict", &["false"], NO_GENERATION),
    only("predict_with_generate", &["false"], NO_GENERATION),
    only("do_sample", &["false"], NO_GENERATION),
    only("top_p", &["1"], NO_GENERATION),
    only("temperature", &["1"], NO_GENERATION),
    only("trust_remote_code", &["false"], "code from a model directory is never run"),
    only("use_auth_token", &["false"], "the token of `hf auth login`, or HF_TOKEN, is used"),
    only("cache_dir", &[], "the cache of huggingface_hub is used; set HF_HOME or HF_HUB_CACHE"),
    only("max_memory_MB", &[], NOT_YET),
    only("save_strategy", &["steps"], "checkpoints are written every save_steps"),
    only("evaluation_strategy", &["steps"], "evaluation runs every eval_steps"),
    only("eval_strategy", &["steps"], "evaluation runs every eval_steps"),
    only("logging_strategy", &["steps"], "every step is logged"),
    only("report_to", &["none"], "metrics go to metrics.jsonl in output_dir"),
    only("remove_unused_columns", &["false"], "other columns are never read"),
    only("ddp_find_unused_parameters", &["false"], "one device is used"),
    only("dataloader_drop_last", &["false"], NOT_YET),
    only("save_safetensors", &["true"], "adapters are always safetensors"),
    only("torch_compile", &["false"], "there is nothing to compile"),
    any("dataloader_num_workers"),
    any("dataloader_pin_memory"),
    any("disable_tqdm"),
    // For generation in evaluation, which qlora.py does with predict_with_generate alone.
    any("max_new_tokens"),
];

/// Names other trainers use for a key of ours, too unlike it to be found by spelling.
pub const SYNONYMS: &[(&str, &str)] = &[
    ("lr", "learning_rate"),
    ("model", "model_name_or_path"),
    ("base_model", "model_name_or_path"),
    ("data", "dataset"),
    ("data_path", "dataset"),
    ("train_file", "dataset"),
    ("eval_file", "eval_dataset"),
    ("validation_file", "eval_dataset"),
    ("epochs", "num_train_epochs"),
    ("num_epochs", "num_train_epochs"),
    ("steps", "max_steps"),
    ("batch_size", "per_device_train_batch_size"),
    ("micro_batch_size", "per_device_train_batch_size"),
    ("grad_accum", "gradient_accumulation_steps"),
    ("sequence_len", "max_seq_len"),
    ("cutoff_len", "max_seq_len"),
    ("datasets", "dataset"),
    ("sample_packing", "packing"),
    ("r", "lora_r"),
    ("rank", "lora_r"),
    ("lora_rank", "lora_r"),
    ("alpha", "lora_alpha"),
    ("target_modules", "lora_target_modules"),
    ("lora_target", "lora_target_modules"),
    ("optimizer", "optim"),
    ("scheduler", "lr_scheduler_type"),
    ("min_lr_ratio", "min_lr_rate"),
    ("clip", "max_grad_norm"),
    ("resume", "resume_from_checkpoint"),
    ("dtype", "compute_dtype"),
];

pub(super) fn find(name: &str) -> Option<&'static ForeignKey> {
    FOREIGN_KEYS.iter().find(|key| key.name == name)
}

pub(super) fn synonym(name: &str) -> Option<&'static str> {
    let found = SYNONYMS.iter().find(|(other, _)| *other == name);
    found.map(|(_, key)| *key)
}

impl ForeignKey {
    /// Accepts a value that asks for what is done anyway under `config`.
    pub(super) fn check(&self, value: &Value, config: &TrainConfig) -> Result<()> {
        let text = match value {
            Value::String(text) => text.to_ascii_lowercase(),
            other => other.to_string(),
        };
        let accepted: &[&str] = match self.accepted {
            Accepted::Any => return Ok(()),
            Accepted::Only(accepted) => accepted,
            Accepted::WhetherBf16 => match config.device.compute_dtype(config.compute_dtype)? {
                ComputeDtype::Bf16 => &["true"],
                ComputeDtype::F32 => &["false"],
            },
        };
        let is_accepted = |accepted: &&str| match (accepted.parse::<f64>(), text.parse::<f64>()) {
            (Ok(a), Ok(b)) => a == b,
            _ => **accepted == text,
        };
        if accepted.iter().any(is_accepted) {
            return Ok(());
        }
        let remedy = match accepted {
            [] => "leave it out".to_string(),
            [only, ..] => format!("leave it out or set it to {only}"),
        };
        let reason = match self.hint {
            "" => format!("{text} is not supported yet; {remedy}"),
            hint => format!("{text} is not supported: {hint}; {remedy}"),
        };
        Err(Error::config(self.name, reason))
    }
}
