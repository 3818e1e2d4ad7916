//! One row of a data file as token ids and labels, cut to length and checked.

use std::ops::Range;

use serde_json::Value;

use super::columns::{Columns, integers, optional};
use super::conversation::Conversation;
use super::excess_length::{Cut, Row};
use super::reader::Record;
use super::source_target::{SourceTarget, pairs, tokenize};
use super::{DatasetFormat, Example, ExcessLength, LoadOptions, Tokenizer, TrainOnSource};
use crate::IGNORE_INDEX;

/// A row as training sees it, and what was found on the way.
#[derive(Debug, Clone)]
pub(super) struct Encoded {
    pub example: Example,
    pub cut: Cut,
    /// Longer than it may be, and left out for it.
    pub is_too_long: bool,
    pub has_doubled_bos: bool,
    /// A trained stretch ends without an end token, though nothing was cut off.
    pub lacks_end: bool,
}

/// How the rows of one file become tokens.
pub(super) struct Encoder<'a> {
    pub format: DatasetFormat,
    pub options: &'a LoadOptions,
    pub tokenizer: Option<&'a Tokenizer>,
}

/// A row before `max_seq_len` is applied.
struct Tokens {
    row: Row,
    cut: Cut,
    /// What was too long, where that is known before the whole row is.
    excess: Option<String>,
}

