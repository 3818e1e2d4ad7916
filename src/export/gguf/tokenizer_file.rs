//! `tokenizer.json` as far as llama.cpp needs it: a BPE with its tokens and merges, and the parts around it as JSON.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::{Error, Result};

/// What to do with a tokenizer that is not known here.
const OTHER_WAY: &str = "its equal in llama.cpp is not known here; export the merged model as safetensors and convert that \
                         with llama.cpp's convert_hf_to_gguf.py";

pub(super) struct TokenizerFile {
    pub path: PathBuf,
    pub added_tokens: Vec<AddedToken>,
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    pub bpe: Bpe,
}

#[derive(Deserialize)]
pub(super) struct AddedToken {
    pub id: u32,
    pub content: String,
    #[serde(default)]
    pub special: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    single_word: bool,
}

impl AddedToken {
    /// Whether what stands beside it decides if it is one, or belongs to it.
    pub(super) fn minds_its_neighbours(&self) -> bool {
        self.lstrip || self.rstrip || self.single_word
    }
}

#[derive(Deserialize)]
pub(super) struct Bpe {
    pub vocab: HashMap<String, u32>,
    pub merges: Vec<Merge>,
    pub unk_token: Option<String>,
    #[serde(default)]
    pub byte_fallback: bool,
    #[serde(default)]
    pub ignore_merges: bool,
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

/// Two tokens that become one; old files have them as one text with a space between.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Merge {
    Pair(String, String),
    Text(String),
}

impl Merge {
    pub(super) fn pair(&self) -> Option<(&str, &str)> {
        match self {
            Self::Pair(left, right) => Some((left, right)),
            Self::Text(text) => text.split_once(' '),
        }
    }
}

#[derive(Deserialize)]
struct Parts {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    model: Value,
}

impl TokenizerFile {
    /// # Errors
    /// [`Error::UnsupportedModel`] for another model than BPE, or a BPE with parts that llama.cpp does not have.
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let malformed = |error: serde_json::Error| Error::malformed(&path, error.to_string());
        let parts: Parts = serde_json::from_slice(&bytes).map_err(malformed)?;
        let kind = parts.model["type"].as_str();
        let is_bpe = kind == Some("BPE") || (kind.is_none() && parts.model["merges"].is_array());
        if !is_bpe {
            return Err(unsupported(&path, "model.type", &parts.model["type"]));
        }
        let bpe: Bpe = serde_json::from_value(parts.model).map_err(malformed)?;
        let is_empty = |affix: &Option<String>| affix.as_deref().unwrap_or_default().is_empty();
        for (field, is_plain) in [
            ("model.dropout", bpe.dropout.unwrap_or(0.0) == 0.0),
            (
                "model.continuing_subword_prefix",
                is_empty(&bpe.continuing_subword_prefix),
            ),
            (
                "model.end_of_word_suffix",
                is_empty(&bpe.end_of_word_suffix),
            ),
        ] {
            if !is_plain {
                return Err(unsupported(&path, field, &Value::from("set")));
            }
        }
        Ok(Self {
            path,
            added_tokens: parts.added_tokens,
            normalizer: parts.normalizer,
            pre_tokenizer: parts.pre_tokenizer,
            bpe,
        })
    }

    pub(super) fn unsupported(&self, field: &str, value: &Value) -> Error {
        unsupported(&self.path, field, value)
    }

    /// The merges as pairs, in their order.
    pub(super) fn merges(&self) -> Result<Vec<(&str, &str)>> {
        let merges = self.bpe.merges.iter();
        let pairs = merges.map(|merge| {
            let pair = merge
                .pair()
                .filter(|(left, right)| !left.is_empty() && !right.is_empty());
            pair.ok_or_else(|| Error::malformed(&self.path, "a merge is not one of two tokens"))
        });
        pairs.collect()
    }
}

fn unsupported(path: &Path, field: &str, value: &Value) -> Error {
    Error::UnsupportedModel {
        path: path.to_path_buf(),
        field: field.into(),
        value: value.to_string(),
        hint: OTHER_WAY.into(),
    }
}
