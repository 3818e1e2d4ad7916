//! The fixtures of `make_data.py`, and data files made on the spot.

// Each test file uses a part of it.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use qlora::data::{Dataset, LoadOptions, SpecialTokens, Tokenizer, load};
use qlora::{Error, IGNORE_INDEX};
use serde_json::{Value, json};

/// A byte-level tokenizer and one of Llama 2's kind.
pub const TOKENIZERS: [&str; 2] = ["tokenizer", "tokenizer_metaspace"];

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data")
}

pub fn fixture(name: &str) -> Value {
    let text = std::fs::read_to_string(fixtures().join(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

pub fn tokenizer(name: &str) -> Tokenizer {
    Tokenizer::from_dir(fixtures().join(name)).unwrap()
}

/// A model directory with the tokenizer fixture `name`, and changes to its config.
pub fn model_dir(name: &str, changes: Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let file = "tokenizer.json";
    std::fs::copy(fixtures().join(name).join(file), dir.path().join(file)).unwrap();
    let config_file = "tokenizer_config.json";
    let mut config = fixture(&format!("{name}/{config_file}"));
    let fields = config.as_object_mut().unwrap();
    fields.extend(changes.as_object().unwrap().clone());
    std::fs::write(dir.path().join(config_file), config.to_string()).unwrap();
    dir
}

/// The byte-level tokenizer with this chat template.
pub fn with_template(source: &str) -> Tokenizer {
    let dir = model_dir("tokenizer", json!({ "chat_template": source }));
    Tokenizer::from_dir(dir.path()).unwrap()
}

/// The text of a row's trained tokens.
pub fn trained_text(dataset: &Dataset, row: usize, tokenizer: &Tokenizer) -> String {
    let labels = dataset.example(row).labels;
    let trained = labels.into_iter().filter(|&label| label != IGNORE_INDEX);
    let ids: Vec<u32> = trained.map(|label| label as u32).collect();
    tokenizer.decode(&ids, SpecialTokens::Keep).unwrap()
}

pub fn integers<T: TryFrom<i64>>(value: &Value) -> Vec<T> {
    let number = |v: &Value| T::try_from(v.as_i64().unwrap()).ok().unwrap();
    value.as_array().unwrap().iter().map(number).collect()
}

pub fn load_bytes(
    file_name: &str,
    bytes: &[u8],
    options: &LoadOptions,
    tokenizer: Option<&Tokenizer>,
) -> qlora::Result<Dataset> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(file_name);
    std::fs::write(&path, bytes).unwrap();
    load(&path, options, tokenizer)
}

pub fn jsonl(records: &[Value]) -> Vec<u8> {
    let lines: Vec<String> = records.iter().map(|record| format!("{record}\n")).collect();
    lines.concat().into_bytes()
}

pub fn expect_row_error(
    bytes: &[u8],
    options: &LoadOptions,
    tokenizer: Option<&Tokenizer>,
    expected_line: usize,
    expected: &str,
) {
    match load_bytes("bad.jsonl", bytes, options, tokenizer) {
        Err(Error::Row { path, line, reason }) => {
            assert!(path.ends_with("bad.jsonl"));
            assert_eq!(line, expected_line, "{reason}");
            assert!(reason.contains(expected), "{reason:?} lacks {expected:?}");
        }
        other => panic!("expected {expected:?}, got {other:?}"),
    }
}
