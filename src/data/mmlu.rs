//! Multiple-choice questions, in the files of MMLU that qlora.py has or as `cais/mmlu` on the Hugging Face hub.
//!
//! | columns | prompt | answer |
//! |---|---|---|
//! | `subject`, `input`, `output` | `input` as it stands | `output`, a letter of A to D |
//! | `subject`, `question`, `choices`, `answer` | the zero-shot prompt of qlora.py | `answer`, 0 to 3 |
//!
//! The token ids are those of `bos + prompt`. Source: qlora.py (artidoro/qlora, July 2023), but that it cuts a long prompt at
//! its end, where the question is; here the beginning goes.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::Tokenizer;
use super::columns::{Columns, column, kind, text};
use super::reader::{self, Record};
use crate::{Error, Result};

/// What a question is answered with.
pub const LETTERS: [&str; 4] = ["A", "B", "C", "D"];

/// A file of qlora.py: its name, its shots, and the name that qlora.py has for its split.
const NAMED_FILES: [(&str, &str, &str); 4] = [
    ("zero_shot_mmlu_val.json", "zero_shot", "eval"),
    ("zero_shot_mmlu_test.json", "zero_shot", "test"),
    ("five_shot_mmlu_val.json", "five_shot", "eval"),
    ("five_shot_mmlu_test.json", "five_shot", "test"),
];

/// A file of questions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MmluFile {
    pub path: PathBuf,
    /// `zero_shot` or `five_shot`; `None` where the file has a name of its own.
    pub shots: Option<&'static str>,
    /// `eval` or `test`, as in qlora.py's names of measures; `None` where the file has a name of its own.
    pub split: Option<&'static str>,
}

/// How prompts become tokens.
#[derive(Debug, Clone, Copy)]
pub struct MmluOptions {
    /// Tokens of a longer prompt are taken away after bos; qlora.py's `mmlu_source_max_len`.
    pub source_max_len: usize,
    /// Only the first questions.
    pub max_samples: Option<usize>,
}

impl Default for MmluOptions {
    fn default() -> Self {
        Self {
            source_max_len: 2048,
            max_samples: None,
        }
    }
}

/// A question that is answered by the letter after its prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    pub subject: String,
    /// With bos, if the tokenizer has one; never empty.
    pub prompt: Vec<u32>,
    /// The index in [`LETTERS`].
    pub answer: usize,
}

/// The questions of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mmlu {
    pub questions: Vec<Question>,
    /// Prompts that were too long.
    pub cut: usize,
}

/// The files that `path` stands for: itself, or those of qlora.py in a directory.
///
/// # Errors
/// [`Error::Malformed`] for a directory that has none of them.
pub fn mmlu_files(path: impl AsRef<Path>) -> Result<Vec<MmluFile>> {
    let path = path.as_ref();
    let named = |(name, shots, split): &(&str, &'static str, &'static str)| MmluFile {
        path: path.join(name),
        shots: Some(*shots),
        split: Some(*split),
    };
    if !path.is_dir() {
        let of_name = NAMED_FILES.iter().find(|(name, ..)| path.ends_with(name));
        return Ok(vec![MmluFile {
            path: path.to_path_buf(),
            shots: of_name.map(|(_, shots, _)| *shots),
            split: of_name.map(|(.., split)| *split),
        }]);
    }
    let files = NAMED_FILES.iter().map(named);
    let files: Vec<MmluFile> = files.filter(|file| file.path.is_file()).collect();
    match files.is_empty() {
        true => Err(Error::malformed(
            path,
            "the directory has no questions, expected {zero,five}_shot_mmlu_{val,test}.json",
        )),
        false => Ok(files),
    }
}

/// Reads the questions of a file.
///
/// # Errors
/// [`Error::Row`] for a row that is no question, [`Error::Malformed`] for a file without any, [`Error::Config`] for a
/// `source_max_len` that leaves no more than bos.
pub fn read_mmlu(path: &Path, options: &MmluOptions, tokenizer: &Tokenizer) -> Result<Mmlu> {
    if options.source_max_len < 2 {
        let reason = format!("must be at least 2, found {}", options.source_max_len);
        return Err(Error::config("mmlu_source_max_len", reason));
    }
    let records = reader::open(path)?.take(options.max_samples.unwrap_or(usize::MAX));
    let records: Vec<Record> = records.collect::<Result<_>>()?;
    let questions: Vec<Result<(Question, bool)>> = records
        .into_par_iter()
        .map(|record| {
            let line = record.line;
            question(record, options, tokenizer).map_err(|reason| Error::Row {
                path: path.to_path_buf(),
                line,
                reason,
            })
        })
        .collect();
    // Of several bad rows the first in the file is reported.
    let questions: Vec<_> = questions.into_iter().collect::<Result<_>>()?;
    if questions.is_empty() {
        return Err(Error::malformed(path, "the file has no questions"));
    }
    let cut = questions.iter().filter(|(_, is_cut)| *is_cut).count();
    let questions = questions.into_iter().map(|(question, _)| question);
    Ok(Mmlu {
        questions: questions.collect(),
        cut,
    })
}

