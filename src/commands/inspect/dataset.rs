//! A data set as training will see it: counts, what is likely wrong, lengths, batches, and the first rows with the tokens
//! that carry loss marked. As text, and as JSON.

use std::fmt::{self, Write};
use std::path::Path;

use qlora::IGNORE_INDEX;
use qlora::data::{Dataset, Example, SpecialTokens, Tokenizer};
use qlora::train::{BatchPlan, RunData, TrainConfig};
use serde_json::{Value, json};

const BAR_WIDTH: usize = 40;
/// Longest run of tokens that may make up one character.
const TOKENS_PER_CHARACTER: usize = 4;

/// How the tokens that carry loss are told from the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marks {
    /// Green against grey, in two shades by turns so that the tokens can be counted; special tokens underlined.
    Colours,
    /// `«` and `»` around each run.
    Quotes,
}

/// What is shown of a data set.
pub struct View<'a> {
    pub path: &'a Path,
    pub data: &'a RunData,
    pub plan: &'a BatchPlan,
    /// Without one, token ids are shown.
    pub tokenizer: Option<&'a Tokenizer>,
    pub config: &'a TrainConfig,
    /// Rows to show.
    pub rows: usize,
}

/// Rows whose lengths lie between two powers of two.
pub struct Bucket {
    pub from: usize,
    pub to: usize,
    pub rows: usize,
    /// The share of the largest bucket, in 0..=1.
    pub share: f64,
}

