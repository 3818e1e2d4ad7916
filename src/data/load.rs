//! Reads a local data file (`.jsonl`, or `.json` with an array) into examples, in file order.
//!
//! Records are parsed and tokenized in parallel. A record that cannot be used stops the load with its line; nothing
//! is skipped but rows that have no loss after truncation, and those are counted.

use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::{DatasetFormat, Example, Tokenizer, TrainOnSource, format};
use crate::{Error, Result};

/// What becomes of a row without a single label other than -100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Unlabelled {
    /// It is left out and counted: it cannot train anything.
    #[default]
    Drop,
    /// It stays, so that example i is record i of the file.
    Keep,
}

/// How a data file is read. Lengths are in tokens.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// `None` detects the format from the first record.
    pub format: Option<DatasetFormat>,
    /// Cut of `bos + input`, for `alpaca` and `input-output`.
    pub source_max_len: usize,
    /// Cut of `output + eos`, for `alpaca` and `input-output`.
    pub target_max_len: usize,
    /// Cut of the whole row, for every format.
    pub max_seq_len: Option<usize>,
    /// Ignored by `tokenized`, whose labels say it.
    pub train_on_source: TrainOnSource,
    /// Only the first records are read.
    pub max_samples: Option<usize>,
    /// Ids from here on are refused.
    pub vocab_size: Option<usize>,
    pub unlabelled: Unlabelled,
}

impl Default for LoadOptions {
    /// The lengths of qlora.py.
    fn default() -> Self {
        Self {
            format: None,
            source_max_len: 1024,
            target_max_len: 256,
            max_seq_len: None,
            train_on_source: TrainOnSource::No,
            max_samples: None,
            vocab_size: None,
            unlabelled: Unlabelled::Drop,
        }
    }
}

/// Counts of one [`load`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct LoadStats {
    /// Records in the file, or `max_samples` if that is fewer.
    pub rows: usize,
    /// Rows without a label other than -100.
    pub dropped: usize,
    /// Rows cut by `max_seq_len`.
    pub truncated: usize,
    /// Tokens of the rows that stay.
    pub tokens: usize,
    /// Of those, tokens that are predicted with loss.
    pub target_tokens: usize,
}

/// A data file as examples, in file order.
#[derive(Debug, Clone)]
pub struct Dataset {
    pub examples: Vec<Example>,
    pub format: DatasetFormat,
    /// A sentence that says which format is used and why.
    pub detected: String,
    pub stats: LoadStats,
}

/// Reads `path` as `options` say. Every format but `tokenized` needs the `tokenizer`.
///
/// # Errors
/// [`Error::Row`] with the line of a record that cannot be used: bad JSON, invalid UTF-8, a missing column, a wrong
/// type, a token id beyond the vocabulary; also if no row has a label other than -100. [`Error::Malformed`] if the
/// file is empty or not of a known kind; [`Error::Config`] if the format needs a tokenizer and there is none.
pub fn load(
    path: impl AsRef<Path>,
    options: &LoadOptions,
    tokenizer: Option<&Tokenizer>,
) -> Result<Dataset> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let mut records = split_records(path, &bytes)?;
    records.truncate(options.max_samples.unwrap_or(usize::MAX));
    let first = records
        .first()
        .ok_or_else(|| Error::malformed(path, "the file has no rows"))?;
    let (format, detected) = choose_format(path, first, options)?;
    if format != DatasetFormat::Tokenized && tokenizer.is_none() {
        return Err(Error::config(
            "dataset_format",
            format!(
                "{format} needs the model's tokenizer; give a model directory that has a tokenizer.json"
            ),
        ));
    }

    let rows: Vec<(Example, Cut)> = records
        .par_iter()
        .map(|record| {
            prepare(record, format, options, tokenizer).map_err(|reason| Error::Row {
                path: path.to_path_buf(),
                line: record.line,
                reason,
            })
        })
        // Of several bad rows the first in the file is reported, whichever thread came first.
        .collect::<Vec<_>>()
        .into_iter()
        .collect::<Result<_>>()?;
    collect_examples(path, rows, format, detected, options)
}

/// Whether `max_seq_len` cut a row.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cut {
    No,
    Yes,
}

/// A record before it is parsed.
struct Record<'a> {
    line: usize,
    content: Content<'a>,
}

enum Content<'a> {
    Line(&'a [u8]),
    Value(Value),
}

impl Record<'_> {
    fn parse(&self) -> Result<std::borrow::Cow<'_, Map<String, Value>>, String> {
        use std::borrow::Cow;
        match &self.content {
            Content::Line(bytes) => {
                let text = std::str::from_utf8(bytes).map_err(|e| {
                    format!("invalid UTF-8 at byte {} of the line", e.valid_up_to() + 1)
                })?;
                match serde_json::from_str(text).map_err(|e| bad_json(&e))? {
                    Value::Object(record) => Ok(Cow::Owned(record)),
                    other => Err(not_an_object(&other)),
                }
            }
            Content::Value(Value::Object(record)) => Ok(Cow::Borrowed(record)),
            Content::Value(other) => Err(not_an_object(other)),
        }
    }
}

