//! The tokenizer of a model as llama.cpp has it: `tokenizer.ggml.*` and `tokenizer.chat_template`.
//!
//! Source: `get_vocab_base` and `SpecialVocab` of llama.cpp's converter, `src/llama-vocab.cpp`.

use std::collections::HashSet;

use serde_json::Value;

use super::tokenizer_file::TokenizerFile;
use super::writer::{self, Metadata};
use super::{GgufBase, byte_level, sentencepiece};
use crate::data::{ChatTemplate, Tokenizer};
use crate::{Error, Result};

/// The key with the name of the way that a text is split.
pub(super) const PRE_TOKENIZER: &str = "tokenizer.ggml.pre";

/// What llama.cpp takes a token for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenType {
    Normal = 1,
    Unknown = 2,
    /// Read in a text only where special tokens are asked for, and not printed.
    Control = 3,
    /// Read in any text.
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

/// The tokens that llama.cpp ends a text with, whatever the file says of them.
const KNOWN_ENDS: [&str; 22] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// The tokens by their ids, `[V]` each.
pub(super) struct Tokens {
    pub texts: Vec<String>,
    pub types: Vec<TokenType>,
}

impl Tokens {
    /// The texts of those that a text is made of.
    pub(super) fn normal_texts(&self) -> impl Iterator<Item = &str> + Clone {
        let all = self.texts.iter().zip(&self.types);
        all.filter(|(_, kind)| **kind == TokenType::Normal)
            .map(|(text, _)| text.as_str())
    }

    fn of(file: &TokenizerFile, vocab_size: usize) -> Result<Self> {
        let mut tokens = Self {
            texts: (0..vocab_size).map(|id| format!("[PAD{id}]")).collect(),
            types: vec![TokenType::Unused; vocab_size],
        };
        for (text, id) in &file.bpe.vocab {
            tokens.put(*id, text, TokenType::Normal, file)?;
        }
        for added in &file.added_tokens {
            let is_control = added.special || looks_special(&added.content);
            match is_control {
                true => tokens.put(added.id, &added.content, TokenType::Control, file)?,
                false => {
                    let text = added.content.replace('▁', " ");
                    tokens.put(added.id, &text, TokenType::UserDefined, file)?;
                }
            }
        }
        let mut seen = HashSet::new();
        match tokens.texts.iter().find(|text| !seen.insert(text.as_str())) {
            None => Ok(tokens),
            Some(text) => {
                let reason = format!("two tokens are {text:?}, which llama.cpp does not read");
                Err(Error::malformed(&file.path, reason))
            }
        }
    }

    fn put(&mut self, id: u32, text: &str, kind: TokenType, file: &TokenizerFile) -> Result<()> {
        let vocab_size = self.texts.len();
        let Some(place) = self.texts.get_mut(id as usize) else {
            let reason = format!(
                "token {text:?} has id {id}, but the model's embedding has {vocab_size} rows; llama.cpp wants one for each token"
            );
            return Err(Error::malformed(&file.path, reason));
        };
        *place = text.into();
        self.types[id as usize] = kind;
        Ok(())
    }
}

/// Whether a token that is not marked as special is taken for one all the same, as llama.cpp does.
fn looks_special(text: &str) -> bool {
    (text.starts_with("<|") && text.ends_with("|>")) || text == "<pad>" || text == "<mask>"
}

