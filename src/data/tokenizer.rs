//! The model's tokenizer, read from a Hugging Face model directory with all that says how it is used: special tokens,
//! whether a bos or eos is added, the chat template, the ids that end a generation.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

use chrono::NaiveDate;
use serde_json::{Map, Value};
use tokenizers::{AddedToken, PostProcessorWrapper};

use super::ChatTemplate;
use super::added_tokens::add_tokens;
use super::template_files::{TemplateSource, chat_template};
use crate::{Error, Result};

const TOKENIZER_FILE: &str = "tokenizer.json";
/// What to do about a model that has none.
pub(super) const SENTENCEPIECE_ALONE: &str = "a SentencePiece model alone is not read; write a tokenizer.json beside it with Python: \
    `AutoTokenizer.from_pretrained(DIR, use_fast=True).save_pretrained(DIR)` (transformers)";

/// The special tokens by the names under which transformers keeps them and hands them to chat templates.
const SPECIAL_TOKEN_NAMES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// A fast tokenizer (`tokenizer.json`) with its special tokens and its chat template.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    special_tokens: Map<String, Value>,
    eos_token_ids: Vec<u32>,
    add_bos_token: bool,
    add_eos_token: bool,
    chat_template: Option<ChatTemplate>,
    file_hash: blake3::Hash,
}

/// Token ids with the bytes of the text that each covers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoding {
    pub ids: Vec<u32>,
    offsets: Vec<(usize, usize)>,
}

impl Encoding {
    /// Which tokens lie in one of the byte ranges `spans`, which are in their order: from the first to the last token that
    /// overlaps it.
    pub fn mask(&self, spans: &[Range<usize>]) -> Vec<bool> {
        let mut mask = vec![false; self.ids.len()];
        let mut token = 0;
        for span in spans {
            let mut first_and_last = None;
            while let Some(&(start, end)) = self
                .offsets
                .get(token)
                .filter(|(start, _)| *start < span.end)
            {
                if start < end && span.start < end {
                    first_and_last =
                        Some((first_and_last.map_or(token, |(first, _)| first), token));
                }
                token += 1;
            }
            if let Some((first, last)) = first_and_last {
                mask[first..=last].fill(true);
                // A token that reaches into the next span belongs to both.
                token = last;
            }
        }
        mask
    }
}

impl Tokenizer {
    /// The tokenizer of `model_dir` as [`Tokenizer::from_dir`] reads it; `None` if there is no `tokenizer.json`, which is
    /// enough for rows of token ids.
    ///
    /// # Errors
    /// Those of a tokenizer that cannot be read.
    pub fn find(model_dir: impl AsRef<Path>) -> Result<Option<Self>> {
        let dir = model_dir.as_ref();
        let has_one = dir.join(TOKENIZER_FILE).exists();
        has_one.then(|| Self::from_dir(dir)).transpose()
    }

    /// Reads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json` and the
    /// chat templates (`chat_template.jinja`, `additional_chat_templates`, `chat_template.json` or the key of the config) of
    /// `model_dir`.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no tokenizer; [`Error::Malformed`] if a file cannot be understood, if the files give a
    /// token different ids, or if there is only a SentencePiece `tokenizer.model`, with how to convert it.
    pub fn from_dir(model_dir: impl AsRef<Path>) -> Result<Self> {
        let dir = model_dir.as_ref();
        let path = dir.join(TOKENIZER_FILE);
        let sentencepiece = dir.join("tokenizer.model");
        if !path.exists() && sentencepiece.exists() {
            return Err(Error::malformed(sentencepiece, SENTENCEPIECE_ALONE));
        }
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let mut inner =
            plain_tokenizer(&bytes).map_err(|e| Error::malformed(&path, e.to_string()))?;

        let config_path = dir.join("tokenizer_config.json");
        let config = read_object(&config_path)?.unwrap_or_default();
        let special_tokens = special_tokens(dir, &config_path, &config)?;
        add_tokens(&mut inner, &special_tokens, (&config_path, &config))?;
        let chat_template = chat_template(dir, &config, |TemplateSource { path, source }| {
            let added = inner.get_added_tokens_decoder();
            let markers = added.values().map(|token| token.content.clone()).collect();
            ChatTemplate::new(path, source, special_tokens.clone(), markers)
        })?;
        let flag = |name: &str| config.get(name).and_then(Value::as_bool).unwrap_or(false);
        let mut tokenizer = Self {
            add_bos_token: flag("add_bos_token"),
            add_eos_token: flag("add_eos_token"),
            inner,
            path,
            special_tokens,
            eos_token_ids: Vec::new(),
            file_hash: blake3::hash(&bytes),
            chat_template,
        };
        tokenizer.eos_token_ids = generation_eos_ids(dir)?;
        if let Some(id) = tokenizer.eos_token_id()
            && !tokenizer.eos_token_ids.contains(&id)
        {
            tokenizer.eos_token_ids.push(id);
        }
        Ok(tokenizer)
    }

