//! Records to tokens and masks, and those to batches. No device, no model.

/// One training row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    pub input_ids: Vec<u32>,
    /// As long as `input_ids` and not shifted; [`IGNORE_INDEX`](crate::IGNORE_INDEX) = no loss.
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
