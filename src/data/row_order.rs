//! The order of rows over a whole run: an endless sequence of epochs, each a permutation of all rows.
//!
//! A permutation depends on `(data_seed, epoch)` alone, so a resumed run needs only its position. The generator is
//! SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195), written out because its output must never change.

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
fn permutation(rows: usize, data_seed: u64, epoch: u64) -> Vec<usize> {
    let mut generator = SplitMix64::new(data_seed, epoch);
    let mut permutation: Vec<usize> = (0..rows).collect();
    for last in (1..rows).rev() {
        let other = generator.below(last as u64 + 1) as usize;
        permutation.swap(last, other);
    }
    permutation
}

struct SplitMix64(u64);

impl SplitMix64 {
    /// A stream of its own for each `(seed, epoch)`: the seed is mixed before the epoch is added, so that
    /// neighbouring seeds and epochs share no stretch of output.
    fn new(seed: u64, epoch: u64) -> Self {
        let mixed = Self(seed).next();
        Self(Self(mixed.wrapping_add(epoch)).next())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `0..bound`: values of the last, incomplete cycle of `bound` are drawn again.
    fn below(&mut self, bound: u64) -> u64 {
        let limit = u64::MAX - u64::MAX % bound;
        loop {
            let value = self.next();
            if value < limit {
                return value % bound;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix64_gives_the_published_sequence() {
        // The first outputs for seed 1234567 of Vigna's reference splitmix64.c.
        let mut generator = SplitMix64(1234567);
        let expected = [
            6457827717110365317,
            3203168211198807973,
            9817491932198370423,
            4593380528125082431,
            16408922859458223821,
        ];
        assert_eq!(expected.map(|_| generator.next()), expected);
    }
}
