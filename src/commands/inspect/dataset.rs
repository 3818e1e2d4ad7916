//! A data file as text: counts, a histogram of lengths, and the first rows with the tokens that carry loss marked.

use std::fmt;
use std::path::Path;

use qlora::IGNORE_INDEX;
use qlora::data::{Dataset, Example, SpecialTokens, Tokenizer};

const BAR_WIDTH: usize = 40;
/// Longest run of tokens that may make up one character.
const TOKENS_PER_CHARACTER: usize = 4;

/// How the tokens that carry loss are told from the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marks {
    /// Green against grey, in two shades by turns so that the tokens can be counted.
    Colours,
    /// `«` and `»` around each run.
    Quotes,
}

/// What is printed of a data set.
pub struct View<'a> {
    pub path: &'a Path,
    pub dataset: &'a Dataset,
    /// Without one, token ids are shown.
    pub tokenizer: Option<&'a Tokenizer>,
    pub max_seq_len: Option<usize>,
    pub rows: usize,
    pub marks: Marks,
}

impl fmt::Display for View<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stats = self.dataset.stats;
        writeln!(f, "{}: {}", self.path.display(), self.dataset.detected)?;
        write!(f, "{} rows read, {} dropped", stats.rows, stats.dropped)?;
        if stats.dropped > 0 {
            f.write_str(" (no label other than -100)")?;
        }
        match self.max_seq_len {
            Some(max) => writeln!(f, ", {} truncated to {max} tokens", stats.truncated)?,
            None => writeln!(f, ", 0 truncated (no max_seq_len)")?,
        }
        let share = 100.0 * stats.target_tokens as f64 / stats.tokens.max(1) as f64;
        writeln!(
            f,
            "{} tokens, {} of them trained ({share:.1} %)",
            stats.tokens, stats.target_tokens
        )?;
        writeln!(f, "\nrows by length in tokens")?;
        self.histogram(f)?;
        let shown = self.dataset.examples.iter().take(self.rows);
        if shown.len() > 0 {
            let legend = match self.marks {
                Marks::Colours => format!(
                    "{}trained{} {}not trained{}",
                    GREEN[0], RESET, GREY[0], RESET
                ),
                Marks::Quotes => "«trained» not trained".into(),
            };
            writeln!(f, "\n{legend}")?;
        }
        for example in shown {
            self.row(f, example)?;
        }
        Ok(())
    }
}

const GREEN: [&str; 2] = ["\x1b[1;32m", "\x1b[1;92m"];
const GREY: [&str; 2] = ["\x1b[2m", "\x1b[0m"];
const RESET: &str = "\x1b[0m";

impl View<'_> {
    /// Buckets end at powers of two; a bar's length is its share of the largest bucket.
    fn histogram(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut buckets = std::collections::BTreeMap::new();
        for example in &self.dataset.examples {
            *buckets
                .entry(example.input_ids.len().next_power_of_two())
                .or_insert(0usize) += 1;
        }
        let largest = buckets.values().copied().max().unwrap_or(1);
        for (end, count) in buckets {
            let bar = "#".repeat((count * BAR_WIDTH).div_ceil(largest));
            writeln!(f, "{:>7} to {end:<7} {bar} {count}", end / 2 + 1)?;
        }
        Ok(())
    }

    fn row(&self, f: &mut fmt::Formatter<'_>, example: &Example) -> fmt::Result {
        let tokens = example.input_ids.len();
        let trained = example.target_count();
        writeln!(
            f,
            "\nline {}: {tokens} tokens, {trained} trained",
            example.line
        )?;
        let mut was_trained = false;
        for (i, piece) in self.pieces(example).iter().enumerate() {
            match self.marks {
                Marks::Colours => {
                    let colour = if piece.is_trained { GREEN } else { GREY }[i % 2];
                    write!(f, "{colour}{}{RESET}", piece.text)?;
                }
                Marks::Quotes => {
                    if piece.is_trained != was_trained {
                        f.write_str(if piece.is_trained { "«" } else { "»" })?;
                    }
                    f.write_str(&piece.text)?;
                }
            }
            was_trained = piece.is_trained;
        }
        if was_trained && self.marks == Marks::Quotes {
            f.write_str("»")?;
        }
        writeln!(f)
    }

    /// The row's tokens as text. Neighbours that make up one character only together are one piece.
    fn pieces(&self, example: &Example) -> Vec<Piece> {
        let is_trained = |i: usize| i > 0 && example.labels[i] != IGNORE_INDEX;
        let ids = &example.input_ids;
        let Some(tokenizer) = self.tokenizer else {
            let piece = |(i, id): (usize, &u32)| Piece {
                text: format!("{id} "),
                is_trained: is_trained(i),
            };
            return ids.iter().enumerate().map(piece).collect();
        };
        let mut pieces = Vec::new();
        let mut start = 0;
        while start < ids.len() {
            let whole_character = (start + 2..=ids.len().min(start + TOKENS_PER_CHARACTER))
                .filter(|_| !is_text(tokenizer, &ids[start..=start]))
                .take_while(|&end| is_trained(end - 1) == is_trained(start))
                .find(|&end| is_text(tokenizer, &ids[start..end]));
            let (text, end) = match whole_character {
                Some(end) => (decode(tokenizer, &ids[start..end]).unwrap_or_default(), end),
                None => (tokenizer.token_text(ids[start]), start + 1),
            };
            pieces.push(Piece {
                text: visible(&text),
                is_trained: is_trained(start),
            });
            start = end;
        }
        pieces
    }
}

struct Piece {
    text: String,
    is_trained: bool,
}

fn decode(tokenizer: &Tokenizer, ids: &[u32]) -> Option<String> {
    tokenizer.decode(ids, SpecialTokens::Keep).ok()
}

/// Whether `ids` decode to whole characters.
fn is_text(tokenizer: &Tokenizer, ids: &[u32]) -> bool {
    decode(tokenizer, ids).is_some_and(|text| !text.contains('\u{FFFD}'))
}

/// Line feeds are shown and kept; other control characters are escaped, so that data cannot steer the terminal.
fn visible(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => shown.push_str("⏎\n"),
            '\t' => shown.push('⇥'),
            c if c.is_control() => shown.extend(c.escape_default()),
            c => shown.push(c),
        }
    }
    shown
}
