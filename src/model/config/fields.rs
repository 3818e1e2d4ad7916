//! The fields of a `config.json`, each read once by name; what nobody has read must be known to be harmless.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::{Error, Result};

/// Larger sizes would overflow products of two of them.
const MAX_SIZE: usize = 1 << 31;

/// Fields that say nothing about the forward pass: provenance, special tokens, generation defaults, classifier labels, what
/// other programs put there for themselves, and dropout in pretraining.
#[rustfmt::skip]
const HARMLESS: &[&str] = &[
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "attn_implementation", "auto_map",
    "cache_implementation", "dtype", "initializer_range",
    "max_sequence_length", "name_or_path", "output_attentions", "output_hidden_states", "return_dict", "tokenizer_class",
    "torch_dtype", "torchscript", "transformers_version", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
    "bos_token_id", "decoder_start_token_id", "eos_token_id", "sep_token_id", "unk_token_id",
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_scores", "prefix", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "suppress_tokens", "task_specific_params", "temperature", "top_k", "top_p", "typical_p",
    "finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "tf_legacy_loss",
    "_commit_hash", "_flash_attn_2_enabled", "dual_chunk_attention_config", "is_llama_config", "max_new_tokens",
    "model_max_length", "neftune_noise_alpha", "pretraining_tp", "transformers.js_config",
    "attention_dropout",
];

/// Fields that change the mathematics unless they have this value.
fn neutral(field: &str) -> Option<Value> {
    Some(match field {
        "partial_rotary_factor"
        | "residual_multiplier"
        | "embedding_multiplier"
        | "logits_scaling"
        | "attention_multiplier" => json!(1.0),
        "chunk_size_feed_forward" => json!(0.0),
        "attention_bias"
        | "mlp_bias"
        | "lm_head_bias"
        | "use_sliding_window"
        | "use_mrope"
        | "use_qk_norm"
        | "is_encoder_decoder"
        | "add_cross_attention"
        | "tie_encoder_decoder"
        | "is_decoder"
        | "rope_interleaved"
        | "use_bidirectional_attention" => json!(false),
        "pruned_heads" => json!({}),
        _ => return None,
    })
}