impl Encoder<'_> {
    /// The examples of a record: one, or as many as it has instances. The error is the reason.
    pub fn encode(&self, record: Record) -> Result<Vec<Encoded>, String> {
        let line = record.line;
        let row = rename(record.parse()?, &self.options.columns)?;
        let rows = self.tokens(&row)?;
        rows.into_iter()
            .map(|tokens| self.finish(tokens, line))
            .collect()
    }

    fn tokens(&self, row: &Columns) -> Result<Vec<Tokens>, String> {
        let turns = self.options.turns;
        let tokens = match self.format {
            DatasetFormat::Tokenized => tokenized(row)?,
            DatasetFormat::Messages => {
                self.conversation(&Conversation::from_messages(row, turns)?)?
            }
            DatasetFormat::Sharegpt => {
                self.conversation(&Conversation::from_sharegpt(row, turns)?)?
            }
            format => {
                let tokenizer = self.tokenizer()?;
                let fits = |source: &str| -> Result<bool, String> {
                    let ids = tokenizer.encode(source).map_err(|e| e.to_string())?;
                    Ok(ids.len() < self.options.source_max_len)
                };
                let pairs = pairs(row, format, fits)?;
                return pairs
                    .iter()
                    .map(|pair| self.source_target(tokenizer, pair))
                    .collect();
            }
        };
        Ok(vec![Tokens {
            row: tokens,
            cut: Cut::default(),
            excess: None,
        }])
    }

    fn tokenizer(&self) -> Result<&Tokenizer, String> {
        self.tokenizer
            .ok_or_else(|| format!("format {} needs a tokenizer", self.format))
    }

    fn source_target(&self, tokenizer: &Tokenizer, pair: &SourceTarget) -> Result<Tokens, String> {
        let ids = tokenize(tokenizer, pair)?;
        let (mut source, mut target) = (ids.source, ids.target);
        let source_max_len = self.options.source_max_len;
        let target_max_len = match self.format {
            DatasetFormat::Completion => usize::MAX,
            format => self
                .options
                .target_max_len
                .unwrap_or(format.default_target_max_len()),
        };
        let mut excess = None;
        for (name, len, max) in [
            ("source", source.len(), source_max_len),
            ("target", target.len(), target_max_len),
        ] {
            if len > max {
                excess = Some(format!(
                    "the {name} has {len} tokens and {name}_max_len is {max}"
                ));
            }
        }
        let cut = Cut {
            row: excess.is_some(),
            answer: target.len() > target_max_len,
        };
        source.truncate(source_max_len);
        target.truncate(target_max_len);
        let source_len = source.len();
        source.extend(target);
        let mut labels: Vec<i64> = source.iter().map(|&id| i64::from(id)).collect();
        if self.options.train_on_source == TrainOnSource::No {
            labels[..source_len].fill(IGNORE_INDEX);
        }
        let row = Row {
            input_ids: source,
            labels,
        };
        Ok(Tokens { row, cut, excess })
    }

    fn conversation(&self, conversation: &Conversation) -> Result<Row, String> {
        let tokenizer = self.tokenizer()?;
        let template = tokenizer.chat_template().ok_or(
            "the model has no chat template; add `chat_template` to its tokenizer_config.json or use dataset_format \
             input-output",
        )?;
        let Conversation {
            messages,
            tools,
            trained,
        } = conversation;
        let is_whole = self.options.train_on_source == TrainOnSource::Yes;
        let nothing = vec![false; trained.len()];
        let trained = if is_whole { &nothing } else { trained };
        let render = |messages: &[Value]| template.render_turns(messages, tools.as_ref(), trained);
        let chat = render(messages)
            .or_else(|error| match conversation.without_null_content() {
                Some(messages) => render(&messages).map_err(|_| error),
                None => Err(error),
            })
            .map_err(|e| e.to_string())?;
        conversation.expect_calls_in(&chat.text)?;
        let encoding = tokenizer
            .encode_with_offsets(&chat.text)
            .map_err(|e| e.to_string())?;
        let mut labels: Vec<i64> = encoding.ids.iter().map(|&id| i64::from(id)).collect();
        if !is_whole {
            let mask = encoding.mask(&chat.assistant);
            for (label, _) in labels
                .iter_mut()
                .zip(mask)
                .filter(|(_, is_assistant)| !is_assistant)
            {
                *label = IGNORE_INDEX;
            }
        }
        Ok(Row {
            input_ids: encoding.ids,
            labels,
        })
    }

    /// Applies `max_seq_len`, and looks at the row.
    fn finish(&self, tokens: Tokens, line: usize) -> Result<Encoded, String> {
        let Tokens {
            mut row,
            mut cut,
            mut excess,
        } = tokens;
        self.expect_known_tokens(&row)?;
        let max_seq_len = self.options.max_seq_len.unwrap_or(usize::MAX);
        if row.input_ids.len() > max_seq_len {
            let len = row.input_ids.len();
            excess.get_or_insert_with(|| {
                format!("the row has {len} tokens and max_seq_len is {max_seq_len}")
            });
        }
        let bos = self.tokenizer.and_then(Tokenizer::bos_token_id);
        if let Some(excess) = excess {
            match self.options.excess_length {
                ExcessLength::Error => {
                    return Err(format!(
                        "{excess}; raise it, or set excess_length_strategy to drop or truncate"
                    ));
                }
                ExcessLength::Drop => {
                    return Ok(Encoded {
                        example: example(row, line),
                        cut: Cut::default(),
                        is_too_long: true,
                        has_doubled_bos: false,
                        lacks_end: false,
                    });
                }
                ExcessLength::Truncate => {
                    let whole_row = match self.format {
                        // Their author knows what stands where.
                        DatasetFormat::Tokenized => row.cut_right(max_seq_len),
                        _ => row.cut(max_seq_len, bos),
                    };
                    cut.row |= whole_row.row;
                    cut.answer |= whole_row.answer;
                }
            }
        }
        let ids = &row.input_ids;
        Ok(Encoded {
            has_doubled_bos: bos.is_some_and(|bos| ids.starts_with(&[bos, bos])),
            lacks_end: !cut.answer && self.lacks_end(&row),
            cut,
            is_too_long: false,
            example: example(row, line),
        })
    }

    /// Whether a trained stretch ends in the middle of ordinary text, so that the model never learns to stop there.
    fn lacks_end(&self, row: &Row) -> bool {
        let Some(tokenizer) = self.tokenizer else {
            return false;
        };
        let is_trained = |i: usize| {
            row.labels
                .get(i)
                .is_some_and(|&label| label != IGNORE_INDEX)
        };
        let ends = (0..row.labels.len()).filter(|&i| is_trained(i) && !is_trained(i + 1));
        let mut ends = ends.map(|i| row.input_ids[i]);
        ends.any(|id| !tokenizer.is_end(id))
    }

    fn expect_known_tokens(&self, row: &Row) -> Result<(), String> {
        let Some(vocab_size) = self.options.vocab_size else {
            return Ok(());
        };
        let input_ids = row.input_ids.iter().map(|&id| ("input_ids", i64::from(id)));
        let labels = row.labels.iter().map(|&label| ("labels", label));
        match input_ids
            .chain(labels)
            .find(|(_, id)| *id >= vocab_size as i64)
        {
            None => Ok(()),
            Some((name, id)) => {
                let beyond = format!(
                    "`{name}` has token id {id}, beyond the model's vocabulary of {vocab_size}"
                );
                let text = u32::try_from(id)
                    .ok()
                    .zip(self.tokenizer)
                    .map(|(id, tokenizer)| tokenizer.token_text(id));
                Err(match text {
                    Some(text) if self.format != DatasetFormat::Tokenized => format!(
                        "{beyond}: the tokenizer has {text:?}, which was added after the model was made; take it out, or \
                         resize the model's embeddings first"
                    ),
                    _ => beyond,
                })
            }
        }
    }
}