    /// Token ids of `text` without special tokens around it; special tokens spelled in the text become their ids.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = without_panic(|| self.inner.encode_fast(text, false));
        let encoding = encoding.map_err(|e| self.cannot_encode(&e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// As [`encode`](Self::encode), with the bytes that each token covers.
    pub fn encode_with_offsets(&self, text: &str) -> Result<Encoding> {
        let encoding = without_panic(|| self.inner.encode(text, false));
        let encoding = encoding.map_err(|e| self.cannot_encode(&e))?;
        Ok(Encoding {
            ids: encoding.get_ids().to_vec(),
            offsets: encoding.get_offsets().to_vec(),
        })
    }

    /// Token ids of `text` with the special tokens that the tokenizer puts around a text (bos for most models).
    pub fn encode_with_specials(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = without_panic(|| self.inner.encode_fast(text, true));
        let encoding = encoding.map_err(|e| self.cannot_encode(&e))?;
        let mut ids = encoding.get_ids().to_vec();
        if let (true, Some(bos)) = (self.add_bos_token, self.bos_token_id())
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        if let (true, Some(eos)) = (self.add_eos_token, self.eos_token_id())
            && ids.last() != Some(&eos)
        {
            ids.push(eos);
        }
        Ok(ids)
    }

    /// The text of `ids`; `special` says what becomes of special tokens.
    pub fn decode(&self, ids: &[u32], special: SpecialTokens) -> Result<String> {
        without_panic(|| self.inner.decode(ids, special == SpecialTokens::Skip))
            .map_err(|e| Error::malformed(&self.path, format!("cannot decode: {e}")))
    }

    /// One token as a person reads it: its text with its leading space, or its raw name where it is part of a character.
    pub fn token_text(&self, id: u32) -> String {
        let Some(raw) = self.inner.id_to_token(id) else {
            return format!("<unknown {id}>");
        };
        match without_panic(|| self.inner.decode(&[id], false)) {
            Ok(text) if !text.contains('\u{FFFD}') && !text.is_empty() => {
                let lost_space = raw.starts_with('▁') && !text.starts_with(' ');
                if lost_space { format!(" {text}") } else { text }
            }
            _ => raw,
        }
    }

    /// Whether `id` is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner
            .get_added_vocabulary()
            .get_added_tokens_decoder()
            .get(&id)
            .is_some_and(|token| token.special)
    }

    /// The id of a token by its exact name.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Tokens in all, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    pub fn bos_token(&self) -> Option<&str> {
        self.special_token("bos_token")
    }

    pub fn eos_token(&self) -> Option<&str> {
        self.special_token("eos_token")
    }

    pub fn bos_token_id(&self) -> Option<u32> {
        self.token_to_id(self.bos_token()?)
    }

    pub fn eos_token_id(&self) -> Option<u32> {
        self.token_to_id(self.eos_token()?)
    }

    pub fn pad_token_id(&self) -> Option<u32> {
        self.token_to_id(self.special_token("pad_token")?)
    }

    /// The ids that end a generation: those of `generation_config.json` and the tokenizer's eos.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// The ids that end an answer in a chat: [`eos_token_ids`](Self::eos_token_ids), and the special token that the chat
    /// template ends one with, which a model is trained to write whether or not its config names it.
    pub fn answer_end_ids(&self) -> Result<Vec<u32>> {
        let mut ids = self.eos_token_ids.clone();
        // A template may refuse this conversation and take others.
        let end = self.chat_template().map(ChatTemplate::answer_end);
        if let Some(Ok(end)) = end {
            let mut special = self.encode(&end)?.into_iter();
            let special = special.find(|&id| self.is_special(id));
            ids.extend(special.filter(|id| !self.eos_token_ids.contains(id)));
        }
        Ok(ids)
    }

    /// Whether the model ends its text with `id`: one of [`eos_token_ids`](Self::eos_token_ids), or another special token,
    /// such as the end of a turn.
    pub fn is_end(&self, id: u32) -> bool {
        self.eos_token_ids.contains(&id) || self.is_special(id)
    }

    /// Whether padding cannot be told from the end of a text.
    pub fn pads_with_eos(&self) -> bool {
        self.pad_token_id().is_some() && self.pad_token_id() == self.eos_token_id()
    }

    /// A hash of all that decides which tokens a row becomes: of the vocabulary, the added and special tokens, and the
    /// chat templates with the date that they print, if they print one.
    pub(super) fn fingerprint(&self) -> [u8; 32] {
        let template = self.chat_template.as_ref();
        let added: BTreeMap<u32, AddedToken> =
            self.inner.get_added_tokens_decoder().into_iter().collect();
        let parts = serde_json::json!([
            self.file_hash.to_hex().as_str(),
            added,
            self.special_tokens,
            self.eos_token_ids,
            template.map(|template| template.sources().collect::<Vec<_>>()),
            template.and_then(ChatTemplate::date),
        ]);
        *blake3::hash(parts.to_string().as_bytes()).as_bytes()
    }