pub(super) struct Fields<'a> {
    object: &'a Map<String, Value>,
    path: PathBuf,
    /// `rope_scaling.` within that object.
    prefix: String,
    /// Whether the object is the config of a model, or of one within it.
    is_model: bool,
    read: BTreeSet<&'static str>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(config: &'a Value, path: &Path) -> Result<Self> {
        let object = config
            .as_object()
            .ok_or_else(|| Error::malformed(path, "is not a JSON object"))?;
        Ok(Self {
            object,
            path: path.to_path_buf(),
            prefix: String::new(),
            is_model: true,
            read: BTreeSet::new(),
        })
    }

    /// The fields of a model's config within this one, under `field`.
    pub(super) fn model(&mut self, field: &'static str) -> Result<Fields<'a>> {
        let object = self.object(field)?;
        let object = object.ok_or_else(|| self.malformed(field, "is missing"))?;
        Ok(Fields {
            is_model: true,
            ..object
        })
    }

    /// Lets these be whatever they are.
    pub(super) fn ignore(&mut self, fields: &[&'static str]) {
        self.read.extend(fields);
    }

    /// The fields of the object under `field`, if it is there and not `null`.
    pub(super) fn object(&mut self, field: &'static str) -> Result<Option<Fields<'a>>> {
        self.read.insert(field);
        match self.object.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Fields {
                object,
                path: self.path.clone(),
                prefix: format!("{}{field}.", self.prefix),
                is_model: false,
                read: BTreeSet::new(),
            })),
            Some(other) => Err(self.malformed(field, format!("{other} is not an object"))),
        }
    }

    /// Whether the field is there and says `null`.
    pub(super) fn is_null(&mut self, field: &'static str) -> bool {
        self.read.insert(field);
        self.object.get(field).is_some_and(Value::is_null)
    }

    /// The field's value, `None` where it is absent or `null`.
    pub(super) fn optional<T: DeserializeOwned>(
        &mut self,
        field: &'static str,
    ) -> Result<Option<T>> {
        self.read.insert(field);
        match self.object.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => T::deserialize(value)
                .map(Some)
                .map_err(|error| self.malformed(field, error.to_string())),
        }
    }

    pub(super) fn required<T: DeserializeOwned>(&mut self, field: &'static str) -> Result<T> {
        self.optional(field)?
            .ok_or_else(|| self.malformed(field, "is missing"))
    }

    /// A dimension: at least 1.
    pub(super) fn optional_size(&mut self, field: &'static str) -> Result<Option<usize>> {
        match self.optional::<usize>(field)? {
            Some(size @ (0 | MAX_SIZE..)) => {
                Err(self.malformed(field, format!("{size} is not a size (1 to {MAX_SIZE})")))
            }
            size => Ok(size),
        }
    }

    pub(super) fn size(&mut self, field: &'static str) -> Result<usize> {
        self.size_or(field, None)
    }

    pub(super) fn size_or(&mut self, field: &'static str, default: Option<usize>) -> Result<usize> {
        let size = self.optional_size(field)?.or(default);
        size.ok_or_else(|| self.malformed(field, "is missing"))
    }

    /// A positive finite number.
    pub(super) fn optional_positive(&mut self, field: &'static str) -> Result<Option<f64>> {
        match self.optional::<f64>(field)? {
            Some(number) if !(number.is_finite() && number > 0.0) => {
                Err(self.malformed(field, format!("{number} is not a positive number")))
            }
            number => Ok(number),
        }
    }

    /// Refuses what nobody has read and what is not known to leave the forward pass alone.
    pub(super) fn finish(&mut self) -> Result<()> {
        if self.is_model {
            self.check_quantization()?;
        }
        for (field, value) in self.object {
            let harmless = value.is_null()
                || self.read.contains(field.as_str())
                || (self.is_model && HARMLESS.contains(&field.as_str()));
            if !harmless && !neutral(field).is_some_and(|neutral| is_same(value, &neutral)) {
                let hint = match neutral(field) {
                    Some(neutral) => format!("only {neutral} is"),
                    None => {
                        "the field is not known and could change what the model computes; if it does not, take it out".into()
                    }
                };
                return Err(self.unsupported(field, hint));
            }
        }
        Ok(())
    }

    /// The class of the model is one of those whose names end in `suffix`.
    pub(super) fn check_architectures(&mut self, suffix: &str) -> Result<()> {
        let names: Vec<String> = self.optional("architectures")?.unwrap_or_default();
        match names.iter().all(|name| name.ends_with(suffix)) {
            true => Ok(()),
            false => Err(self.unsupported("architectures", "only models that write text are")),
        }
    }

    fn check_quantization(&mut self) -> Result<()> {
        let Some(quantization) = self.object("quantization_config")? else {
            return Ok(());
        };
        let field = |name: &str| quantization.object.get(name);
        let is_bitsandbytes = field("quant_method")
            .and_then(Value::as_str)
            .unwrap_or("bitsandbytes")
            == "bitsandbytes";
        let is_4bit = field("load_in_4bit").or_else(|| field("_load_in_4bit"));
        match is_bitsandbytes && is_4bit == Some(&Value::Bool(true)) {
            true => Ok(()),
            false => Err(self.unsupported(
                "quantization_config",
                "only bitsandbytes' 4-bit weights are: take the model in 16 bits and `qlora quantize` it",
            )),
        }
    }

    /// The value of `field` is valid but not understood.
    pub(super) fn unsupported(&self, field: &str, hint: impl Into<String>) -> Error {
        Error::UnsupportedModel {
            path: self.path.clone(),
            field: format!("{}{field}", self.prefix),
            value: self
                .object
                .get(field)
                .map_or_else(|| "null".into(), Value::to_string),
            hint: hint.into(),
        }
    }

    pub(super) fn malformed(&self, field: &str, reason: impl AsRef<str>) -> Error {
        let reason = format!("`{}{field}` {}", self.prefix, reason.as_ref());
        Error::malformed(&self.path, reason)
    }
}

/// Equality that takes 1 and 1.0 for the same number.
fn is_same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}
