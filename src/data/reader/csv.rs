//! CSV and TSV rows, with the quotes checked: the parser takes an unclosed quote for a very long field.

use std::io::{self, BufRead, Read};
use std::path::{Path, PathBuf};

use csv::{ErrorKind, ReaderBuilder, StringRecord};
use serde_json::{Map, Value};

use super::{Content, MAX_ROW_BYTES, Record, Records, Text, bad_row, row_error, too_large};
use crate::{Error, Result};

/// The records below the line of column names.
pub(super) fn rows(path: PathBuf, text: Text, delimiter: u8) -> Result<Records> {
    let mut reader = ReaderBuilder::new()
        .delimiter(delimiter)
        .from_reader(Checked::new(text, delimiter));
    let headers = reader.headers().map_err(|e| error(&path, e))?.clone();
    for (i, name) in headers.iter().enumerate() {
        if headers.iter().take(i).any(|other| other == name) {
            return Err(bad_row(
                &path,
                1,
                format!("two columns are called `{name}`"),
            ));
        }
    }
    let mut records = Some(reader.into_records());
    Ok(Box::new(std::iter::from_fn(move || {
        let record = match records.as_mut()?.next()? {
            Ok(record) => Ok(to_record(&headers, &record)),
            Err(e) => {
                records = None;
                Err(error(&path, e))
            }
        };
        Some(record)
    })))
}

fn to_record(headers: &StringRecord, record: &StringRecord) -> Record {
    let columns = headers.iter().zip(record);
    let columns: Map<String, Value> = columns
        .map(|(name, field)| (name.to_string(), field.into()))
        .collect();
    Record {
        line: record
            .position()
            .map_or(1, |position| position.line() as usize),
        content: Content::Columns(columns),
    }
}

fn error(path: &Path, error: csv::Error) -> Error {
    let line = |position: Option<&csv::Position>| position.map_or(1, |p| p.line() as usize);
    match error.into_kind() {
        ErrorKind::Io(e) => match e.downcast::<BadText>() {
            Ok(bad) => bad_row(path, bad.line, bad.reason),
            Err(e) => row_error(path, 1)(e),
        },
        ErrorKind::Utf8 { pos, err } => bad_row(
            path,
            line(pos.as_ref()),
            format!("invalid UTF-8 in column {}", err.field() + 1),
        ),
        ErrorKind::UnequalLengths {
            pos,
            expected_len,
            len,
        } => bad_row(
            path,
            line(pos.as_ref()),
            format!(
                "the row has {len} fields and the line of column names {expected_len}; is a quote missing?"
            ),
        ),
        other => Error::malformed(path, format!("{other:?}")),
    }
}

/// What [`Checked`] stops at; it travels inside an [`io::Error`].
#[derive(Debug, thiserror::Error)]
#[error("line {line}: {reason}")]
struct BadText {
    line: usize,
    reason: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    FieldStart,
    Plain,
    Quoted,
    /// After a quote inside a quoted field: its end, or the first half of a quote that stands for itself.
    AfterQuote,
}

/// Passes text on while it is well-formed CSV.
struct Checked {
    text: Text,
    delimiter: u8,
    place: Place,
    line: usize,
    quote_line: usize,
    row_bytes: usize,
    /// The last byte was a carriage return that ended a line.
    was_return: bool,
}

impl Checked {
    fn new(text: Text, delimiter: u8) -> Self {
        Self {
            text,
            delimiter,
            place: Place::FieldStart,
            line: 1,
            quote_line: 1,
            row_bytes: 0,
            was_return: false,
        }
    }

    /// Follows `byte`; `None` if the parser need not see it.
    fn check(&mut self, byte: u8) -> Result<Option<u8>, BadText> {
        let bad = |line, reason: String| Err(BadText { line, reason });
        // The parser counts lines by their line feeds, so every end of a line becomes one.
        if std::mem::take(&mut self.was_return) && byte == b'\n' {
            return Ok(None);
        }
        self.was_return = byte == b'\r' && self.place != Place::Quoted;
        let byte = if self.was_return { b'\n' } else { byte };
        self.row_bytes += 1;
        self.place = match (self.place, byte) {
            (_, 0) => return bad(self.line, "a NUL byte: this is not text".into()),
            (Place::Quoted, b'"') => Place::AfterQuote,
            (Place::Quoted, _) => Place::Quoted,
            (Place::FieldStart, b'"') => {
                self.quote_line = self.line;
                Place::Quoted
            }
            (Place::AfterQuote, b'"') => Place::Quoted,
            (_, b'\n') => {
                self.row_bytes = 0;
                Place::FieldStart
            }
            (_, byte) if byte == self.delimiter => Place::FieldStart,
            (Place::AfterQuote, byte) => {
                let found = char::from(byte);
                let reason = format!(
                    "{found:?} follows a closing quote; a quote inside a field is written \"\""
                );
                return bad(self.line, reason);
            }
            _ => Place::Plain,
        };
        if self.row_bytes > MAX_ROW_BYTES {
            return bad(self.line, too_large());
        }
        self.line += usize::from(byte == b'\n');
        Ok(Some(byte))
    }

    fn unreadable(&self, error: io::Error) -> BadText {
        let line = self.line;
        let reason = match row_error(Path::new(""), line)(error) {
            Error::Row { reason, .. } => reason,
            other => other.to_string(),
        };
        BadText { line, reason }
    }
}

impl Read for Checked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut written = 0;
        while written == 0 && !buffer.is_empty() {
            let available = match self.text.fill_buf() {
                Ok(available) => available,
                Err(e) => return Err(io::Error::other(self.unreadable(e))),
            };
            let len = available.len().min(buffer.len());
            buffer[..len].copy_from_slice(&available[..len]);
            self.text.consume(len);
            if len == 0 && self.place == Place::Quoted {
                return Err(io::Error::other(BadText {
                    line: self.quote_line,
                    reason: "a quote is opened here and never closed".into(),
                }));
            }
            if len == 0 {
                break;
            }
            for i in 0..len {
                if let Some(byte) = self.check(buffer[i]).map_err(io::Error::other)? {
                    buffer[written] = byte;
                    written += 1;
                }
            }
        }
        Ok(written)
    }
}
