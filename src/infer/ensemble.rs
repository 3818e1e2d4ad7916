//! The test-time ensemble of LoRA Dropout: models whose adapters are masked as in training, and the mean of their
//! probabilities.
//!
//! `ln p(token) = ln (1/N sum_i p_i(token))`, by log-sum-exp in f64. A model is the decoder with masks that are made on the
//! way and not kept, so that more of them take no more memory.
//!
//! Source: arXiv:2404.09610.

use std::borrow::Borrow;

use candle_core::Tensor;
use rayon::prelude::*;

use super::evaluate::{
    EVALUATION_TOKENS, Evaluation, LogProbs, Totals, next_group, next_tokens, sequences,
};
use super::sampling::argmax;
use crate::data::{Batch, Example};
use crate::model::{Decoder, MatrixDropout, TokenLoss};
use crate::{Error, IGNORE_INDEX, Result};

/// Bytes of the probabilities that are there at a time, at most.
const CHUNK_BYTES: usize = 64 << 20;

/// Masked models that answer together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ensemble(MatrixDropout);

impl Ensemble {
    /// `models` models in which each feature of the adapters' matrices is dropped with probability `p`. The first ones of a
    /// larger ensemble are those of a smaller one.
    ///
    /// # Errors
    /// [`Error::Config`] for no model at all, and for a `p` that drops nothing or everything.
    pub fn new(p: f64, seed: u64, models: usize) -> Result<Self> {
        if models == 0 {
            return Err(Error::config("ensemble", "must be at least 1, found 0"));
        }
        let masks = (0.0..1.0)
            .contains(&p)
            .then(|| MatrixDropout::ensemble(p, seed, models))
            .flatten();
        masks.map(Self).ok_or_else(|| {
            let reason =
                format!("must be greater than 0 and less than 1 for an ensemble, found {p}");
            Error::config("lora_matrix_dropout", reason)
        })
    }

    pub fn models(&self) -> usize {
        self.0.instances()
    }

    /// The masks of model number `model`.
    pub(super) fn masks(&self, model: usize) -> MatrixDropout {
        self.0.instance(model)
    }
}

/// Scores `examples` as [`evaluate`](super::evaluate) does, by the mean of the probabilities of an ensemble's first models:
/// an evaluation for each of `sizes`, which ascend to the whole ensemble. `on_example` gets the log-probabilities of the
/// largest.
///
/// # Errors
/// As [`evaluate`](super::evaluate); [`Error::Config`] for other sizes.
pub fn evaluate_ensemble(
    decoder: &Decoder,
    (ensemble, sizes): (&Ensemble, &[usize]),
    examples: impl IntoIterator<Item: Borrow<Example>>,
    log_probs: LogProbs,
    mut on_example: impl FnMut(usize, Option<Vec<f32>>) -> Result<()>,
) -> Result<Vec<Evaluation>> {
    expect_sizes(ensemble, sizes)?;
    let mut totals: Vec<Totals> = sizes.iter().map(|_| Totals::default()).collect();
    let mut done = 0;
    let mut examples = examples.into_iter().peekable();
    while examples.peek().is_some() {
        let group = next_group(&mut examples, EVALUATION_TOKENS);
        let group: Vec<&Example> = group.iter().map(Borrow::borrow).collect();
        let batch = Batch::from_examples(&group);
        let next = match log_probs {
            LogProbs::Omit => vec![IGNORE_INDEX; batch.labels.len()],
            LogProbs::EveryToken => next_tokens(&batch),
        };
        let mut of_next =
            score(decoder, (ensemble, sizes), &batch, &next, &mut totals)?.into_iter();
        for (i, example) in group.iter().enumerate() {
            let rows = example.input_ids.len().saturating_sub(1);
            let values =
                (log_probs == LogProbs::EveryToken).then(|| of_next.by_ref().take(rows).collect());
            on_example(done + i, values)?;
        }
        done += group.len();
    }
    totals.iter().map(Totals::evaluation).collect()
}

/// Refuses sizes that do not ascend to the whole ensemble.
pub(super) fn expect_sizes(ensemble: &Ensemble, sizes: &[usize]) -> Result<()> {
    let ascend = sizes.is_sorted_by(|a, b| a < b);
    if !ascend || sizes.first() == Some(&0) || sizes.last() != Some(&ensemble.models()) {
        let reason =
            format!("takes different sizes of at least 1 in ascending order, found {sizes:?}");
        return Err(Error::config("ensemble", reason));
    }
    Ok(())
}

/// Adds the labelled rows of a batch to the totals of each size, and gives the log-probability of the next token in each row
/// that has one.
fn score(
    decoder: &Decoder,
    (ensemble, sizes): (&Ensemble, &[usize]),
    batch: &Batch,
    next: &[i64],
    totals: &mut [Totals],
) -> Result<Vec<f32>> {
    let vocab = decoder.config().vocab_size;
    let hidden = (0..ensemble.models())
        .map(|model| decoder.hidden_states(sequences(batch), Some(ensemble.masks(model))));
    let hidden = hidden.collect::<Result<Vec<_>>>()?;
    let rows = batch.labels.iter().zip(next).enumerate();
    let rows = rows.filter(|(_, (label, next))| **label != IGNORE_INDEX || **next != IGNORE_INDEX);
    let rows = rows.map(|(row, (&label, &next))| {
        Ok(MeanRow {
            row,
            label: token(label, vocab)?,
            next: token(next, vocab)?,
            sums: vec![0.0; vocab],
            label_log_sum: f64::NEG_INFINITY,
            next_log_sum: f64::NEG_INFINITY,
        })
    });
    let mut rows = rows.peekable();
    let mut of_next = Vec::new();
    let chunk_rows = (CHUNK_BYTES / (8 * vocab)).clamp(1, 1024);
    while rows.peek().is_some() {
        let mut chunk = rows.by_ref().take(chunk_rows).collect::<Result<Vec<_>>>()?;
        let places: Vec<u32> = chunk.iter().map(|mean| mean.row as u32).collect();
        let places = Tensor::new(places, hidden[0].device())?;
        for (model, hidden) in hidden.iter().enumerate() {
            let logits = decoder.head_logits(&hidden.index_select(&places, 0)?)?;
            let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
            chunk
                .par_iter_mut()
                .zip(logits.par_chunks_exact(vocab))
                .for_each(|(mean, logits)| mean.add(logits));
            for (totals, _) in totals
                .iter_mut()
                .zip(sizes)
                .filter(|(_, size)| **size == model + 1)
            {
                let scores = chunk.iter().filter_map(|mean| mean.score(model + 1));
                scores.for_each(|score| totals.add(&score));
            }
        }
        let models = (ensemble.models() as f64).ln();
        let with_next = chunk.iter().filter(|mean| mean.next.is_some());
        of_next.extend(with_next.map(|mean| (mean.next_log_sum - models) as f32));
    }
    Ok(of_next)
}

