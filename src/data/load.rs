//! Reads local data files into tokenized rows, in file order.
//!
//! Rows are read as a stream, and parsed and tokenized in parallel while the next ones are read. A row that cannot be used
//! stops the load with its line; what is left out or cut is counted.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::cache::Cache;
use super::encode::{Encoded, Encoder, rename};
use super::reader::{self, Record, Records};
use super::token_rows::{TokenRows, TokenRowsWriter};
use super::tokenizer::SENTENCEPIECE_ALONE;
use super::{DatasetFormat, Example, Findings, LoadOptions, LoadStats, Tokenizer, Unlabelled};
use crate::{Error, Result};

/// Records that are tokenized together: enough for all threads, little memory.
const CHUNK_RECORDS: usize = 4096;
const CHUNK_BYTES: usize = 16 << 20;

/// Tokenized rows in file order, with what is known about them.
#[derive(Debug)]
pub struct Dataset {
    rows: TokenRows,
    files: Vec<PathBuf>,
    /// The number of the first row of each file.
    first_rows: Vec<usize>,
    pub format: DatasetFormat,
    /// A sentence that says which format is used and why.
    pub detected: String,
    pub stats: LoadStats,
    pub findings: Findings,
}

impl Dataset {
    /// Rows that training can use.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of row `i`.
    ///
    /// # Panics
    /// If there is no row `i`.
    pub fn token_count(&self, i: usize) -> usize {
        self.rows.token_count(i)
    }

    /// Row `i`.
    ///
    /// # Panics
    /// If there is no row `i`.
    pub fn example(&self, i: usize) -> Example {
        self.rows.example(i)
    }

    /// The file that row `i` is from, if there are several.
    pub fn file(&self, i: usize) -> Option<&Path> {
        if self.files.len() < 2 {
            return None;
        }
        let begun = self.first_rows.partition_point(|first| *first <= i);
        let file = self.files.get(begun.checked_sub(1)?);
        file.map(PathBuf::as_path)
    }

    /// A sentence for each thing that is likely wrong.
    pub fn sentences(&self) -> Vec<String> {
        self.findings.sentences(&self.files)
    }

    /// All rows in their order.
    pub fn examples(&self) -> impl ExactSizeIterator<Item = Example> {
        (0..self.len()).map(|i| self.example(i))
    }
}

/// What is kept beside rows in the cache.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Summary {
    first_rows: Vec<usize>,
    format: DatasetFormat,
    detected: String,
    stats: LoadStats,
    findings: Findings,
}

/// Reads the file `path` as `options` say. Every format but `tokenized` needs the `tokenizer`.
///
/// # Errors
/// As [`load_files`].
pub fn load(
    path: impl AsRef<Path>,
    options: &LoadOptions,
    tokenizer: Option<&Tokenizer>,
) -> Result<Dataset> {
    load_files(&[path.as_ref().to_path_buf()], options, tokenizer)
}

/// Reads several files as one, such as the shards of a data set.
///
/// # Errors
/// [`Error::Row`] with the line of a row that cannot be used: bad JSON, invalid UTF-8, a missing column, a wrong type, a
/// token id beyond the vocabulary, too many tokens under [`ExcessLength::Error`](super::ExcessLength::Error); also if no
/// row can be trained on. [`Error::Malformed`] if there are no rows or a file is not of a known kind; [`Error::Config`]
/// if the format needs a tokenizer and there is none.
pub fn load_files(
    files: &[PathBuf],
    options: &LoadOptions,
    tokenizer: Option<&Tokenizer>,
) -> Result<Dataset> {
    let cache = match &options.cache_dir {
        Some(dir) => Some(Cache::new(dir, files, options, tokenizer)?),
        None => None,
    };
    if let Some((rows, summary)) = cache.as_ref().map(Cache::open).transpose()?.flatten()
        && let Ok(summary) = serde_json::from_slice(&summary)
    {
        return Ok(dataset(files, rows, summary));
    }
    let directory = options.cache_dir.clone().unwrap_or_else(std::env::temp_dir);
    let mut loading = Loading::new(options, tokenizer, TokenRowsWriter::new(directory));
    for (number, file) in files.iter().enumerate() {
        loading.file = (files.len() > 1).then_some(number);
        loading.first_rows.push(loading.kept);
        loading.read(file)?;
    }
    let (rows, summary) = loading.finish(files)?;
    let rows = match &cache {
        Some(cache) => {
            let summary = serde_json::to_vec(&summary)
                .map_err(|e| Error::malformed(cache.path(), e.to_string()))?;
            rows.finish_as(cache.path(), &summary)?
        }
        None => rows.finish()?,
    };
    Ok(dataset(files, rows, summary))
}

