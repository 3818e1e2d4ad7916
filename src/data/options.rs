//! How data files are read, and what was found in them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{DatasetFormat, ExcessLength};

/// Which tokens of a row carry loss (`train_on_source` of qlora.py).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub enum TrainOnSource {
    /// Loss on the answer only.
    #[default]
    No,
    /// Loss on every token of the row.
    Yes,
}

impl From<bool> for TrainOnSource {
    fn from(train_on_source: bool) -> Self {
        if train_on_source { Self::Yes } else { Self::No }
    }
}

/// Which of the assistant's turns in a conversation carry loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub enum Turns {
    #[default]
    Every,
    /// The last one (`mask_history`).
    Last,
}

impl From<bool> for Turns {
    fn from(mask_history: bool) -> Self {
        if mask_history {
            Self::Last
        } else {
            Self::Every
        }
    }
}

/// What becomes of a row without a single label other than -100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub enum Unlabelled {
    /// It is left out and counted: it cannot train anything.
    #[default]
    Drop,
    /// It stays, so that example i is record i of the file.
    Keep,
}

/// How a data file is read. Lengths are in tokens.
#[derive(Debug, Clone, Serialize)]
pub struct LoadOptions {
    /// `None` detects the format from the first row.
    pub format: Option<DatasetFormat>,
    /// Columns by the name that the format gives them, and by the one that they have in the file.
    pub columns: Vec<(String, String)>,
    /// Longest `bos + source`, for formats with a source and a target.
    pub source_max_len: usize,
    /// Longest `target + eos`, for formats with a source and a target; `None`: what the format says.
    pub target_max_len: Option<usize>,
    /// Longest row, for every format.
    pub max_seq_len: Option<usize>,
    /// What becomes of rows beyond these lengths.
    pub excess_length: ExcessLength,
    /// Ignored by `tokenized`, whose labels say it.
    pub train_on_source: TrainOnSource,
    /// Of conversations.
    pub turns: Turns,
    /// Only the first records are read.
    pub max_samples: Option<usize>,
    /// Ids from here on are refused.
    pub vocab_size: Option<usize>,
    pub unlabelled: Unlabelled,
    /// Where tokenized rows are kept for the next run; `None`: nowhere.
    #[serde(skip)]
    pub cache_dir: Option<PathBuf>,
}

impl Default for LoadOptions {
    /// The lengths of qlora.py.
    fn default() -> Self {
        Self {
            format: None,
            columns: Vec::new(),
            source_max_len: 1024,
            target_max_len: None,
            max_seq_len: None,
            excess_length: ExcessLength::default(),
            train_on_source: TrainOnSource::No,
            turns: Turns::default(),
            max_samples: None,
            vocab_size: None,
            unlabelled: Unlabelled::Drop,
            cache_dir: None,
        }
    }
}

/// Counts of one [`load`](super::load).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LoadStats {
    /// Rows read, or `max_samples` if that is fewer.
    pub rows: usize,
    /// Rows left out: without a label other than -100, or too long under [`ExcessLength::Drop`].
    pub dropped: usize,
    /// Rows that lost tokens to `max_seq_len`, `source_max_len` or `target_max_len`.
    pub truncated: usize,
    /// Tokens of the rows that stay.
    pub tokens: usize,
    /// Of those, tokens that are predicted with loss.
    pub target_tokens: usize,
}

/// Rows of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Finding {
    pub rows: usize,
    /// The line of the first of them.
    pub first_line: Option<usize>,
    /// Which of the files that line is in, counted from 0, where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_file: Option<usize>,
}

impl Finding {
    pub(super) fn add(&mut self, file: Option<usize>, line: usize) {
        if self.rows == 0 {
            (self.first_file, self.first_line) = (file, Some(line));
        }
        self.rows += 1;
    }

    fn sentence(self, what: &str, files: &[PathBuf]) -> Option<String> {
        let line = self.first_line?;
        let file = self.first_file.and_then(|file| files.get(file));
        let file = file.map_or_else(String::new, |file| format!(" of {}", file.display()));
        let rows = if self.rows == 1 {
            "1 row".into()
        } else {
            format!("{} rows", self.rows)
        };
        Some(format!("{rows} {what} (the first in line {line}{file})"))
    }
}

/// What is likely wrong with a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Findings {
    /// Left out: no label other than -100.
    pub all_masked: Finding,
    /// Left out: too long, under [`ExcessLength::Drop`].
    pub too_long: Finding,
    /// Cut, so that an answer has no end.
    pub answer_cut: Finding,
    /// Start with bos twice.
    pub doubled_bos: Finding,
    /// A trained stretch does not end with an end token.
    pub missing_end: Finding,
    /// The tokenizer pads with its end token.
    pub pad_is_eos: bool,
}

impl Findings {
    /// A sentence for each thing that was found in `files`.
    pub(super) fn sentences(&self, files: &[PathBuf]) -> Vec<String> {
        let rows = [
            (
                self.all_masked,
                "dropped: no label other than -100, nothing to train on",
            ),
            (
                self.too_long,
                "dropped: longer than the limits (excess_length_strategy drop)",
            ),
            (
                self.answer_cut,
                "cut so that an answer lost its end, and the model is not taught to stop there",
            ),
            (
                self.doubled_bos,
                "with the bos token twice at the start: take it out of the text or of the chat template",
            ),
            (
                self.missing_end,
                "with an answer that does not end with an end token, so the model is not taught to stop: check eos_token and \
                 the chat template",
            ),
        ];
        let pad = "pad_token is eos_token: harmless here, where nothing is padded and the end token carries loss; programs that \
                   mask the padding would not train it";
        let pad = self.pad_is_eos.then(|| pad.to_string());
        let rows = rows.into_iter();
        let rows = rows.filter_map(|(finding, what)| finding.sentence(what, files));
        rows.chain(pad).collect()
    }
}
