//! Records to tokens and masks, and those to batches. No device, no model.
//!
//! A data file goes through [`load`]: each row becomes an [`Example`] by its [`DatasetFormat`], with the model's own
//! [`Tokenizer`] and [`ChatTemplate`]. [`SequenceOrder`] says which examples come at which position of a run, and
//! [`Batch::from_examples`] lays examples one after another.
//!
//! ```text
//! reader (file -> rows)   format (which columns)   source_target, conversation (-> text and turns)   chat_template (-> spans)
//! encode (-> token ids and labels)   excess_length (cuts)   token_rows, cache (on disk)   sequence_order, packing (-> batches)
//! ```

mod added_tokens;
mod cache;
mod chat_template;
mod columns;
mod conversation;
mod encode;
mod excess_length;
mod files;
mod format;
mod load;
mod mmlu;
mod options;
mod packing;
mod python_compat;
mod reader;
mod row_order;
mod sequence_order;
mod source_target;
mod split_mix;
mod template_files;
mod token_rows;
mod tokenizer;

pub use chat_template::{ChatTemplate, GenerationPrompt, RenderedChat, chat_message};
pub use excess_length::ExcessLength;
pub use files::{data_files, training_files};
pub use format::DatasetFormat;
pub use load::{Dataset, load, load_files};
pub use mmlu::{LETTERS, Mmlu, MmluFile, MmluOptions, Question, letter_ids, mmlu_files, read_mmlu};
pub use options::{Finding, Findings, LoadOptions, LoadStats, TrainOnSource, Turns, Unlabelled};
pub use reader::is_data_file;
pub use row_order::{RowOrder, Shuffle};
pub use sequence_order::{Arrangement, SequenceOrder, Share};
pub use split_mix::SplitMix64;
pub use tokenizer::{Encoding, SpecialTokens, Tokenizer};

use crate::IGNORE_INDEX;

/// One training row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    pub input_ids: Vec<u32>,
    /// As long as `input_ids` and not shifted; [`IGNORE_INDEX`] = no loss.
    pub labels: Vec<i64>,
    /// The line (JSONL) or record of the data file, counted from 1.
    pub line: usize,
}

/// Sequences laid one after another, without padding.
///
/// # Shapes
/// `input_ids`, `labels`, `positions: [N]`; `cu_seqlens: [B + 1]`, from 0 to N.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    pub input_ids: Vec<u32>,
    /// Shifted: the label of a row is the NEXT token of its sequence; the last row of a sequence has none.
    pub labels: Vec<i64>,
    pub positions: Vec<u32>,
    pub cu_seqlens: Vec<usize>,
}

impl Example {
    /// How many tokens are predicted with loss: labels other than [`IGNORE_INDEX`], the first one not counted,
    /// because nothing stands before it.
    pub fn target_count(&self) -> usize {
        self.labels
            .iter()
            .skip(1)
            .filter(|&&label| label != IGNORE_INDEX)
            .count()
    }
}

impl Batch {
    /// Lays `examples` one after another and shifts their labels by one.
    ///
    /// # Shapes
    /// `N` is the sum of the lengths of the examples, `B` their number.
    pub fn from_examples(examples: &[&Example]) -> Self {
        let rows = examples.iter().map(|e| e.input_ids.len()).sum();
        let mut batch = Self {
            input_ids: Vec::with_capacity(rows),
            labels: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            cu_seqlens: Vec::with_capacity(examples.len() + 1),
        };
        batch.cu_seqlens.push(0);
        for example in examples {
            batch.input_ids.extend_from_slice(&example.input_ids);
            batch.labels.extend(example.labels.iter().skip(1));
            if !example.labels.is_empty() {
                batch.labels.push(IGNORE_INDEX);
            }
            batch.positions.extend(0..example.input_ids.len() as u32);
            batch.cu_seqlens.push(batch.input_ids.len());
        }
        batch
    }

    /// How many rows carry loss.
    pub fn target_count(&self) -> usize {
        self.labels.iter().filter(|&&l| l != IGNORE_INDEX).count()
    }

    /// `N`, the number of tokens.
    pub fn token_count(&self) -> usize {
        self.input_ids.len()
    }
}