fn token(label: i64, vocab: usize) -> Result<Option<u32>> {
    match u32::try_from(label) {
        Ok(id) if (id as usize) < vocab => Ok(Some(id)),
        _ if label == IGNORE_INDEX => Ok(None),
        _ => Err(Error::Shape {
            op: "ensemble",
            expected: format!("labels below {vocab}, or {IGNORE_INDEX}"),
            found: label.to_string(),
        }),
    }
}

/// The probabilities of a row, summed over the models so far.
struct MeanRow {
    row: usize,
    label: Option<u32>,
    next: Option<u32>,
    /// Of every token, `[V]`.
    sums: Vec<f64>,
    /// Of the label and of the next token by their logarithms: a product of them may be too small for a sum.
    label_log_sum: f64,
    next_log_sum: f64,
}

impl MeanRow {
    /// Takes up the probabilities of a model from its logits, `[V]`.
    fn add(&mut self, logits: &[f32]) {
        let log_total = log_sum_exp(logits);
        for (sum, &logit) in self.sums.iter_mut().zip(logits) {
            *sum += (f64::from(logit) - log_total).exp();
        }
        let log_probability = |token: u32| f64::from(logits[token as usize]) - log_total;
        if let Some(label) = self.label {
            self.label_log_sum = log_add_exp(self.label_log_sum, log_probability(label));
        }
        if let Some(next) = self.next {
            self.next_log_sum = log_add_exp(self.next_log_sum, log_probability(next));
        }
    }

    /// The loss of the label, if there is one, by the mean over `models` models.
    fn score(&self, models: usize) -> Option<TokenLoss> {
        let likeliest = argmax(&self.sums);
        Some(TokenLoss {
            row: self.row,
            label: self.label?,
            loss: ((models as f64).ln() - self.label_log_sum) as f32,
            confidence: (self.sums[likeliest] / models as f64) as f32,
            prediction: likeliest as u32,
        })
    }
}

/// The logarithms of the mean of the probabilities that the models' logits stand for, `[V]` each.
pub(super) fn mean_log_probabilities(logits: &[Vec<f32>]) -> Vec<f32> {
    let log_totals: Vec<f64> = logits.iter().map(|logits| log_sum_exp(logits)).collect();
    let models = (logits.len() as f64).ln();
    let vocab = logits.first().map_or(0, Vec::len);
    let mean = |token: usize| {
        let of_models = logits.iter().zip(&log_totals);
        let of_models = of_models.map(|(logits, total)| f64::from(logits[token]) - total);
        (of_models.fold(f64::NEG_INFINITY, log_add_exp) - models) as f32
    };
    (0..vocab).map(mean).collect()
}

/// `ln sum e^z`.
pub(super) fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let total: f64 = logits
        .iter()
        .map(|&logit| (f64::from(logit) - largest).exp())
        .sum();
    largest + total.ln()
}

/// `ln (e^a + e^b)`.
pub(super) fn log_add_exp(a: f64, b: f64) -> f64 {
    if a == f64::NEG_INFINITY {
        return b;
    }
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    high + (low - high).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_of_means_are_exact_where_probabilities_vanish() {
        // Probabilities of e^-1000 and e^-1001 are zero in f64; their mean has a logarithm all the same.
        let models = [vec![0.0, -1000.0], vec![0.0, -1001.0]];
        let found = mean_log_probabilities(&models);
        let expected = -1000.0 + ((1.0 + (-1f64).exp()) / 2.0).ln();
        assert!((f64::from(found[1]) - expected).abs() < 1e-4, "{found:?}");
        assert!(found[0].abs() < 1e-7);
    }

    #[test]
    fn the_mean_is_of_probabilities_and_not_of_logits() {
        let found = mean_log_probabilities(&[vec![0.0, 0.0], vec![3f32.ln(), 0.0]]);
        for (found, expected) in found.iter().zip([0.625f32, 0.375]) {
            assert!((found.exp() - expected).abs() < 1e-6, "{found}");
        }
    }

    #[test]
    fn a_logit_that_is_no_number_stays_visible() {
        assert!(mean_log_probabilities(&[vec![f32::NAN, 0.0], vec![0.0, 0.0]])[0].is_nan());
    }

    #[test]
    fn an_ensemble_of_nothing_is_refused() {
        for (p, models) in [(0.5, 0), (0.0, 2), (1.0, 2), (-0.1, 2), (f64::NAN, 2)] {
            assert!(Ensemble::new(p, 0, models).is_err(), "{p} {models}");
        }
        assert_eq!(Ensemble::new(0.5, 0, 3).unwrap().models(), 3);
    }
}