/// The token of each letter, as it is tokenized on its own.
///
/// # Errors
/// [`Error::Malformed`], with the tokenizer's path, for a letter that has no token of its own.
pub fn letter_ids(tokenizer: &Tokenizer) -> Result<[u32; LETTERS.len()]> {
    let mut ids = [0; LETTERS.len()];
    for (i, letter) in LETTERS.iter().enumerate() {
        ids[i] = match tokenizer.encode(letter)?[..] {
            // Not a token for what is unknown, nor one that the letter shares with others.
            [id] if tokenizer.token_text(id).trim() == *letter => id,
            ref found => {
                let reason = format!(
                    "the letter {letter} has the tokens {found:?}, expected one of its own: the questions of MMLU \
                     are answered by the token of a letter"
                );
                return Err(Error::malformed(tokenizer.path(), reason));
            }
        };
    }
    Ok(ids)
}

/// A question, and whether its prompt was cut; the error is the reason.
fn question(
    record: Record,
    options: &MmluOptions,
    tokenizer: &Tokenizer,
) -> Result<(Question, bool), String> {
    let row = record.parse()?;
    let subject = text(&row, "subject")?.to_string();
    let (prompt, answer) = match row.contains_key("question") && !row.contains_key("input") {
        true => question_and_choices(&row, &subject)?,
        false => (text(&row, "input")?.to_string(), letter(&row)?),
    };
    if prompt.is_empty() {
        return Err("`input` is empty".into());
    }
    let bos = tokenizer.bos_token().unwrap_or_default();
    let ids = tokenizer.encode(&format!("{bos}{prompt}"));
    let mut prompt = ids.map_err(|e| e.to_string())?;
    if prompt.is_empty() {
        return Err("`input` has no tokens".into());
    }
    let excess = prompt.len().saturating_sub(options.source_max_len);
    let start = usize::from(prompt.first() == tokenizer.bos_token_id().as_ref());
    prompt.drain(start..start + excess);
    let question = Question {
        subject,
        prompt,
        answer,
    };
    Ok((question, excess > 0))
}

fn letter(row: &Columns) -> Result<usize, String> {
    let output = text(row, "output")?;
    let answer = LETTERS.iter().position(|letter| *letter == output);
    answer.ok_or_else(|| format!("`output` is {output:?}, expected A, B, C or D"))
}

/// The zero-shot prompt of qlora.py, which has two blanks before the subject, and the answer.
fn question_and_choices(row: &Columns, subject: &str) -> Result<(String, usize), String> {
    let value = column(row, "choices")?;
    let choices = value.as_array().into_iter().flatten();
    let choices: Option<Vec<&str>> = choices.map(|choice| choice.as_str()).collect();
    let choices = choices.filter(|choices| choices.len() == LETTERS.len());
    let choices = choices.ok_or_else(|| match value.as_array() {
        Some(items) => format!("`choices` has {} entries, expected 4 strings", items.len()),
        None => format!("`choices` is {}, expected 4 strings", kind(value)),
    })?;
    let value = column(row, "answer")?;
    let answer = value.as_u64().and_then(|n| usize::try_from(n).ok());
    let answer = answer.filter(|answer| *answer < LETTERS.len());
    let answer = answer.ok_or_else(|| format!("`answer` is {value}, expected 0, 1, 2 or 3"))?;
    let choices = LETTERS.iter().zip(choices);
    let choices: String = choices
        .map(|(l, choice)| format!("{l}. {choice}\n"))
        .collect();
    let prompt = format!(
        "The following are multiple choice questions (with answers) about  {}.\n\n{}\n{choices}Answer:",
        subject.replace('_', " "),
        text(row, "question")?,
    );
    Ok((prompt, answer))
}