fn example(row: Row, line: usize) -> Example {
    Example {
        input_ids: row.input_ids,
        labels: row.labels,
        line,
    }
}

/// Gives columns the names of the format; pairs are (name in the format, name in the file).
pub(super) fn rename(mut row: Columns, columns: &[(String, String)]) -> Result<Columns, String> {
    let mut renamed = Vec::with_capacity(columns.len());
    for (name, in_file) in columns {
        let value = row.get(in_file).cloned().ok_or_else(|| {
            format!(
                "dataset_columns takes `{name}` from the column `{in_file}`, which is missing; the row has {}",
                super::columns::names(&row)
            )
        })?;
        renamed.push((name.clone(), value));
    }
    for (_, in_file) in columns {
        row.shift_remove(in_file);
    }
    row.extend(renamed);
    Ok(row)
}

fn tokenized(row: &Columns) -> Result<Row, String> {
    let mut input_ids = integers::<u32>(row, "input_ids")?;
    let mut labels = match optional(row, "labels") {
        None => input_ids.iter().map(|&id| i64::from(id)).collect(),
        Some(_) => integers::<i64>(row, "labels")?,
    };
    if labels.len() != input_ids.len() {
        return Err(format!(
            "`labels` has {} entries and `input_ids` has {}, expected as many",
            labels.len(),
            input_ids.len()
        ));
    }
    let is_label = |&label: &i64| label == IGNORE_INDEX || u32::try_from(label).is_ok();
    if let Some(i) = labels.iter().position(|label| !is_label(label)) {
        return Err(format!(
            "`labels[{i}]` is {}, expected a token id or {IGNORE_INDEX}",
            labels[i]
        ));
    }
    if row
        .get("attention_mask")
        .is_some_and(|mask| !mask.is_null())
    {
        let seen = seen(&integers::<u8>(row, "attention_mask")?, input_ids.len())?;
        input_ids = input_ids[seen.clone()].to_vec();
        labels = labels[seen].to_vec();
    }
    match input_ids.is_empty() {
        true => Err("`input_ids` is empty".into()),
        false => Ok(Row { input_ids, labels }),
    }
}

/// Which of `count` tokens a row's mask leaves: those without the padding on either side.
fn seen(mask: &[u8], count: usize) -> Result<Range<usize>, String> {
    if mask.len() != count {
        let found = mask.len();
        return Err(format!(
            "`attention_mask` has {found} entries and `input_ids` has {count}, expected as many"
        ));
    }
    let is_seen = |entry: &u8| *entry != 0;
    let start = mask.iter().position(is_seen).unwrap_or(count);
    let end = mask
        .iter()
        .rposition(is_seen)
        .map_or(start, |last| last + 1);
    match mask[start..end].iter().position(|entry| *entry == 0) {
        None => Ok(start..end),
        Some(at) => Err(format!(
            "`attention_mask[{}]` is 0 between tokens that are seen; only padding at the ends is left out",
            start + at
        )),
    }
}
