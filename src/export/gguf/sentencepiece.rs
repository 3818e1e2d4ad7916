//! A BPE that came from SentencePiece (Llama 1 and 2, Mistral up to v0.3, TinyLlama): scores in place of merges.
//!
//! SentencePiece joins, of all neighbours whose text together is a token, those with the highest score. `tokenizer.json` has
//! a merge for each way to make a token of two others, by falling score; tokens of equal score lie among one another.
//! So a score is told by where a token's merges stand, and the joining is the same if no way to make a token is missing.
//!
//! Source: `llm_tokenizer_spm` of llama.cpp; `generate_merges` of transformers.

use std::collections::{HashMap, HashSet};

use serde_json::{Value, json};

use super::tokenizer_file::TokenizerFile;
use super::vocabulary::{PRE_TOKENIZER, TokenType, Tokens};
use super::writer::{self, Metadata};
use crate::Result;

const SPACE: char = '▁';

/// How many of a thousand tokens may lack a merge: more, and it is not SentencePiece's way to join.
const MAX_LACKING_PER_MILLE: usize = 1;

const ADDED_NOTE: &str = "llama.cpp puts a space before a text and before what stands behind a special token, even where \
                          there is one; the model's tokenizer does not, so that the tokens there may be others";
const CHAT_NOTE: &str = "llama.cpp is told to put no space before a text, as the model's tokenizer puts none behind the \
                         special tokens of a chat; text outside of a chat lacks the space that this tokenizer puts at its start";

/// Where a space is put before a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SpacePrefix {
    None,
    /// Before a text, and before what stands behind a special token.
    Always,
    /// There too, but not where one stands already.
    IfMissing,
    /// Before a text alone, if it does not begin with one.
    AtStartIfMissing,
}

pub(super) fn add(
    metadata: &mut Metadata,
    file: &TokenizerFile,
    tokens: &mut Tokens,
    chat_template: Option<&str>,
    notes: &mut Vec<String>,
) -> Result<()> {
    let Some(prefix) = space_prefix(file) else {
        let both = json!({ "normalizer": file.normalizer, "pre_tokenizer": file.pre_tokenizer });
        return Err(file.unsupported("pre_tokenizer", &both));
    };
    if file.bpe.ignore_merges {
        return Err(file.unsupported("model.ignore_merges", &Value::Bool(true)));
    }
    for byte in 0..=u8::MAX {
        let name = format!("<0x{byte:02X}>");
        let Some(id) = file.bpe.vocab.get(&name) else {
            let value = json!(format!("no token {name}"));
            return Err(file.unsupported("model.byte_fallback", &value));
        };
        tokens.types[*id as usize] = TokenType::Byte;
    }
    let unknown = file.bpe.unk_token.as_ref();
    let unknown = unknown.and_then(|token| file.bpe.vocab.get(token));
    if let Some(unknown) = unknown {
        tokens.types[*unknown as usize] = TokenType::Unknown;
        metadata.add_u32("tokenizer.ggml.unknown_token_id", *unknown);
    }
    let merges = file.merges()?;
    expect_all_merges(file, tokens, &merges, notes)?;
    metadata.add_text("tokenizer.ggml.model", "llama");
    metadata.add_text(PRE_TOKENIZER, "default");
    metadata.add(
        "tokenizer.ggml.scores",
        writer::Value::F32s(scores(tokens, &merges)),
    );
    let (adds_space, note) = match (prefix, chat_template) {
        (SpacePrefix::None, _) => (false, None),
        (SpacePrefix::Always, _) => (true, None),
        (SpacePrefix::AtStartIfMissing, Some(_)) => (false, Some(CHAT_NOTE)),
        (SpacePrefix::IfMissing | SpacePrefix::AtStartIfMissing, _) => (true, Some(ADDED_NOTE)),
    };
    notes.extend(note.map(String::from));
    metadata.add(
        "tokenizer.ggml.add_space_prefix",
        writer::Value::Bool(adds_space),
    );
    Ok(())
}

