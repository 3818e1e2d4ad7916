//! Tokenized rows: in memory while they are few, else in a file that is mapped, so that a million of them take no memory
//! in proportion. The same file is what the cache keeps.
//!
//! Byte layout, in the machine's order of bytes: the magic number; for each row its token ids (u32) and then its labels
//! (i32); padding to 8 bytes; for each row the end of its words and its line (u64 each); a summary as JSON; and the
//! numbers of words, rows and bytes of the summary, the first 8 bytes of a BLAKE3 hash of rows' ends and summary, and the magic
//! number again (u64 each).

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use tempfile::NamedTempFile;

use super::Example;
use crate::{Error, Result};

const MAGIC: u64 = u64::from_le_bytes(*b"qlorarow");
const TRAILER_WORDS: usize = 5;

/// Rows stay in memory up to here: what a few thousand take.
const MEMORY_WORDS: usize = 4 << 20;

/// One row's place: the end of its words, counted from the first row, and its line.
type Place = [u64; 2];

/// Rows in their order.
#[derive(Debug)]
pub(super) struct TokenRows(Backing);

#[derive(Debug)]
enum Backing {
    Memory {
        words: Vec<u32>,
        places: Vec<Place>,
    },
    Mapped {
        map: Mmap,
        words: usize,
        places_at: usize,
        rows: usize,
    },
}

impl TokenRows {
    pub fn len(&self) -> usize {
        self.places().len()
    }

    /// Tokens of row `i`.
    pub fn token_count(&self, i: usize) -> usize {
        let (start, end) = self.range(i);
        (end - start) / 2
    }

    /// A copy of row `i`.
    pub fn example(&self, i: usize) -> Example {
        let (start, end) = self.range(i);
        let (input_ids, labels) = self.words()[start..end].split_at((end - start) / 2);
        Example {
            input_ids: input_ids.to_vec(),
            labels: labels
                .iter()
                .map(|&label| i64::from(label as i32))
                .collect(),
            line: self.places()[i][1] as usize,
        }
    }

    fn range(&self, i: usize) -> (usize, usize) {
        let places = self.places();
        let start = i.checked_sub(1).map_or(0, |before| places[before][0]);
        (start as usize, places[i][0] as usize)
    }

    fn places(&self) -> &[Place] {
        match &self.0 {
            Backing::Memory { places, .. } => places,
            Backing::Mapped {
                map,
                places_at,
                rows,
                ..
            } => bytemuck::cast_slice(&map[*places_at..*places_at + rows * size_of::<Place>()]),
        }
    }

    fn words(&self) -> &[u32] {
        match &self.0 {
            Backing::Memory { words, .. } => words,
            Backing::Mapped { map, words, .. } => bytemuck::cast_slice(&map[8..8 + 4 * words]),
        }
    }

    /// Maps the file `path`, and returns the summary that was written with the rows; `None` if it is not a whole file of
    /// rows.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read.
    pub fn open(path: &Path) -> Result<Option<(Self, Vec<u8>)>> {
        let file = File::open(path).map_err(Error::io(path))?;
        Self::map(&file).map_err(Error::io(path))
    }

    fn map(file: &File) -> io::Result<Option<(Self, Vec<u8>)>> {
        if file.metadata()?.len() == 0 {
            return Ok(None);
        }
        // SAFETY: the mapping is read-only, and files of rows are never written to once they have their name.
        let map = unsafe { Mmap::map(file)? };
        Ok(Self::check(map))
    }

    /// Nothing is taken from a file but what lies in it, whoever wrote it.
    fn check(map: Mmap) -> Option<(Self, Vec<u8>)> {
        let trailer_at = map.len().checked_sub(8 * TRAILER_WORDS)?;
        let number = |at: usize| {
            let bytes = map.get(at..at + 8)?.try_into().ok()?;
            Some(u64::from_ne_bytes(bytes))
        };
        let size = |at: usize| usize::try_from(number(at)?).ok();
        let (words, rows) = (size(trailer_at)?, size(trailer_at + 8)?);
        let summary_len = size(trailer_at + 16)?;
        let places_at = words
            .checked_mul(4)?
            .checked_add(8)?
            .checked_next_multiple_of(8)?;
        let summary_at = rows
            .checked_mul(size_of::<Place>())?
            .checked_add(places_at)?;
        let is_whole = number(0)? == MAGIC
            && number(trailer_at + 32)? == MAGIC
            && summary_at.checked_add(summary_len)? == trailer_at;
        if !is_whole || number(trailer_at + 24)? != checksum(&map[places_at..trailer_at]) {
            return None;
        }
        let summary = map[summary_at..trailer_at].to_vec();
        let found = Self(Backing::Mapped {
            map,
            words,
            places_at,
            rows,
        });
        let mut end = 0;
        for &[next, _] in found.places() {
            if next < end || next % 2 != end % 2 {
                return None;
            }
            end = next;
        }
        (end == words as u64).then_some((found, summary))
    }
}

fn checksum(bytes: &[u8]) -> u64 {
    let hash = blake3::hash(bytes);
    u64::from_ne_bytes(
        hash.as_bytes()[..8]
            .try_into()
            .expect("a hash has 32 bytes"),
    )
}