/// Adds the tokenizer in the directory of `base`, a model with `vocab_size` rows in its embedding.
///
/// # Errors
/// [`Error::UnsupportedModel`] for a tokenizer whose equal in llama.cpp is not known; [`Error::Malformed`] for one that does
/// not fit the model.
pub(super) fn add(
    metadata: &mut Metadata,
    base: &GgufBase,
    vocab_size: usize,
    notes: &mut Vec<String>,
) -> Result<()> {
    let tokenizer = Tokenizer::from_dir(base.dir)?;
    let file = TokenizerFile::read(base.dir)?;
    let chat_template = tokenizer.chat_template().map(ChatTemplate::source);
    let mut tokens = Tokens::of(&file, vocab_size)?;
    if byte_level::is_byte_level(&file.pre_tokenizer) {
        byte_level::add(metadata, &file, notes)?;
    } else if file.bpe.byte_fallback {
        sentencepiece::add(metadata, &file, &mut tokens, chat_template, notes)?;
    } else {
        return Err(file.unsupported("pre_tokenizer", &file.pre_tokenizer));
    }
    let mut added = file.added_tokens.iter();
    if let Some(token) = added.find(|token| token.minds_its_neighbours()) {
        notes.push(format!(
            "the model's tokenizer minds what stands beside {:?}, by lstrip, rstrip or single_word, which llama.cpp does not",
            token.content
        ));
    }
    let types = tokens.types.iter().map(|kind| *kind as i32).collect();
    metadata.add("tokenizer.ggml.tokens", writer::Value::Texts(tokens.texts));
    metadata.add("tokenizer.ggml.token_type", writer::Value::I32s(types));
    add_special_tokens(metadata, base, (&tokenizer, &file), notes)?;
    if let Some(template) = chat_template {
        metadata.add_text("tokenizer.chat_template", template);
    }
    Ok(())
}

fn add_special_tokens(
    metadata: &mut Metadata,
    base: &GgufBase,
    (tokenizer, file): (&Tokenizer, &TokenizerFile),
    notes: &mut Vec<String>,
) -> Result<()> {
    // A model that has no such token in its tokenizer may name one in its config, as Qwen's do.
    let bos = tokenizer.bos_token_id();
    let bos = bos.or_else(|| token_id(base.field("bos_token_id")));
    let eos = tokenizer.eos_token_id();
    let eos = eos.or_else(|| token_id(base.field("eos_token_id")));
    if eos.is_none() {
        notes.push("the model names no eos token; llama.cpp takes another for it".into());
    }
    // That of the chat template, which training teaches, is the last.
    let ends = tokenizer.answer_end_ids()?.into_iter().rev();
    let mut unknown_ends = ends.filter(|&id| {
        let known = KNOWN_ENDS.contains(&tokenizer.token_text(id).as_str());
        !known && Some(id) != eos
    });
    for (name, id) in [
        ("bos", bos),
        ("eos", eos),
        ("eot", unknown_ends.next()),
        ("padding", tokenizer.pad_token_id()),
    ] {
        if let Some(id) = id {
            metadata.add_u32(format!("tokenizer.ggml.{name}_token_id"), id);
        }
    }
    let (adds_bos, adds_eos) = added_around(tokenizer, file)?;
    metadata.add(
        "tokenizer.ggml.add_bos_token",
        writer::Value::Bool(adds_bos),
    );
    metadata.add(
        "tokenizer.ggml.add_eos_token",
        writer::Value::Bool(adds_eos),
    );
    Ok(())
}

/// An id, or the first of a list of them.
fn token_id(value: &Value) -> Option<u32> {
    let value = value.as_array().map_or(Some(value), |ids| ids.first())?;
    u32::try_from(value.as_u64()?).ok()
}

/// Whether the tokenizer puts a bos before a text and an eos behind it.
fn added_around(tokenizer: &Tokenizer, file: &TokenizerFile) -> Result<(bool, bool)> {
    let (bare, whole) = (tokenizer.encode("a")?, tokenizer.encode_with_specials("a")?);
    let ids = |is_added: bool, id: Option<u32>| id.filter(|_| is_added);
    for (bos, eos) in [(false, false), (true, false), (false, true), (true, true)] {
        let before = ids(bos, tokenizer.bos_token_id()).into_iter();
        let behind = ids(eos, tokenizer.eos_token_id());
        if before
            .chain(bare.iter().copied())
            .chain(behind)
            .eq(whole.iter().copied())
        {
            return Ok((bos, eos));
        }
    }
    let value = format!("{whole:?} of the text \"a\", which is {bare:?}");
    Err(file.unsupported("post_processor", &value.into()))
}
