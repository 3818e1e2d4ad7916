//! Rows of a local data file, one after another, with bounded memory.
//!
//! | name ends in | a row is |
//! |---|---|
//! | `.jsonl`, `.ndjson` | a line with a JSON object |
//! | `.json` | an element of a JSON array, or one of several objects one after another |
//! | `.csv`, `.tsv` | a record below the line of column names; quotes as in RFC 4180 |
//! | `.parquet` | a row |
//!
//! All but Parquet may be compressed by gzip or zstd; that is seen from the first bytes, and the name may end in `.gz` or `.zst`.

mod csv;
mod json;
mod parquet;

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::columns::kind;
use crate::{Error, Result};

/// A larger row is refused: it is more likely a broken file than a conversation.
const MAX_ROW_BYTES: usize = 64 << 20;

const BUFFER_BYTES: usize = 1 << 18;
const COMPRESSION_EXTENSIONS: [&str; 3] = ["gz", "zst", "zstd"];
const GZIP_MAGIC: &[u8] = &[0x1F, 0x8B];
const ZSTD_MAGIC: &[u8] = &[0x28, 0xB5, 0x2F, 0xFD];

/// A row before it is understood.
#[derive(Debug, Clone)]
pub(super) struct Record {
    /// Where the row begins, counted from 1: its line, or for Parquet its number.
    pub line: usize,
    pub content: Content,
}

#[derive(Debug, Clone)]
pub(super) enum Content {
    /// JSON text, parsed where there is time for it: on a thread of its own.
    Json(Vec<u8>),
    Columns(Map<String, Value>),
}

impl Record {
    /// About how much memory it takes.
    pub fn bytes(&self) -> usize {
        match &self.content {
            Content::Json(bytes) => bytes.len(),
            Content::Columns(columns) => columns.values().map(value_bytes).sum(),
        }
    }

    /// The columns by name; the error is the reason.
    pub fn parse(self) -> Result<Map<String, Value>, String> {
        let bytes = match self.content {
            Content::Columns(columns) => return Ok(columns),
            Content::Json(bytes) => bytes,
        };
        let text = std::str::from_utf8(&bytes)
            .map_err(|e| format!("invalid UTF-8 at byte {} of the row", e.valid_up_to() + 1))?;
        match serde_json::from_str(text).map_err(|e| bad_json(&e))? {
            Value::Object(record) => Ok(record),
            other => Err(format!("the row is {}, expected an object", kind(&other))),
        }
    }
}

fn value_bytes(value: &Value) -> usize {
    size_of::<Value>()
        + match value {
            Value::String(text) => text.len(),
            Value::Array(items) => items.iter().map(value_bytes).sum(),
            Value::Object(fields) => fields.values().map(value_bytes).sum(),
            _ => 0,
        }
}

/// serde_json's message without its line number, which counts within the row.
fn bad_json(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let message = message
        .rsplit_once(" at line ")
        .map_or(message.as_str(), |(message, _)| message);
    match error.line() {
        1 => format!("bad JSON: {message} at column {}", error.column()),
        line => format!(
            "bad JSON: {message} in line {line} of the row, column {}",
            error.column()
        ),
    }
}

/// The rows of one file in their order. After an error there are no more.
pub(super) type Records = Box<dyn Iterator<Item = Result<Record>> + Send>;

/// What a file's name says about how its rows are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FileKind {
    JsonLines,
    Json,
    Csv { delimiter: u8 },
    Parquet,
}

impl FileKind {
    fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        let mut parts = name.rsplit('.');
        let mut extension = parts.next()?;
        if COMPRESSION_EXTENSIONS.contains(&extension) {
            extension = parts.next()?;
        }
        // A name without a dot has no extension.
        parts.next()?;
        match extension {
            "jsonl" | "ndjson" => Some(Self::JsonLines),
            "json" => Some(Self::Json),
            "csv" => Some(Self::Csv { delimiter: b',' }),
            "tsv" => Some(Self::Csv { delimiter: b'\t' }),
            "parquet" => Some(Self::Parquet),
            _ => None,
        }
    }
}

/// Whether the name of `path` is that of a data file.
pub fn is_data_file(path: &Path) -> bool {
    FileKind::of(path).is_some()
}

/// Opens `path` by what its name says.
///
/// # Errors
/// [`Error::Malformed`] for a name that says nothing, [`Error::Io`] if the file cannot be opened; the rows themselves
/// give [`Error::Row`].
pub(super) fn open(path: &Path) -> Result<Records> {
    std::fs::metadata(path).map_err(Error::io(path))?;
    let kind = FileKind::of(path).ok_or_else(|| {
        Error::malformed(
            path,
            "expected a data file that ends in .jsonl (one JSON object a line), .json (an array of objects), .csv, .tsv or \
             .parquet, all but the last also with .gz or .zst after it",
        )
    })?;
    let file = File::open(path).map_err(Error::io(path))?;
    if kind == FileKind::Parquet {
        return parquet::rows(path, file);
    }
    let text = decompressed(path, file)?;
    let path = path.to_path_buf();
    Ok(match kind {
        FileKind::JsonLines => Box::new(json::Lines::new(path, text)),
        FileKind::Json => Box::new(json::Values::new(path, text)),
        FileKind::Csv { delimiter } => csv::rows(path, text, delimiter)?,
        FileKind::Parquet => unreachable!("returned above"),
    })
}

type Text = Box<dyn BufRead + Send>;

/// The text of a file, out of gzip or zstd where its first bytes say so, without a byte order mark.
fn decompressed(path: &Path, file: File) -> Result<Text> {
    let mut file = BufReader::with_capacity(BUFFER_BYTES, file);
    let magic = file.fill_buf().map_err(Error::io(path))?;
    let mut text: Text = if magic.starts_with(GZIP_MAGIC) {
        buffered(flate2::bufread::MultiGzDecoder::new(file))
    } else if magic.starts_with(ZSTD_MAGIC) {
        let decoder = zstd::stream::read::Decoder::with_buffer(file).map_err(Error::io(path))?;
        buffered(decoder)
    } else {
        Box::new(file)
    };
    let start = text.fill_buf().map_err(row_error(path, 1))?;
    if start.starts_with(b"\xEF\xBB\xBF") {
        text.consume(3);
    }
    Ok(text)
}

fn buffered(reader: impl Read + Send + 'static) -> Text {
    Box::new(BufReader::with_capacity(BUFFER_BYTES, reader))
}

/// A file that cannot be read on from `line`: cut off inside a compressed block, or a failing disk.
fn row_error(path: &Path, line: usize) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_path_buf();
    move |error| {
        let reason = match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                "the compressed file ends here, in the middle; it was not copied whole".to_string()
            }
            _ => format!("cannot read on: {error}"),
        };
        Error::Row { path, line, reason }
    }
}

fn too_large() -> String {
    format!("the row has more than {} MiB", MAX_ROW_BYTES >> 20)
}

/// A row error at `line` of `path`.
fn bad_row(path: &Path, line: usize, reason: impl Into<String>) -> Error {
    Error::Row {
        path: PathBuf::from(path),
        line,
        reason: reason.into(),
    }
}
