//! Packing: rows laid together into sequences of at most `capacity` tokens, by best-fit decreasing.
//!
//! The longest row comes first, and each goes where the least room is left after it. Attention does not reach from one row
//! into another and positions restart, so that what is computed is the same as without packing.
//!
//! Source: Ding et al. 2024, arXiv:2404.10830.

use std::cmp::Reverse;
use std::collections::BTreeMap;

/// Rows by the sequence that they lie in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Packing {
    /// Sequence after sequence.
    rows: Vec<usize>,
    /// Where each sequence ends in `rows`.
    ends: Vec<usize>,
}

impl Packing {
    /// Packs `rows`, whose lengths `tokens` gives. A row longer than `capacity` has a sequence of its own. Rows of one
    /// length keep their order; sequences come in the order of their longest row.
    pub fn best_fit_decreasing(
        mut rows: Vec<usize>,
        capacity: usize,
        tokens: impl Fn(usize) -> usize,
    ) -> Self {
        rows.sort_by_key(|&row| Reverse(tokens(row)));
        // Sequences by the room that is left in them.
        let mut with_room: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        let mut sequence_of = Vec::with_capacity(rows.len());
        let mut sequences = 0;
        for &row in &rows {
            let len = tokens(row);
            let fullest = with_room.range_mut(len..).next();
            let (room, sequence) = match fullest {
                Some((&room, open)) => {
                    let sequence = open.pop().expect("an entry without sequences is removed");
                    if open.is_empty() {
                        with_room.remove(&room);
                    }
                    (room, sequence)
                }
                None => {
                    sequences += 1;
                    (capacity.max(len), sequences - 1)
                }
            };
            sequence_of.push(sequence);
            if room > len {
                with_room.entry(room - len).or_default().push(sequence);
            }
        }
        Self::group(&rows, &sequence_of, sequences)
    }

    /// Sorts rows by their sequence, counting first.
    fn group(rows: &[usize], sequence_of: &[usize], sequences: usize) -> Self {
        let mut ends = vec![0; sequences];
        for &sequence in sequence_of {
            ends[sequence] += 1;
        }
        let mut total = 0;
        for end in &mut ends {
            total += *end;
            *end = total;
        }
        let mut next: Vec<usize> = std::iter::once(0).chain(ends.iter().copied()).collect();
        let mut grouped = vec![0; rows.len()];
        for (&row, &sequence) in rows.iter().zip(sequence_of) {
            grouped[next[sequence]] = row;
            next[sequence] += 1;
        }
        Self {
            rows: grouped,
            ends,
        }
    }

    /// Sequences.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// The rows of sequence `i`.
    pub fn rows(&self, i: usize) -> &[usize] {
        let start = i.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.rows[start..self.ends[i]]
    }
}
