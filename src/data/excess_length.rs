//! What becomes of a row that is longer than it may be (`excess_length_strategy`).

use crate::IGNORE_INDEX;

/// What is done with a row that is longer than `max_seq_len`, `source_max_len` or `target_max_len`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum ExcessLength {
    /// It is left out and counted.
    Drop,
    /// It is cut, and answers that lose their end are counted.
    #[default]
    Truncate,
    /// The load stops.
    Error,
}

impl std::str::FromStr for ExcessLength {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "drop" => Ok(Self::Drop),
            "truncate" => Ok(Self::Truncate),
            "error" => Ok(Self::Error),
            _ => Err(format!("`{name}` is not drop, truncate or error")),
        }
    }
}

/// A cut row's tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    pub input_ids: Vec<u32>,
    pub labels: Vec<i64>,
}

/// What a cut took away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Cut {
    pub row: bool,
    /// A trained stretch lost its end, and with it its end token.
    pub answer: bool,
}

impl Row {
    fn is_trained(&self, i: usize) -> bool {
        self.labels
            .get(i)
            .is_some_and(|&label| label != IGNORE_INDEX)
    }

    /// Cuts on the right alone.
    pub fn cut_right(&mut self, max_len: usize) -> Cut {
        if self.input_ids.len() <= max_len {
            return Cut::default();
        }
        let answer = max_len > 0 && self.is_trained(max_len - 1) && self.is_trained(max_len);
        self.input_ids.truncate(max_len);
        self.labels.truncate(max_len);
        Cut { row: true, answer }
    }

    /// Cuts a prompt and its answer so that they stay next to each other.
    ///
    /// A prompt gives way first: it loses its beginning (but for `bos`), down to half of `max_len`; then the answer loses
    /// its end. A conversation with several answers is cut on the right, unless that leaves none of them: then the
    /// first is kept with the end of its prompt.
    pub fn cut(&mut self, max_len: usize, bos: Option<u32>) -> Cut {
        if self.input_ids.len() <= max_len {
            return Cut::default();
        }
        let Some(first) = (0..self.labels.len()).find(|&i| self.is_trained(i)) else {
            return self.cut_right(max_len);
        };
        let end = (first..self.labels.len())
            .find(|&i| !self.is_trained(i))
            .unwrap_or(self.labels.len());
        let has_more_answers = (end..self.labels.len()).any(|i| self.is_trained(i));
        if has_more_answers && first < max_len {
            return self.cut_right(max_len);
        }
        self.input_ids.truncate(end);
        self.labels.truncate(end);
        let answer = end - first;
        let prompt = first.min(max_len.saturating_sub(answer).max(first.min(max_len / 2)));
        let start =
            usize::from(prompt > 0 && bos.is_some() && self.input_ids.first().copied() == bos);
        self.input_ids.drain(start..start + first - prompt);
        self.labels.drain(start..start + first - prompt);
        let mut cut = self.cut_right(max_len);
        cut.row = true;
        cut
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row whose token ids are its positions; ranges, each its start and its end, are trained.
    fn row(len: u32, trained: &[[i64; 2]]) -> Row {
        let label = |i: i64| {
            trained
                .iter()
                .any(|[start, end]| (*start..*end).contains(&i))
                .then_some(i)
        };
        Row {
            input_ids: (0..len).collect(),
            labels: (0..i64::from(len))
                .map(|i| label(i).unwrap_or(IGNORE_INDEX))
                .collect(),
        }
    }

    fn cut(mut row: Row, max_len: usize, bos: Option<u32>) -> (Vec<u32>, Cut) {
        let cut = row.cut(max_len, bos);
        assert_eq!(row.input_ids.len(), row.labels.len());
        for (&id, &label) in row.input_ids.iter().zip(&row.labels) {
            assert!(label == IGNORE_INDEX || label == i64::from(id));
        }
        (row.input_ids, cut)
    }

    #[test]
    fn a_row_that_fits_stays_as_it_is() {
        assert_eq!(
            cut(row(4, &[[2, 4]]), 4, None),
            ((0..4).collect(), Cut::default())
        );
    }

    #[test]
    fn a_prompt_loses_its_beginning_before_an_answer_loses_its_end() {
        let (ids, found) = cut(row(10, &[[7, 10]]), 6, None);
        assert_eq!(ids, [4, 5, 6, 7, 8, 9]);
        assert_eq!(
            found,
            Cut {
                row: true,
                answer: false
            }
        );
    }

    #[test]
    fn bos_stays_in_front_of_the_end_of_the_prompt() {
        let (ids, _) = cut(row(10, &[[7, 10]]), 6, Some(0));
        assert_eq!(ids, [0, 5, 6, 7, 8, 9]);
    }

    #[test]
    fn an_answer_longer_than_half_loses_its_end_and_that_is_said() {
        let (ids, found) = cut(row(12, &[[6, 12]]), 6, None);
        assert_eq!(ids, [3, 4, 5, 6, 7, 8]);
        assert_eq!(
            found,
            Cut {
                row: true,
                answer: true
            }
        );
    }

    #[test]
    fn several_answers_are_cut_on_the_right() {
        let (ids, found) = cut(row(12, &[[2, 4], [8, 12]]), 10, None);
        assert_eq!(ids, (0..10).collect::<Vec<_>>());
        assert!(found.answer);
        let (ids, found) = cut(row(12, &[[2, 4], [8, 12]]), 6, None);
        assert_eq!(ids, (0..6).collect::<Vec<_>>());
        assert!(!found.answer);
    }

    #[test]
    fn the_first_of_several_answers_stays_where_the_prompt_leaves_no_room() {
        let (ids, found) = cut(row(20, &[[10, 12], [15, 18]]), 6, None);
        assert_eq!(ids, [6, 7, 8, 9, 10, 11]);
        assert!(!found.answer);
    }

    #[test]
    fn a_row_without_a_prompt_is_cut_on_the_right() {
        let (ids, found) = cut(row(5, &[[0, 5]]), 3, Some(0));
        assert_eq!(ids, [0, 1, 2]);
        assert!(found.answer);
    }
}
