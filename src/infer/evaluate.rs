//! How well a model predicts given rows: loss, perplexity, accuracy and calibration, and the log-probability of every token.
//!
//! Over the tokens with a label other than -100: loss = mean of -ln p(label), perplexity = e^loss, accuracy = share whose
//! likeliest token is the label. Expected calibration error: the tokens fall into [`ECE_BINS`] bins of equal width by
//! their confidence (the probability of the likeliest token); the sum over bins of
//! `(tokens in it / all tokens) * |accuracy in it - mean confidence in it|`.
//!
//! Source: arXiv:1706.04599 for the calibration error.

use std::borrow::Borrow;
use std::iter::Peekable;

use crate::data::{Batch, Example};
use crate::model::{Decoder, Sequences, TokenLoss};
use crate::{Error, IGNORE_INDEX, Result};

/// Bins of the expected calibration error: confidences in (k/15, (k+1)/15].
pub const ECE_BINS: usize = 15;

/// Short examples go through the model together up to this many tokens.
pub const EVALUATION_TOKENS: usize = 2048;

/// Bytes of logits that are there at a time, at most.
const LOGITS_BYTES: usize = 64 << 20;

/// Means over all tokens with a label.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Evaluation {
    /// Mean over labels != -100, in nats.
    pub loss: f64,
    pub perplexity: f64,
    /// In 0..=1.
    pub token_accuracy: f64,
    /// Expected calibration error, in 0..=1.
    pub ece: f64,
    /// Labels != -100 that have a token before them.
    pub tokens: usize,
}

/// Whether the log-probability of tokens without a label is wanted too; it costs the head's product for their rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogProbs {
    Omit,
    EveryToken,
}

/// Scores `examples` in their order. `on_example` gets each one's index and, for [`LogProbs::EveryToken`], the
/// log-probabilities of its tokens but the first, `[T - 1]`: entry t is ln p(token t+1 | tokens up to t).
///
/// # Errors
/// [`Error::Config`] if no token of any example has a label; [`Error::Shape`] for an id beyond the vocabulary.
pub fn evaluate(
    decoder: &Decoder,
    examples: impl IntoIterator<Item: Borrow<Example>>,
    log_probs: LogProbs,
    on_example: impl FnMut(usize, Option<Vec<f32>>) -> Result<()>,
) -> Result<Evaluation> {
    evaluate_within(EVALUATION_TOKENS, decoder, examples, log_probs, on_example)
}

/// The same with no more than `batch_tokens` tokens at a time, but for an example that is longer.
///
/// # Errors
/// Those of [`evaluate`].
pub fn evaluate_within(
    batch_tokens: usize,
    decoder: &Decoder,
    examples: impl IntoIterator<Item: Borrow<Example>>,
    log_probs: LogProbs,
    mut on_example: impl FnMut(usize, Option<Vec<f32>>) -> Result<()>,
) -> Result<Evaluation> {
    let mut totals = Totals::default();
    let mut done = 0;
    let mut examples = examples.into_iter().peekable();
    while examples.peek().is_some() {
        let group = next_group(&mut examples, batch_tokens);
        let group: Vec<&Example> = group.iter().map(Borrow::borrow).collect();
        let batch = Batch::from_examples(&group);
        let targets = match log_probs {
            LogProbs::Omit => batch.labels.clone(),
            LogProbs::EveryToken => next_tokens(&batch),
        };
        let scores = decoder.losses(sequences(&batch), &targets)?.read()?;
        if is_part_of(&batch.labels, &targets) {
            let labelled = scores
                .iter()
                .filter(|score| batch.labels[score.row] != IGNORE_INDEX);
            labelled.for_each(|score| totals.add(score));
        } else {
            let labelled = decoder.losses(sequences(&batch), &batch.labels)?.read()?;
            labelled.iter().for_each(|score| totals.add(score));
        }
        let mut scores = scores.iter();
        for (i, example) in group.iter().enumerate() {
            let log_probs = (log_probs == LogProbs::EveryToken).then(|| {
                let rows = example.input_ids.len().saturating_sub(1);
                scores
                    .by_ref()
                    .take(rows)
                    .map(|score| -score.loss)
                    .collect()
            });
            on_example(done + i, log_probs)?;
        }
        done += group.len();
    }
    totals.evaluation()
}

/// The next examples, as many as fit into `batch_tokens`, but at least one.
pub(super) fn next_group<E: Borrow<Example>>(
    examples: &mut Peekable<impl Iterator<Item = E>>,
    batch_tokens: usize,
) -> Vec<E> {
    let mut group = Vec::new();
    let mut tokens = 0;
    while let Some(example) = examples.next_if(|example| {
        tokens += example.borrow().input_ids.len();
        tokens <= batch_tokens || group.is_empty()
    }) {
        group.push(example);
    }
    group
}

/// How many rows of logits in f32, `[V]` each, are there at a time.
pub(super) fn rows_of_logits(vocab: usize) -> usize {
    (LOGITS_BYTES / (vocab * size_of::<f32>())).max(1)
}

/// The token after each row, as labels; the last row of a sequence has none.
pub(super) fn next_tokens(batch: &Batch) -> Vec<i64> {
    let mut labels = vec![IGNORE_INDEX; batch.input_ids.len()];
    for ends in batch.cu_seqlens.windows(2) {
        for row in ends[0] + 1..ends[1] {
            labels[row - 1] = i64::from(batch.input_ids[row]);
        }
    }
    labels
}

