//! JSON rows: lines, or the values of a `.json` file cut apart without parsing them.

use std::io::{BufRead, Read};
use std::path::PathBuf;

use super::{Content, MAX_ROW_BYTES, Record, Text, bad_row, row_error, too_large};
use crate::Result;

/// The lines of a file that are not blank.
pub(super) struct Lines {
    path: PathBuf,
    text: Option<Text>,
    line: usize,
}

impl Lines {
    pub fn new(path: PathBuf, text: Text) -> Self {
        Self {
            path,
            text: Some(text),
            line: 0,
        }
    }

    fn read(&mut self) -> Result<Option<Record>> {
        let Some(text) = &mut self.text else {
            return Ok(None);
        };
        loop {
            self.line += 1;
            let mut line = Vec::new();
            let read = text
                .take(MAX_ROW_BYTES as u64 + 1)
                .read_until(b'\n', &mut line)
                .map_err(row_error(&self.path, self.line))?;
            if read == 0 {
                return Ok(None);
            }
            if read > MAX_ROW_BYTES {
                return Err(bad_row(&self.path, self.line, too_large()));
            }
            if !line.trim_ascii().is_empty() {
                if line.ends_with(b"\n") {
                    line.pop();
                }
                return Ok(Some(Record {
                    line: self.line,
                    content: Content::Json(line),
                }));
            }
        }
    }
}

impl Iterator for Lines {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        let record = self.read().transpose();
        if !matches!(record, Some(Ok(_))) {
            self.text = None;
        }
        record
    }
}

/// The elements of a JSON array, or values one after another. What is inside a value is left to the parser: here only
/// brackets and strings are followed.
pub(super) struct Values {
    path: PathBuf,
    text: Option<Text>,
    line: usize,
    /// `None` until the first byte has said it.
    is_array: Option<bool>,
    /// Whether an element of the array has been read, so that a comma has to come before the next.
    has_element: bool,
}

impl Values {
    pub fn new(path: PathBuf, text: Text) -> Self {
        Self {
            path,
            text: Some(text),
            line: 1,
            is_array: None,
            has_element: false,
        }
    }

    fn read(&mut self) -> Result<Option<Record>> {
        if self.text.is_none() {
            return Ok(None);
        }
        let mut first = self.next_visible()?;
        if self.is_array.is_none() {
            self.is_array = Some(first == Some(b'['));
            if first == Some(b'[') {
                first = self.next_visible()?;
            }
        }
        if self.is_array == Some(true) {
            return self.element(first);
        }
        match first {
            None => Ok(None),
            Some(first) => self.value(first).map(Some),
        }
    }

    /// The next element of the array, whose first visible byte is `byte`: a comma, the end, or the element itself.
    fn element(&mut self, mut byte: Option<u8>) -> Result<Option<Record>> {
        if byte == Some(b']') {
            return match self.next_visible()? {
                None => Ok(None),
                Some(_) => Err(self.bad("bad JSON: something follows the array")),
            };
        }
        if self.has_element {
            if byte != Some(b',') {
                return Err(self.bad(match byte {
                    None => "bad JSON: the array has no end".into(),
                    Some(byte) => format!(
                        "bad JSON: expected `,` or `]`, found {:?}",
                        char::from(byte)
                    ),
                }));
            }
            byte = self.next_visible()?;
        }
        self.has_element = true;
        match byte {
            None => Err(self.bad("bad JSON: the array has no end")),
            Some(first) => self.value(first).map(Some),
        }
    }

    /// The value that starts with `first`.
    fn value(&mut self, first: u8) -> Result<Record> {
        let line = self.line;
        let mut bytes = vec![first];
        let mut depth = usize::from(matches!(first, b'{' | b'['));
        let mut in_string = first == b'"';
        let mut is_escaped = false;
        while depth > 0 || in_string || is_scalar(first) {
            let Some(byte) = self.peek()? else {
                // An unfinished value is the parser's to explain.
                break;
            };
            if depth == 0
                && !in_string
                && matches!(byte, b',' | b']' | b'}' | b' ' | b'\t' | b'\r' | b'\n')
            {
                break;
            }
            self.take(byte);
            bytes.push(byte);
            if bytes.len() > MAX_ROW_BYTES {
                return Err(bad_row(&self.path, line, too_large()));
            }
            match byte {
                _ if is_escaped => is_escaped = false,
                b'\\' if in_string => is_escaped = true,
                b'"' => in_string = !in_string,
                _ if in_string => {}
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth = depth.saturating_sub(1),
                _ => {}
            }
        }
        Ok(Record {
            line,
            content: Content::Json(bytes),
        })
    }

    /// The next byte that is not white space, taken.
    fn next_visible(&mut self) -> Result<Option<u8>> {
        while let Some(byte) = self.peek()? {
            self.take(byte);
            if !byte.is_ascii_whitespace() {
                return Ok(Some(byte));
            }
        }
        Ok(None)
    }

    fn peek(&mut self) -> Result<Option<u8>> {
        let Some(text) = &mut self.text else {
            return Ok(None);
        };
        let buffer = text.fill_buf().map_err(row_error(&self.path, self.line))?;
        Ok(buffer.first().copied())
    }

    fn take(&mut self, byte: u8) {
        self.line += usize::from(byte == b'\n');
        if let Some(text) = &mut self.text {
            text.consume(1);
        }
    }

    fn bad(&self, reason: impl Into<String>) -> crate::Error {
        bad_row(&self.path, self.line, reason)
    }
}

fn is_scalar(first: u8) -> bool {
    !matches!(first, b'{' | b'[' | b'"')
}

impl Iterator for Values {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        let record = self.read().transpose();
        if !matches!(record, Some(Ok(_))) {
            self.text = None;
        }
        record
    }
}