fn dataset(files: &[PathBuf], rows: TokenRows, summary: Summary) -> Dataset {
    Dataset {
        rows,
        files: files.to_vec(),
        first_rows: summary.first_rows,
        format: summary.format,
        detected: summary.detected,
        stats: summary.stats,
        findings: summary.findings,
    }
}

/// The state of one load.
struct Loading<'a> {
    options: &'a LoadOptions,
    tokenizer: Option<&'a Tokenizer>,
    /// Known after the first row.
    format: Option<(DatasetFormat, String)>,
    rows: TokenRowsWriter,
    /// Rows that have been pushed.
    kept: usize,
    /// Before each file.
    first_rows: Vec<usize>,
    /// The one that is read, where there are several.
    file: Option<usize>,
    stats: LoadStats,
    findings: Findings,
    /// Records that may still be read.
    remaining: usize,
}

/// Some records of a file, and what stopped the reader after them.
struct Chunk {
    records: Vec<Record>,
    error: Option<Error>,
}

impl<'a> Loading<'a> {
    fn new(
        options: &'a LoadOptions,
        tokenizer: Option<&'a Tokenizer>,
        rows: TokenRowsWriter,
    ) -> Self {
        Self {
            options,
            tokenizer,
            format: None,
            rows,
            kept: 0,
            first_rows: Vec::new(),
            file: None,
            stats: LoadStats::default(),
            findings: Findings {
                pad_is_eos: tokenizer.is_some_and(Tokenizer::pads_with_eos),
                ..Findings::default()
            },
            remaining: options.max_samples.unwrap_or(usize::MAX),
        }
    }