    /// `tokenizer.json`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The chat template of the model, if it has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// Has a chat template that prints the date print this one.
    pub fn set_date(&mut self, date: NaiveDate) {
        if let Some(template) = &mut self.chat_template {
            template.set_date(date);
        }
    }

    fn cannot_encode(&self, error: &tokenizers::Error) -> Error {
        Error::malformed(&self.path, format!("cannot encode: {error}"))
    }

    fn special_token(&self, name: &str) -> Option<&str> {
        self.special_tokens.get(name)?.as_str()
    }
}

/// What [`Tokenizer::decode`] does with special tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialTokens {
    Keep,
    Skip,
}

/// The parts of a `tokenizer.json` beside the vocabulary.
#[derive(serde::Deserialize)]
#[allow(dead_code, reason = "read for the errors alone")]
struct Parts {
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    decoder: Option<Value>,
}

/// What a call into the tokenizers crate gives; its panics (0.23: a `Strip` decoder that takes more characters than a token
/// has, merges of unknown tokens) are errors, as the file decides over them.
pub(super) fn without_panic<T>(
    call: impl FnOnce() -> tokenizers::Result<T>,
) -> tokenizers::Result<T> {
    std::panic::catch_unwind(AssertUnwindSafe(call))
        .unwrap_or_else(|_| Err("the tokenizers crate cannot work with this file".into()))
}

/// The tokenizer without the truncation and padding that may be saved in its file, as rows are cut and laid out here, and
/// without trimmed offsets, as white space at the start of an answer is a part of it.
fn plain_tokenizer(bytes: &[u8]) -> tokenizers::Result<tokenizers::Tokenizer> {
    // The crate panics (0.23) where a part that is an object of many kinds is not even JSON.
    let _: Parts = serde_json::from_slice(bytes)?;
    let mut inner = without_panic(|| tokenizers::Tokenizer::from_bytes(bytes))?;
    inner.with_truncation(None)?;
    inner.with_padding(None);
    if let Some(processor) = inner.get_post_processor() {
        let mut processor = processor.clone();
        keep_white_space(&mut processor);
        inner.with_post_processor(Some(processor));
    }
    Ok(inner)
}

/// Leaves the white space of tokens in their offsets.
fn keep_white_space(processor: &mut PostProcessorWrapper) {
    match processor {
        PostProcessorWrapper::ByteLevel(processor) => processor.trim_offsets = false,
        PostProcessorWrapper::Roberta(processor) => processor.trim_offsets = false,
        PostProcessorWrapper::Sequence(processors) => {
            processors.as_mut().iter_mut().for_each(keep_white_space);
        }
        PostProcessorWrapper::Bert(_) | PostProcessorWrapper::Template(_) => {}
    }
}

pub(super) fn read_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(object)) => Ok(Some(object)),
        Ok(_) => Err(Error::malformed(path, "expected a JSON object")),
        Err(e) => Err(Error::malformed(path, e.to_string())),
    }
}

/// Special tokens by name: those of `tokenizer_config.json`, then those of `special_tokens_map.json`.
fn special_tokens(
    dir: &Path,
    config_path: &Path,
    config: &Map<String, Value>,
) -> Result<Map<String, Value>> {
    let map_path = dir.join("special_tokens_map.json");
    let map = read_object(&map_path)?.unwrap_or_default();
    let mut tokens = Map::new();
    for name in SPECIAL_TOKEN_NAMES {
        for (path, source) in [(config_path, config), (&map_path, &map)] {
            if let Some(token) = token_content(path, name, source.get(name))? {
                tokens.insert(name.into(), token.into());
                break;
            }
        }
    }
    Ok(tokens)
}

/// A token is written as a string or as an object with `content`; an empty one is none.
pub(super) fn token_content(
    path: &Path,
    name: &str,
    value: Option<&Value>,
) -> Result<Option<String>> {
    let value = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(value) => value,
    };
    match value.as_str().or_else(|| value.get("content")?.as_str()) {
        Some(token) => Ok(Some(token.to_string()).filter(|token| !token.is_empty())),
        None => Err(Error::malformed(
            path,
            format!("`{name}` is {value}, expected a string or an object with `content`"),
        )),
    }
}

fn generation_eos_ids(dir: &Path) -> Result<Vec<u32>> {
    let path = dir.join("generation_config.json");
    let config = read_object(&path)?.unwrap_or_default();
    let ids = match config.get("eos_token_id") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.clone(),
        Some(id) => vec![id.clone()],
    };
    ids.iter()
        .map(|id| {
            id.as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| {
                    Error::malformed(&path, format!("`eos_token_id` {id} is not a token id"))
                })
        })
        .collect()
}