impl View<'_> {
    pub fn dataset(&self) -> &Dataset {
        &self.data.sources[0].dataset
    }

    /// The rows that are shown: the first training rows.
    pub fn examples(&self) -> impl Iterator<Item = Example> {
        let count = self.rows.min(self.data.train_len());
        (0..count).map(|i| self.data.train_example(i))
    }

    pub fn json(&self) -> Value {
        let dataset = self.dataset();
        let rows: Vec<Value> = self
            .examples()
            .map(|example| json!({"input_ids": example.input_ids, "labels": example.labels}))
            .collect();
        json!({
            "path": self.path,
            "dataset_format": dataset.format,
            "detected": dataset.detected,
            "stats": dataset.stats,
            "findings": dataset.findings,
            "train_rows": self.data.train_len(),
            "eval_rows": self.data.eval_len().unwrap_or(0),
            "unused_rows": self.data.unused,
            "batches": self.plan,
            "rows": rows,
        })
    }

    pub fn text(&self, marks: Marks) -> String {
        let mut text = String::new();
        self.write(&mut text, marks)
            .expect("a string takes everything");
        text
    }

    fn write(&self, f: &mut impl Write, marks: Marks) -> fmt::Result {
        writeln!(f, "{}: {}", self.path.display(), self.dataset().detected)?;
        for line in self.summary() {
            writeln!(f, "{line}")?;
        }
        for sentence in self.dataset().sentences() {
            writeln!(f, "! {sentence}")?;
        }
        writeln!(f, "\nrows by length in tokens")?;
        for bucket in self.histogram() {
            let bar = "#".repeat((bucket.share * BAR_WIDTH as f64).ceil() as usize);
            writeln!(
                f,
                "{:>7} to {:<7} {bar} {}",
                bucket.from, bucket.to, bucket.rows
            )?;
        }
        if self.rows > 0 {
            let legend = match marks {
                Marks::Colours => {
                    format!("{}trained{RESET} {}not trained{RESET}", GREEN[0], GREY[0])
                }
                Marks::Quotes => "«trained» not trained".into(),
            };
            writeln!(f, "\n{legend}")?;
        }
        for example in self.examples() {
            self.row(f, &example, marks)?;
        }
        Ok(())
    }

    /// Counts of rows, tokens and batches, a line each.
    pub fn summary(&self) -> Vec<String> {
        let stats = self.dataset().stats;
        let limit = match self.config.max_seq_len {
            Some(max) => format!(" (max_seq_len {max})"),
            None => String::new(),
        };
        let share = 100.0 * stats.target_tokens as f64 / stats.tokens.max(1) as f64;
        let mut lines = vec![
            format!(
                "{} rows read, {} dropped, {} truncated{limit}",
                stats.rows, stats.dropped, stats.truncated
            ),
            format!(
                "{} tokens, {} of them trained ({share:.1} %)",
                stats.tokens, stats.target_tokens
            ),
        ];
        if self.data.eval_len().is_some() || self.data.unused > 0 {
            lines.push(format!(
                "{} rows to train on, {} to evaluate on, {} unused",
                self.data.train_len(),
                self.data.eval_len().unwrap_or(0),
                self.data.unused
            ));
        }
        lines.push(self.batches());
        lines
    }

    fn batches(&self) -> String {
        let plan = self.plan;
        let steps = format!(
            "{} steps an epoch at {} x {} sequences; micro-batches of {:.0} tokens, at most {}",
            plan.steps,
            self.config.gradient_accumulation_steps,
            self.config.per_device_train_batch_size,
            plan.mean_micro_batch_tokens,
            plan.largest_micro_batch_tokens
        );
        match (plan.fill, plan.padded_fill) {
            (Some(fill), _) => format!(
                "{steps}; {} packed sequences, {:.1} % full",
                plan.sequences,
                100.0 * fill
            ),
            (None, Some(fill)) if self.config.per_device_train_batch_size > 1 => {
                format!(
                    "{steps}; nothing is padded (padded ones would be {:.1} % full)",
                    100.0 * fill
                )
            }
            _ => steps,
        }
    }

    /// Buckets end at powers of two.
    pub fn histogram(&self) -> Vec<Bucket> {
        let mut buckets = std::collections::BTreeMap::new();
        let dataset = self.dataset();
        for i in 0..dataset.len() {
            *buckets
                .entry(dataset.token_count(i).next_power_of_two())
                .or_insert(0usize) += 1;
        }
        let largest = buckets.values().copied().max().unwrap_or(1) as f64;
        let bucket = |(to, rows): (usize, usize)| Bucket {
            from: to / 2 + 1,
            to,
            rows,
            share: rows as f64 / largest,
        };
        buckets.into_iter().map(bucket).collect()
    }

    fn row(&self, f: &mut impl Write, example: &Example, marks: Marks) -> fmt::Result {
        let tokens = example.input_ids.len();
        let trained = example.target_count();
        writeln!(
            f,
            "\nline {}: {tokens} tokens, {trained} trained",
            example.line
        )?;
        let mut was_trained = false;
        for (i, piece) in self.pieces(example).iter().enumerate() {
            let text = visible(&piece.text);
            match marks {
                Marks::Colours => {
                    let colour = if piece.is_trained { GREEN } else { GREY }[i % 2];
                    let special = if piece.is_special { UNDERLINE } else { "" };
                    write!(f, "{colour}{special}{text}{RESET}")?;
                }
                Marks::Quotes => {
                    if piece.is_trained != was_trained {
                        f.write_str(if piece.is_trained { "«" } else { "»" })?;
                    }
                    f.write_str(&text)?;
                }
            }
            was_trained = piece.is_trained;
        }
        if was_trained && marks == Marks::Quotes {
            f.write_str("»")?;
        }
        writeln!(f)
    }

    /// The row's tokens as text. Neighbours that make up one character only together are one piece.
    pub fn pieces(&self, example: &Example) -> Vec<Piece> {
        let is_trained = |i: usize| i > 0 && example.labels[i] != IGNORE_INDEX;
        let ids = &example.input_ids;
        let Some(tokenizer) = self.tokenizer else {
            let piece = |(i, id): (usize, &u32)| Piece {
                text: format!("{id} "),
                is_trained: is_trained(i),
                is_special: false,
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
                text,
                is_trained: is_trained(start),
                is_special: tokenizer.is_special(ids[start]),
            });
            start = end;
        }
        pieces
    }
}

/// A token, or several that make up a character together.
pub struct Piece {
    pub text: String,
    pub is_trained: bool,
    pub is_special: bool,
}

const GREEN: [&str; 2] = ["\x1b[1;32m", "\x1b[1;92m"];
const GREY: [&str; 2] = ["\x1b[2m", "\x1b[0m"];
const UNDERLINE: &str = "\x1b[4m";
const RESET: &str = "\x1b[0m";

fn decode(tokenizer: &Tokenizer, ids: &[u32]) -> Option<String> {
    tokenizer.decode(ids, SpecialTokens::Keep).ok()
}

/// Whether `ids` decode to whole characters.
fn is_text(tokenizer: &Tokenizer, ids: &[u32]) -> bool {
    decode(tokenizer, ids).is_some_and(|text| !text.contains('\u{FFFD}'))
}

/// Line feeds are shown and kept; other control characters are escaped, so that data cannot steer the terminal.
pub fn visible(text: &str) -> String {
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
