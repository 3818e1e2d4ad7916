//! A byte-level BPE (GPT-2's kind: Llama 3, Qwen, OLMo, Mistral NeMo, SmolLM, Granite, Seed-OSS): its merges, and the name that
//! llama.cpp knows its way to split a text by.
//!
//! llama.cpp has each way as code under a name, so a tokenizer is recognized by its pre-tokenizer: the same expression is
//! the same splitting. NFC, which Qwen's tokenizers make of a text first, is left out by llama.cpp as by its own converter.
//!
//! Source: `src/llama-vocab.cpp` of llama.cpp.

use serde_json::{Value, json};

use super::tokenizer_file::TokenizerFile;
use super::vocabulary::PRE_TOKENIZER;
use super::writer::{self, Metadata};
use crate::{Error, Result};

/// Llama 3's: up to three digits together.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's and 3's: each digit apart.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Seed-OSS's: each digit apart, and line ends never with what they end.
const SEED_CODER: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Mistral NeMo's: words apart where a small letter is followed by a capital.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const TEKKEN_NAME: &str = "tekken";
const TEKKEN_NOTE: &str = "llama.cpp splits text with combining marks, such as Hindi, otherwise than the model's tokenizer, so \
                           that the tokens there may be others";

/// A part of a pre-tokenizer.
#[derive(Debug, PartialEq)]
enum Step<'a> {
    /// A piece for each match of an expression that leaves nothing out.
    Split(&'a str),
    /// Each digit apart.
    Digits,
    /// GPT-2's expression, and bytes to characters.
    Gpt2Bytes,
    /// Bytes to characters.
    Bytes,
}

/// Whether a pre-tokenizer makes characters of bytes, which makes its BPE one of bytes.
pub(super) fn is_byte_level(pre_tokenizer: &Value) -> bool {
    pre_tokenizer.to_string().contains("\"ByteLevel\"")
}

pub(super) fn add(
    metadata: &mut Metadata,
    file: &TokenizerFile,
    notes: &mut Vec<String>,
) -> Result<()> {
    let normalizer = &file.normalizer;
    if !normalizer.is_null() && normalizer["type"] != "NFC" {
        return Err(file.unsupported("normalizer", normalizer));
    }
    let steps = steps(&file.pre_tokenizer);
    let pre = steps.and_then(|steps| name(&steps, file.bpe.ignore_merges));
    let pre = pre.ok_or_else(|| match file.bpe.ignore_merges {
        true => {
            let both = json!({ "pre_tokenizer": file.pre_tokenizer, "model.ignore_merges": true });
            file.unsupported("pre_tokenizer", &both)
        }
        false => file.unsupported("pre_tokenizer", &file.pre_tokenizer),
    })?;
    if pre == TEKKEN_NAME {
        notes.push(TEKKEN_NOTE.into());
    }
    let mut merges = Vec::with_capacity(file.bpe.merges.len());
    for (left, right) in file.merges()? {
        if left.contains(' ') || right.contains(' ') {
            let reason =
                format!("the merge of {left:?} and {right:?} has a space, which no byte becomes");
            return Err(Error::malformed(&file.path, reason));
        }
        merges.push(format!("{left} {right}"));
    }
    metadata.add_text("tokenizer.ggml.model", "gpt2");
    metadata.add_text(PRE_TOKENIZER, pre);
    metadata.add("tokenizer.ggml.merges", writer::Value::Texts(merges));
    Ok(())
}

/// The name that files get for the way to split of a file with this name: llama.cpp has some ways under two.
pub(super) fn written_name(name: &str) -> &str {
    match name {
        // As its converter calls that of Granite.
        "refact" => "smollm",
        name => name,
    }
}

/// What llama.cpp calls a way to split; `ignore_merges` goes with the name.
fn name(steps: &[Step], ignore_merges: bool) -> Option<&'static str> {
    Some(match (steps, ignore_merges) {
        ([Step::Gpt2Bytes], false) => "gpt-2",
        ([Step::Digits, Step::Gpt2Bytes], false) => "smollm",
        ([Step::Split(LLAMA3), Step::Bytes], true) => "llama-bpe",
        ([Step::Split(LLAMA3), Step::Bytes], false) => "dbrx",
        ([Step::Split(QWEN2), Step::Bytes], false) => "qwen2",
        ([Step::Split(SEED_CODER), Step::Bytes], false) => "seed-coder",
        ([Step::Split(TEKKEN), Step::Bytes], true) => TEKKEN_NAME,
        _ => return None,
    })
}

/// The steps of a pre-tokenizer; `None` if one is not known.
fn steps(pre_tokenizer: &Value) -> Option<Vec<Step<'_>>> {
    match pre_tokenizer["type"].as_str()? {
        "Sequence" => {
            let parts = pre_tokenizer["pretokenizers"].as_array()?;
            parts.iter().map(step).collect()
        }
        _ => Some(vec![step(pre_tokenizer)?]),
    }
}

fn step(part: &Value) -> Option<Step<'_>> {
    let is_set = |field: &str| part[field].as_bool();
    match part["type"].as_str()? {
        "ByteLevel" if is_set("add_prefix_space") == Some(false) => {
            let splits = is_set("use_regex").unwrap_or(true);
            Some(if splits { Step::Gpt2Bytes } else { Step::Bytes })
        }
        "Digits" if is_set("individual_digits") == Some(true) => Some(Step::Digits),
        "Split" => {
            let way = (part["behavior"].as_str()?, is_set("invert")?);
            let keeps_matches = matches!(way, ("Isolated", false) | ("Removed", true));
            let expression = part["pattern"]["Regex"].as_str()?;
            keeps_matches.then_some(Step::Split(expression))
        }
        _ => None,
    }
}
