//! Settings under one name: those with which the guanaco models of the QLoRA paper were trained.
//!
//! Source: the scripts of artidoro/qlora (July 2023) and the defaults of its qlora.py.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// A set of values for keys that are not given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Preset {
    #[serde(rename = "guanaco-7b")]
    Guanaco7b,
    #[serde(rename = "guanaco-13b")]
    Guanaco13b,
    #[serde(rename = "guanaco-33b")]
    Guanaco33b,
    #[serde(rename = "guanaco-65b")]
    Guanaco65b,
}

impl Preset {
    /// Its keys and values.
    pub(super) fn values(self) -> Map<String, Value> {
        let (model, learning_rate, lora_dropout, save_steps) = match self {
            Self::Guanaco7b => ("huggyllama/llama-7b", 2e-4, 0.1, 500),
            Self::Guanaco13b => ("huggyllama/llama-13b", 2e-4, 0.05, 500),
            Self::Guanaco33b => ("huggyllama/llama-30b", 1e-4, 0.05, 200),
            Self::Guanaco65b => ("huggyllama/llama-65b", 1e-4, 0.05, 200),
        };
        let values = json!({
            "model_name_or_path": model,
            "dataset": ["oasst1"],
            "dataset_format": "oasst1",
            "source_max_len": 16,
            "target_max_len": 512,
            "group_by_length": true,
            "eval_dataset_size": 1024,
            "max_eval_samples": 1000,
            "quant_type": "nf4",
            "double_quant": true,
            "lora_r": 64,
            "lora_alpha": 16.0,
            "lora_dropout": lora_dropout,
            "lora_target_modules": ["all-linear"],
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 16,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.03,
            "max_steps": 1875,
            "weight_decay": 0.0,
            "adam_beta2": 0.999,
            "max_grad_norm": 0.3,
            "optim": "paged_adamw_32bit",
            "seed": 0,
            "data_seed": 42,
            "eval_steps": 187,
            "save_steps": save_steps,
            "save_total_limit": 40,
            "logging_steps": 10,
        });
        match values {
            Value::Object(values) => values,
            _ => unreachable!("written as an object above"),
        }
    }
}
