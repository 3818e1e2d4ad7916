//! Which rows come at which position of a run: an endless sequence of epochs.
//!
//! A position counts sequences, as `per_device_train_batch_size` does: a row, or the rows that are packed together. What
//! stands at a position depends on `data_seed` and the position alone, so a resumed run needs no more than that number.
//!
//! [`Arrangement::GroupedByLength`] follows transformers (`get_length_grouped_indices`): rows are shuffled, taken in pieces of 50
//! batches, each piece is sorted by length, and the longest row of all comes first, so that what does not fit into memory
//! fails at once.

use std::cmp::Reverse;
use std::ops::Range;

use super::packing::Packing;
use super::row_order::{RowOrder, Shuffle, permutation};
use super::split_mix::SplitMix64;

/// Batches in a piece that is sorted by length, and the fewest pieces there shall be.
const GROUPED_BATCHES: usize = 50;
const GROUPED_PIECES: usize = 4;

/// How the rows of an epoch are arranged into sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrangement {
    /// A row is a sequence; shuffled anew in each epoch, or as they come.
    InTurn(Shuffle),
    /// A row is a sequence, next to others of about its length; `batch` sequences make an optimizer step.
    GroupedByLength { batch: usize },
    /// A sequence holds rows of at most `capacity` tokens together.
    Packed { capacity: usize, shuffle: Shuffle },
}

/// Rows of one data set, and how often each is used in an epoch.
#[derive(Debug, Clone, PartialEq)]
pub struct Share {
    pub rows: Range<usize>,
    /// 1: once. 2: twice. 0.5: half of the rows, and the other half in the next epoch.
    pub weight: f64,
}

/// Maps positions of a run to rows.
#[derive(Debug, Clone)]
pub struct SequenceOrder {
    tokens: Vec<u32>,
    shares: Vec<Share>,
    data_seed: u64,
    arrangement: Arrangement,
    /// The first position of each epoch that is known.
    starts: Vec<u64>,
    current: Option<(u64, Epoch)>,
}

/// The sequences of one epoch.
#[derive(Debug, Clone)]
enum Epoch {
    Rows(Vec<usize>),
    Packed { packing: Packing, order: Vec<usize> },
}

impl Epoch {
    fn len(&self) -> usize {
        match self {
            Self::Rows(rows) => rows.len(),
            Self::Packed { order, .. } => order.len(),
        }
    }

    fn rows(&self, i: usize) -> &[usize] {
        match self {
            Self::Rows(rows) => &rows[i..=i],
            Self::Packed { packing, order } => packing.rows(order[i]),
        }
    }
}

impl SequenceOrder {
    /// The order of rows with the lengths `tokens`. `shares` cover them one after another.
    ///
    /// # Panics
    /// If no share gives a row: [`load`](super::load) never returns an empty data set.
    pub fn new(
        tokens: Vec<u32>,
        shares: Vec<Share>,
        data_seed: u64,
        arrangement: Arrangement,
    ) -> Self {
        let order = Self {
            tokens,
            shares,
            data_seed,
            arrangement,
            starts: vec![0],
            current: None,
        };
        assert!(
            order.rows_in_an_epoch() > 0,
            "an order needs at least one row"
        );
        order
    }

    /// The order of rows that are all used once in an epoch.
    ///
    /// # Panics
    /// If there are none.
    pub fn of_rows(tokens: Vec<u32>, data_seed: u64, arrangement: Arrangement) -> Self {
        let rows = 0..tokens.len();
        Self::new(
            tokens,
            vec![Share { rows, weight: 1.0 }],
            data_seed,
            arrangement,
        )
    }

    /// The rows of the sequence at `position`, counted from 0 over all epochs. Takes `&mut self` to keep the epoch.
    pub fn rows(&mut self, position: u64) -> &[usize] {
        let (epoch, start) = self.epoch_at(position);
        if self
            .current
            .as_ref()
            .is_none_or(|(known, _)| *known != epoch)
        {
            self.current = Some((epoch, self.arrange(epoch)));
        }
        let (_, epoch) = self.current.as_ref().expect("set above");
        epoch.rows((position - start) as usize)
    }

    /// Tokens of the sequence at `position`.
    pub fn tokens(&mut self, position: u64) -> usize {
        let rows = self.rows(position).to_vec();
        rows.into_iter().map(|row| self.tokens[row] as usize).sum()
    }

    /// Passes over the data up to `position`.
    pub fn epochs(&mut self, position: u64) -> f64 {
        let (epoch, start) = self.epoch_at(position);
        let end = self.start_of(epoch + 1);
        epoch as f64 + (position - start) as f64 / (end - start) as f64
    }

    /// Sequences of the first `epochs` passes over the data.
    pub fn sequences(&mut self, epochs: f64) -> f64 {
        let whole = epochs.floor();
        let start = self.start_of(whole as u64);
        let next = self.start_of(whole as u64 + 1);
        start as f64 + (epochs - whole) * (next - start) as f64
    }

    /// Whether a sequence can hold several rows.
    pub fn is_packed(&self) -> bool {
        matches!(self.arrangement, Arrangement::Packed { .. })
    }

