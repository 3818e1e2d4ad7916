//! The files of llama.cpp: a model, or a LoRA adapter for one, as GGUF.
//!
//! ```text
//! architecture (what llama.cpp computes)   tensor_names   tensor_type (f32, f16, bf16, Q8_0; k_quants)   writer (the file format)
//! vocabulary (tokenizer.json -> tokenizer.ggml.*): byte_level, sentencepiece   hyperparameters   model   adapter
//! reader (both again)   difference (of what a file says from what it should)
//! ```
//!
//! Source: `docs/gguf.md` of ggml; `convert_hf_to_gguf.py` and `convert_lora_to_gguf.py` of llama.cpp.

mod adapter;
mod architecture;
mod byte_level;
mod difference;
mod hyperparameters;
mod k_quants;
mod model;
mod reader;
mod sentencepiece;
mod tensor_names;
mod tensor_type;
mod tokenizer_file;
mod vocabulary;
mod writer;

use std::path::{Path, PathBuf};

use serde_json::Value;

pub use adapter::write_gguf_adapter;
pub use architecture::config_in_llama_cpp;
pub use model::write_gguf_model;
pub use reader::{GgufModel, is_gguf_adapter, read_gguf_adapter};
pub use tensor_type::GgufType;

use crate::Error;
use crate::store::text_config;

/// The model that a file is of, or that its adapter is for.
#[derive(Debug, Clone, Copy)]
pub struct GgufBase<'a> {
    /// `config.json`.
    pub config: &'a Value,
    /// Where that stands, with the tokenizer, which only a model's file needs.
    pub dir: &'a Path,
    /// What llama.cpp shows it as.
    pub name: &'a str,
}

impl GgufBase<'_> {
    fn config_path(&self) -> PathBuf {
        self.dir.join("config.json")
    }

    /// Whether the language model is one part of a model.
    fn is_part(&self) -> bool {
        !std::ptr::eq(text_config(self.config), self.config)
    }

    /// A field of the language model's config, or else of that of the model which it is one part of; `null` if it is in
    /// neither.
    fn field(&self, field: &str) -> &Value {
        match &text_config(self.config)[field] {
            Value::Null => &self.config[field],
            value => value,
        }
    }

    /// The first of the fields that the config has, or the last.
    fn present<const N: usize>(&self, fields: [&'static str; N]) -> &'static str {
        let mut present = fields
            .into_iter()
            .filter(|field| !self.field(field).is_null());
        present.next().unwrap_or(fields[N - 1])
    }

    /// The field with the rotary parameters; the older one counts where the config has both.
    fn rope_field(&self) -> &'static str {
        self.present(["rope_scaling", "rope_parameters"])
    }

    /// A field of the config that llama.cpp cannot follow.
    fn unsupported(&self, field: &str, hint: &str) -> Error {
        Error::UnsupportedModel {
            path: self.config_path(),
            field: field.into(),
            value: self.field(field).to_string(),
            hint: hint.into(),
        }
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufReport {
    pub tensors: usize,
    /// Of the file.
    pub written_bytes: u64,
    /// Where llama.cpp will do something else than this model was trained to do: a sentence each.
    pub notes: Vec<String>,
}