fn not_an_object(value: &Value) -> String {
    format!("the row is {}, expected an object", format::kind(value))
}

/// serde_json's message without its line number, which counts within the row.
fn bad_json(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let message = message
        .rsplit_once(" at line ")
        .map_or(message.as_str(), |(message, _)| message);
    format!("bad JSON: {message} at column {}", error.column())
}

/// Splits a file into its records: the elements of a `.json` array, or the lines that are not blank.
fn split_records<'a>(path: &Path, bytes: &'a [u8]) -> Result<Vec<Record<'a>>> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
    if extension != "jsonl" && extension != "json" {
        return Err(Error::malformed(
            path,
            "expected a data file that ends in .jsonl (one JSON object a line) or .json (an array of objects)",
        ));
    }
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    let is_array = bytes.trim_ascii_start().first() == Some(&b'[');
    if extension == "json" && is_array {
        let values: Vec<Value> = serde_json::from_slice(bytes).map_err(|e| Error::Row {
            path: path.to_path_buf(),
            line: e.line(),
            reason: bad_json(&e),
        })?;
        let record = |(i, value)| Record {
            line: i + 1,
            content: Content::Value(value),
        };
        return Ok(values.into_iter().enumerate().map(record).collect());
    }
    let lines = bytes.split(|&byte| byte == b'\n').enumerate();
    Ok(lines
        .filter(|(_, line)| !line.trim_ascii().is_empty())
        .map(|(i, line)| Record {
            line: i + 1,
            content: Content::Line(line),
        })
        .collect())
}

fn choose_format(
    path: &Path,
    first: &Record,
    options: &LoadOptions,
) -> Result<(DatasetFormat, String)> {
    if let Some(format) = options.format {
        return Ok((format, format!("dataset_format {format}, as asked for")));
    }
    first
        .parse()
        .and_then(|record| DatasetFormat::detect(&record))
        .map_err(|reason| Error::Row {
            path: path.to_path_buf(),
            line: first.line,
            reason,
        })
}

/// One record as an example, cut to `max_seq_len` and checked against the vocabulary.
fn prepare(
    record: &Record,
    format: DatasetFormat,
    options: &LoadOptions,
    tokenizer: Option<&Tokenizer>,
) -> Result<(Example, Cut), String> {
    let columns = record.parse()?;
    let mut example = format::example(&columns, format, record.line, options, tokenizer)?;
    if let Some(vocab_size) = options.vocab_size {
        let beyond = |id: i64| id >= vocab_size as i64;
        let input_ids = example.input_ids.iter().map(|&id| i64::from(id));
        for (name, id) in input_ids
            .map(|id| ("input_ids", id))
            .chain(example.labels.iter().map(|&label| ("labels", label)))
        {
            if beyond(id) {
                return Err(format!(
                    "`{name}` has token id {id}, beyond the model's vocabulary of {vocab_size}"
                ));
            }
        }
    }
    let max_seq_len = options.max_seq_len.unwrap_or(usize::MAX);
    let cut = if example.input_ids.len() > max_seq_len {
        Cut::Yes
    } else {
        Cut::No
    };
    example.input_ids.truncate(max_seq_len);
    example.labels.truncate(max_seq_len);
    Ok((example, cut))
}

fn collect_examples(
    path: &Path,
    rows: Vec<(Example, Cut)>,
    format: DatasetFormat,
    detected: String,
    options: &LoadOptions,
) -> Result<Dataset> {
    let mut stats = LoadStats {
        rows: rows.len(),
        ..LoadStats::default()
    };
    let mut examples = Vec::with_capacity(rows.len());
    let mut first_dropped = None;
    for (example, cut) in rows {
        stats.truncated += usize::from(cut == Cut::Yes);
        let target_tokens = example.target_count();
        if target_tokens == 0 && options.unlabelled == Unlabelled::Drop {
            stats.dropped += 1;
            first_dropped.get_or_insert(example.line);
            continue;
        }
        stats.tokens += example.input_ids.len();
        stats.target_tokens += target_tokens;
        examples.push(example);
    }
    if let (true, Some(line)) = (examples.is_empty(), first_dropped) {
        return Err(Error::Row {
            path: path.to_path_buf(),
            line,
            reason: format!(
                "all labels are -100, and so in all {} rows: there is nothing to train on{}",
                stats.rows,
                if stats.truncated > 0 {
                    "; raise max_seq_len, which cut the answers off"
                } else {
                    ""
                }
            ),
        });
    }
    Ok(Dataset {
        examples,
        format,
        detected,
        stats,
    })
}