/// Whether every label is among `targets`: the labels of a row may differ from its tokens.
fn is_part_of(labels: &[i64], targets: &[i64]) -> bool {
    labels
        .iter()
        .zip(targets)
        .all(|(label, target)| *label == IGNORE_INDEX || label == target)
}

/// A batch as the model takes it.
pub(crate) fn sequences(batch: &Batch) -> Sequences<'_> {
    Sequences {
        input_ids: &batch.input_ids,
        positions: &batch.positions,
        cu_seqlens: &batch.cu_seqlens,
    }
}

#[derive(Default)]
pub(super) struct Totals {
    loss: f64,
    bins: [Bin; ECE_BINS],
}

#[derive(Default, Clone, Copy)]
struct Bin {
    tokens: usize,
    correct: usize,
    confidence: f64,
}

impl Totals {
    pub(super) fn add(&mut self, score: &TokenLoss) {
        self.loss += f64::from(score.loss);
        // A confidence on an edge belongs to the lower bin; a NaN, from broken weights, to the first.
        let bin = (score.confidence * ECE_BINS as f32).ceil() as usize;
        let bin = &mut self.bins[bin.clamp(1, ECE_BINS) - 1];
        bin.tokens += 1;
        bin.correct += usize::from(score.prediction == score.label);
        bin.confidence += f64::from(score.confidence);
    }

    pub(super) fn evaluation(&self) -> Result<Evaluation> {
        let tokens: usize = self.bins.iter().map(|bin| bin.tokens).sum();
        if tokens == 0 {
            return Err(Error::config(
                "data",
                "all labels are -100: there is nothing to evaluate",
            ));
        }
        let n = tokens as f64;
        let correct: usize = self.bins.iter().map(|bin| bin.correct).sum();
        let gaps = self
            .bins
            .iter()
            .map(|bin| (bin.correct as f64 - bin.confidence).abs());
        Ok(Evaluation {
            loss: self.loss / n,
            perplexity: (self.loss / n).exp(),
            token_accuracy: correct as f64 / n,
            ece: gaps.sum::<f64>() / n,
            tokens,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(loss: f32, confidence: f32, prediction: u32) -> TokenLoss {
        TokenLoss {
            row: 0,
            label: 1,
            loss,
            confidence,
            prediction,
        }
    }

    fn example(input_ids: Vec<u32>) -> Example {
        let labels = input_ids.iter().map(|&id| i64::from(id)).collect();
        Example {
            input_ids,
            labels,
            line: 1,
        }
    }

    #[test]
    fn totals_follow_their_definitions() {
        let mut totals = Totals::default();
        // Bin (12/15, 13/15]: confidence 0.85 twice, one right. Bin (4/15, 5/15]: 0.3, right.
        for (loss, confidence, prediction) in [(0.5, 0.85, 1), (2.0, 0.85, 7), (0.5, 0.3, 1)] {
            totals.add(&score(loss, confidence, prediction));
        }
        let found = totals.evaluation().unwrap();
        assert_eq!(found.tokens, 3);
        assert!((found.loss - 1.0).abs() < 1e-12);
        assert!((found.perplexity - 1f64.exp()).abs() < 1e-12);
        assert!((found.token_accuracy - 2.0 / 3.0).abs() < 1e-12);
        let expected = 2.0 / 3.0 * (0.5f64 - 0.85).abs() + 1.0 / 3.0 * (1.0f64 - 0.3).abs();
        assert!((found.ece - expected).abs() < 1e-6);
    }

    #[test]
    fn bins_include_their_upper_edge() {
        for (confidence, bin) in [(1e-9, 0), (1.0 / 15.0, 0), (0.07, 1), (1.0, 14)] {
            let mut totals = Totals::default();
            totals.add(&score(0.0, confidence, 1));
            assert_eq!(totals.bins[bin].tokens, 1, "confidence {confidence}");
        }
    }

    #[test]
    fn nothing_to_evaluate_is_an_error() {
        assert!(Totals::default().evaluation().is_err());
    }

    #[test]
    fn groups_hold_whole_examples_within_the_token_budget() {
        let examples = [3000, 1000, 1000, 1000].map(|tokens| example(vec![0; tokens]));
        let mut examples = examples.iter().peekable();
        let groups = [1, 2, 1, 0].map(|_| next_group(&mut examples, EVALUATION_TOKENS).len());
        assert_eq!(groups, [1, 2, 1, 0]);
    }

    #[test]
    fn next_tokens_stop_at_the_end_of_a_sequence() {
        let examples = [
            example(vec![1, 2, 3]),
            example(vec![4]),
            example(vec![5, 6]),
        ];
        let batch = Batch::from_examples(&examples.iter().collect::<Vec<_>>());
        assert_eq!(
            next_tokens(&batch),
            [2, 3, IGNORE_INDEX, IGNORE_INDEX, 6, IGNORE_INDEX]
        );
    }

    #[test]
    fn labels_that_differ_from_the_tokens_are_seen() {
        assert!(is_part_of(&[IGNORE_INDEX, 3], &[2, 3]));
        assert!(!is_part_of(&[IGNORE_INDEX, 4], &[2, 3]));
    }
}