    /// The most tokens that a sequence can have.
    pub fn longest_sequence(&self) -> usize {
        let longest = self.tokens.iter().copied().max().unwrap_or(0) as usize;
        match self.arrangement {
            Arrangement::Packed { capacity, .. } => longest.max(capacity),
            _ => longest,
        }
    }

    /// The epoch of `position` and where it starts.
    fn epoch_at(&mut self, position: u64) -> (u64, u64) {
        if let Some(len) = self.constant_len() {
            let epoch = position / len;
            return (epoch, epoch * len);
        }
        while *self.starts.last().expect("never empty") <= position {
            self.start_of(self.starts.len() as u64);
        }
        let epoch = self.starts.partition_point(|&start| start <= position) - 1;
        (epoch as u64, self.starts[epoch])
    }

    /// The first position of `epoch`.
    fn start_of(&mut self, epoch: u64) -> u64 {
        if let Some(len) = self.constant_len() {
            return epoch * len;
        }
        while self.starts.len() as u64 <= epoch {
            let last = self.starts.len() as u64 - 1;
            let len = self.arrange(last).len() as u64;
            self.starts.push(self.starts[last as usize] + len);
        }
        self.starts[epoch as usize]
    }

    /// Sequences in an epoch, where all have as many. Packed epochs do if each holds rows of the same lengths, which it does
    /// unless a weight takes other rows in the next.
    fn constant_len(&mut self) -> Option<u64> {
        if !self.is_packed() {
            return Some(self.rows_in_an_epoch() as u64);
        }
        let is_whole = |share: &Share| {
            share
                .rows_in_an_epoch()
                .is_multiple_of(share.rows.len().max(1))
        };
        if !self.shares.iter().all(is_whole) {
            return None;
        }
        if self.starts.len() == 1 {
            self.starts.push(self.arrange(0).len() as u64);
        }
        Some(self.starts[1])
    }

    fn rows_in_an_epoch(&self) -> usize {
        self.shares.iter().map(Share::rows_in_an_epoch).sum()
    }

    fn arrange(&self, epoch: u64) -> Epoch {
        let rows = self.epoch_rows(epoch);
        let tokens = |row: usize| self.tokens[row] as usize;
        match self.arrangement {
            Arrangement::InTurn(Shuffle::No) => Epoch::Rows(rows),
            Arrangement::InTurn(Shuffle::Yes) => Epoch::Rows(self.shuffled(rows, epoch)),
            Arrangement::GroupedByLength { batch } => {
                Epoch::Rows(grouped_by_length(self.shuffled(rows, epoch), batch, tokens))
            }
            Arrangement::Packed { capacity, shuffle } => {
                let rows = match shuffle {
                    Shuffle::Yes => self.shuffled(rows, epoch),
                    Shuffle::No => rows,
                };
                let packing = Packing::best_fit_decreasing(rows, capacity, tokens);
                let order = match shuffle {
                    Shuffle::Yes => permutation(packing.len(), !self.data_seed, epoch),
                    Shuffle::No => {
                        let mut order: Vec<usize> = (0..packing.len()).collect();
                        order.sort_by_key(|&i| packing.rows(i).iter().min().copied());
                        order
                    }
                };
                Epoch::Packed { packing, order }
            }
        }
    }

    fn shuffled(&self, rows: Vec<usize>, epoch: u64) -> Vec<usize> {
        let order = permutation(rows.len(), self.data_seed, epoch);
        order.into_iter().map(|i| rows[i]).collect()
    }

    /// The rows of an epoch, each as often as its share says, before they are arranged.
    fn epoch_rows(&self, epoch: u64) -> Vec<usize> {
        let mut rows = Vec::with_capacity(self.rows_in_an_epoch());
        for (i, share) in self.shares.iter().enumerate() {
            let (count, used) = (share.rows.len(), share.rows_in_an_epoch());
            if count == used {
                rows.extend(share.rows.clone());
                continue;
            }
            let seed = SplitMix64::new(self.data_seed.wrapping_add(i as u64)).next_u64();
            let mut order = RowOrder::new(count, seed, Shuffle::Yes);
            let start = epoch * used as u64;
            rows.extend(
                (start..start + used as u64).map(|position| share.rows.start + order.row(position)),
            );
        }
        rows
    }
}

impl Share {
    fn rows_in_an_epoch(&self) -> usize {
        match self.rows.len() {
            0 => 0,
            count => ((count as f64 * self.weight).round() as usize).max(1),
        }
    }
}

fn grouped_by_length(
    mut rows: Vec<usize>,
    batch: usize,
    tokens: impl Fn(usize) -> usize,
) -> Vec<usize> {
    let batches = (rows.len() / (batch * GROUPED_PIECES)).clamp(1, GROUPED_BATCHES);
    let piece = batches * batch;
    for piece in rows.chunks_mut(piece) {
        piece.sort_by_key(|&row| Reverse(tokens(row)));
    }
    let firsts = (0..rows.len()).step_by(piece);
    // Of several longest rows the first, as torch's argmax takes it.
    if let Some(longest) = firsts.min_by_key(|&i| Reverse(tokens(rows[i]))) {
        rows.swap(0, longest);
    }
    rows
}