    fn read(&mut self, path: &Path) -> Result<()> {
        let mut records = reader::open(path)?;
        let mut chunk = self.next_chunk(&mut records);
        self.remaining -= chunk.records.len();
        while let Some(first) = chunk.records.first() {
            let format = self.format(path, first)?;
            let encoder = Encoder {
                format,
                options: self.options,
                tokenizer: self.tokenizer,
            };
            let read = std::mem::take(&mut chunk.records);
            let (encoded, next) = match chunk.error.take() {
                Some(error) => (encode(path, &encoder, read), Err(error)),
                None => rayon::join(
                    || encode(path, &encoder, read),
                    || Ok(self.next_chunk(&mut records)),
                ),
            };
            self.add(encoded?)?;
            chunk = next?;
            self.remaining -= chunk.records.len();
        }
        match chunk.error {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn next_chunk(&self, records: &mut Records) -> Chunk {
        let mut chunk = Chunk {
            records: Vec::new(),
            error: None,
        };
        let mut bytes = 0;
        while chunk.records.len() < self.remaining.min(CHUNK_RECORDS) && bytes < CHUNK_BYTES {
            match records.next() {
                None => break,
                Some(Err(error)) => {
                    chunk.error = Some(error);
                    break;
                }
                Some(Ok(record)) => {
                    bytes += record.bytes();
                    chunk.records.push(record);
                }
            }
        }
        chunk
    }

    /// The format of the rows, which the first one decides.
    fn format(&mut self, path: &Path, first: &Record) -> Result<DatasetFormat> {
        if let Some((format, _)) = self.format {
            return Ok(format);
        }
        let (format, detected) = match self.options.format {
            Some(format) => (format, format!("dataset_format {format}, as asked for")),
            None => first
                .clone()
                .parse()
                .and_then(|row| rename(row, &self.options.columns))
                .and_then(|row| DatasetFormat::detect(&row))
                .map_err(|reason| row_error(path, first.line, reason))?,
        };
        if format != DatasetFormat::Tokenized && self.tokenizer.is_none() {
            return Err(Error::config(
                "dataset_format",
                format!(
                    "{format} needs the model's tokenizer; give a model directory that has a tokenizer.json ({SENTENCEPIECE_ALONE})"
                ),
            ));
        }
        self.format = Some((format, detected));
        Ok(format)
    }

    fn add(&mut self, rows: Vec<Encoded>) -> Result<()> {
        for row in rows {
            self.stats.rows += 1;
            let (file, line) = (self.file, row.example.line);
            if row.is_too_long {
                self.findings.too_long.add(file, line);
                self.stats.dropped += 1;
                continue;
            }
            self.stats.truncated += usize::from(row.cut.row);
            let target_tokens = row.example.target_count();
            if target_tokens == 0 && self.options.unlabelled == Unlabelled::Drop {
                self.findings.all_masked.add(file, line);
                self.stats.dropped += 1;
                continue;
            }
            for (is_found, finding) in [
                (row.cut.answer, &mut self.findings.answer_cut),
                (row.has_doubled_bos, &mut self.findings.doubled_bos),
                (row.lacks_end, &mut self.findings.missing_end),
            ] {
                if is_found {
                    finding.add(file, line);
                }
            }
            self.stats.tokens += row.example.input_ids.len();
            self.stats.target_tokens += target_tokens;
            self.rows.push(&row.example)?;
            self.kept += 1;
        }
        Ok(())
    }

    fn finish(self, files: &[PathBuf]) -> Result<(TokenRowsWriter, Summary)> {
        let file = files.first().map_or(Path::new(""), PathBuf::as_path);
        let (format, detected) = self
            .format
            .ok_or_else(|| Error::malformed(file, "the file has no rows"))?;
        let stats = self.stats;
        if stats.dropped == stats.rows {
            let Findings {
                all_masked,
                too_long,
                ..
            } = self.findings;
            let first = if all_masked.rows > 0 {
                all_masked
            } else {
                too_long
            };
            let file = first.first_file.map_or(file, |file| &files[file]);
            let line = first.first_line.unwrap_or(1);
            let reason = match (all_masked.rows, too_long.rows) {
                (0, 0) => "the file has no instances".to_string(),
                (0, _) => format!(
                    "all {} rows are longer than the limits, and excess_length_strategy drop leaves none; raise max_seq_len",
                    stats.rows
                ),
                _ => format!(
                    "all labels are -100, and so in all {} rows: there is nothing to train on{}",
                    stats.rows,
                    if stats.truncated + too_long.rows > 0 {
                        "; raise max_seq_len, which cut the answers off"
                    } else {
                        ""
                    }
                ),
            };
            return Err(row_error(file, line, reason));
        }
        let summary = Summary {
            first_rows: self.first_rows,
            format,
            detected,
            stats,
            findings: self.findings,
        };
        Ok((self.rows, summary))
    }
}

/// Of several bad rows the first in the file is reported, whichever thread came first.
fn encode(path: &Path, encoder: &Encoder, records: Vec<Record>) -> Result<Vec<Encoded>> {
    let rows: Vec<Result<Vec<Encoded>>> = records
        .into_par_iter()
        .map(|record| {
            let line = record.line;
            encoder
                .encode(record)
                .map_err(|reason| row_error(path, line, reason))
        })
        .collect();
    let rows: Vec<Vec<Encoded>> = rows.into_iter().collect::<Result<_>>()?;
    Ok(rows.into_iter().flatten().collect())
}

fn row_error(path: &Path, line: usize, reason: String) -> Error {
    Error::Row {
        path: path.to_path_buf(),
        line,
        reason,
    }
}