/// Collects rows one after another.
pub(super) struct TokenRowsWriter {
    directory: PathBuf,
    memory_words: usize,
    words: Vec<u32>,
    places: Vec<Place>,
    written: usize,
    file: Option<BufWriter<NamedTempFile>>,
}

impl TokenRowsWriter {
    /// A writer whose file, if it comes to that, lies in `directory`.
    pub fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            memory_words: MEMORY_WORDS,
            words: Vec::new(),
            places: Vec::new(),
            written: 0,
            file: None,
        }
    }

    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn push(&mut self, example: &Example) -> Result<()> {
        self.words.extend_from_slice(&example.input_ids);
        self.words
            .extend(example.labels.iter().map(|&label| label as i32 as u32));
        let end = self.written + self.words.len();
        self.places.push([end as u64, example.line as u64]);
        if self.words.len() >= self.memory_words {
            self.spill().map_err(Error::io(&self.directory))?;
        }
        Ok(())
    }

    fn spill(&mut self) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                let mut file = BufWriter::new(NamedTempFile::new_in(&self.directory)?);
                file.write_all(&MAGIC.to_ne_bytes())?;
                self.file.insert(file)
            }
        };
        file.write_all(bytemuck::cast_slice(&self.words))?;
        self.written += self.words.len();
        self.words.clear();
        Ok(())
    }

    /// The rows, in memory if they are few. A file that was needed has no name and goes with them.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn finish(mut self) -> Result<TokenRows> {
        if self.file.is_none() {
            let (words, places) = (self.words, self.places);
            return Ok(TokenRows(Backing::Memory { words, places }));
        }
        let directory = self.directory.clone();
        let mut finish = || -> io::Result<_> { TokenRows::map(self.write_all(b"{}")?.as_file()) };
        let found = finish().map_err(Error::io(&directory))?;
        Ok(found.expect("a file that was just written is whole").0)
    }

    /// The rows in the file `path` with `summary` beside them; it appears when it is complete.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn finish_as(mut self, path: &Path, summary: &[u8]) -> Result<TokenRows> {
        let mut finish = || -> io::Result<_> {
            let file = self.write_all(summary)?;
            file.as_file().sync_all()?;
            let file = file.persist(path).map_err(|e| e.error)?;
            TokenRows::map(&file)
        };
        let found = finish().map_err(Error::io(path))?;
        Ok(found.expect("a file that was just written is whole").0)
    }

    fn write_all(&mut self, summary: &[u8]) -> io::Result<NamedTempFile> {
        self.spill()?;
        let mut file = self.file.take().expect("spilling makes the file");
        let bytes = 8 + 4 * self.written;
        file.write_all(&[0; 8][..bytes.next_multiple_of(8) - bytes])?;
        let mut index: Vec<u8> = bytemuck::cast_slice(&self.places).to_vec();
        index.extend_from_slice(summary);
        file.write_all(&index)?;
        let (words, rows) = (self.written as u64, self.places.len() as u64);
        for number in [words, rows, summary.len() as u64, checksum(&index), MAGIC] {
            file.write_all(&number.to_ne_bytes())?;
        }
        file.into_inner().map_err(io::IntoInnerError::into_error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples() -> Vec<Example> {
        let example = |n: u32| Example {
            input_ids: (0..n).collect(),
            labels: (0..i64::from(n))
                .map(|i| if i % 2 == 0 { -100 } else { i })
                .collect(),
            line: 7 * n as usize,
        };
        [3, 1, 0, 5].map(example).to_vec()
    }

    fn writer(dir: &Path, memory_words: usize) -> TokenRowsWriter {
        let mut writer = TokenRowsWriter::new(dir.into());
        writer.memory_words = memory_words;
        examples()
            .iter()
            .for_each(|example| writer.push(example).unwrap());
        writer
    }

    fn all(rows: &TokenRows) -> Vec<Example> {
        (0..rows.len()).map(|i| rows.example(i)).collect()
    }

    #[test]
    fn rows_are_the_same_in_memory_in_a_file_and_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows");
        assert_eq!(
            all(&writer(dir.path(), 1 << 20).finish().unwrap()),
            examples()
        );
        for memory_words in [1, 5, 1 << 20] {
            let spilled = writer(dir.path(), memory_words).finish().unwrap();
            assert_eq!(all(&spilled), examples());
            assert_eq!(spilled.token_count(3), 5);
            let named = writer(dir.path(), memory_words)
                .finish_as(&path, b"{\"a\":1}")
                .unwrap();
            assert_eq!(all(&named), examples());
            let (opened, summary) = TokenRows::open(&path).unwrap().unwrap();
            assert_eq!(
                (all(&opened), summary.as_slice()),
                (examples(), b"{\"a\":1}".as_slice())
            );
        }
    }

    #[test]
    fn a_damaged_file_is_not_taken_for_rows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows");
        writer(dir.path(), 1).finish_as(&path, b"{}").unwrap();
        let whole = std::fs::read(&path).unwrap();
        let words = 2 * 9 * 4 + 8;
        for len in 0..whole.len() {
            std::fs::write(&path, &whole[..len]).unwrap();
            assert!(TokenRows::open(&path).unwrap().is_none(), "{len} bytes");
        }
        for at in (0..8).chain(words..whole.len()) {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, &damaged).unwrap();
            assert!(TokenRows::open(&path).unwrap().is_none(), "byte {at}");
        }
    }
}