/// `None` if the parts around the BPE do something else than to write spaces as `▁`.
fn space_prefix(file: &TokenizerFile) -> Option<SpacePrefix> {
    let prepend = json!({ "type": "Prepend", "prepend": SPACE });
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
    let (normalizer, pre_tokenizer) = (&file.normalizer, &file.pre_tokenizer);
    // Gemma's splits at spaces, of which the normalizer has left none.
    let at_spaces = pre_tokenizer["type"] == "Split"
        && pre_tokenizer["pattern"] == json!({ "String": " " })
        && *normalizer == replace;
    if pre_tokenizer.is_null() || at_spaces {
        let sequence = json!({ "type": "Sequence", "normalizers": [prepend, replace] });
        return match normalizer {
            normalizer if *normalizer == sequence => Some(SpacePrefix::Always),
            normalizer if *normalizer == replace => Some(SpacePrefix::None),
            _ => None,
        };
    }
    let is_metaspace = pre_tokenizer["type"] == "Metaspace"
        && pre_tokenizer["replacement"] == json!(SPACE)
        && pre_tokenizer["split"] == json!(false)
        && normalizer.is_null();
    match pre_tokenizer["prepend_scheme"].as_str() {
        Some("always") if is_metaspace => Some(SpacePrefix::IfMissing),
        Some("first") if is_metaspace => Some(SpacePrefix::AtStartIfMissing),
        Some("never") if is_metaspace => Some(SpacePrefix::None),
        _ => None,
    }
}

/// Refuses a tokenizer that does not join all that SentencePiece would; notes a few tokens.
fn expect_all_merges(
    file: &TokenizerFile,
    tokens: &Tokens,
    merges: &[(&str, &str)],
    notes: &mut Vec<String>,
) -> Result<()> {
    let merges: HashSet<(&str, &str)> = merges.iter().copied().collect();
    let texts = tokens.normal_texts();
    let normal: HashSet<&str> = texts.clone().collect();
    let lacks = |text: &&str| {
        let mut splits = text.char_indices().skip(1).map(|(at, _)| text.split_at(at));
        splits.any(|(left, right)| {
            normal.contains(left) && normal.contains(right) && !merges.contains(&(left, right))
        })
    };
    let lacking: Vec<&str> = texts.filter(lacks).collect();
    if 1000 * lacking.len() > MAX_LACKING_PER_MILLE * normal.len() {
        let value = format!(
            "merges that leave out ways to make {} of {} tokens, so not those of a SentencePiece model",
            lacking.len(),
            normal.len()
        );
        return Err(file.unsupported("model.merges", &value.into()));
    }
    if !lacking.is_empty() {
        notes.push(format!(
            "llama.cpp makes the tokens {lacking:?} where the model's tokenizer does not, as a merge is missing"
        ));
    }
    Ok(())
}

/// A score for each token: the lower, the later its merges stand, and the lowest for those that have none.
fn scores(tokens: &Tokens, merges: &[(&str, &str)]) -> Vec<f32> {
    let made = merges.iter().map(|(left, right)| format!("{left}{right}"));
    let made: Vec<String> = made.collect();
    let places = made.iter().enumerate();
    let last: HashMap<&str, usize> = places.map(|(at, text)| (text.as_str(), at)).collect();
    let mut groups = HashMap::new();
    let (mut group, mut group_end) = (0, 0);
    for (at, text) in made.iter().enumerate() {
        if at > group_end {
            group += 1;
        }
        group_end = group_end.max(last[text.as_str()]);
        groups.entry(text.as_str()).or_insert(group);
    }
    let group_of = |text: &String| groups.get(text.as_str()).copied().unwrap_or(group + 1);
    let texts = tokens.texts.iter();
    texts.map(|text| -(group_of(text) as f32)).collect()
}
