//! The order of rows over a whole run: an endless sequence of epochs, each a permutation of all rows.
//!
//! A permutation depends on `(data_seed, epoch)` alone, so a resumed run needs only its position.

use super::split_mix::SplitMix64;

/// Whether rows are shuffled anew in each epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shuffle {
    Yes,
    /// File order, wrapping.
    No,
}

impl From<bool> for Shuffle {
    fn from(shuffle: bool) -> Self {
        if shuffle { Self::Yes } else { Self::No }
    }
}

/// Maps positions of a run to rows; every window of `rows` positions that starts an epoch holds each row once.
#[derive(Debug, Clone)]
pub struct RowOrder {
    rows: usize,
    data_seed: u64,
    shuffle: Shuffle,
    epoch: Option<u64>,
    permutation: Vec<usize>,
}

impl RowOrder {
    /// The order of `rows` rows.
    ///
    /// # Panics
    /// If `rows` is 0: [`load`](super::load) never returns an empty data set.
    pub fn new(rows: usize, data_seed: u64, shuffle: Shuffle) -> Self {
        assert!(rows > 0, "a row order needs at least one row");
        Self {
            rows,
            data_seed,
            shuffle,
            epoch: None,
            permutation: Vec::new(),
        }
    }

    /// The row at `position`, counted from 0 over all epochs. Takes `&mut self` to keep the epoch's permutation.
    pub fn row(&mut self, position: u64) -> usize {
        let epoch = position / self.rows as u64;
        let index = (position % self.rows as u64) as usize;
        if self.shuffle == Shuffle::No {
            return index;
        }
        if self.epoch != Some(epoch) {
            self.permutation = permutation(self.rows, self.data_seed, epoch);
            self.epoch = Some(epoch);
        }
        self.permutation[index]
    }
}

/// Fisher-Yates over `0..rows`.
pub(super) fn permutation(rows: usize, data_seed: u64, epoch: u64) -> Vec<usize> {
    let mut generator = generator(data_seed, epoch);
    let mut permutation: Vec<usize> = (0..rows).collect();
    for last in (1..rows).rev() {
        let other = generator.below(last as u64 + 1) as usize;
        permutation.swap(last, other);
    }
    permutation
}

/// A stream of its own for each `(seed, epoch)`: the seed is mixed before the epoch is added, so that neighbouring seeds
/// and epochs share no stretch of output.
fn generator(seed: u64, epoch: u64) -> SplitMix64 {
    let mixed = SplitMix64::new(seed).next_u64();
    SplitMix64::new(SplitMix64::new(mixed.wrapping_add(epoch)).next_u64())
}
