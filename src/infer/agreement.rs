//! How far one model's predictions are from another's, token by token, as where an exported model is held against what it was
//! made of.
//!
//! `KL(p || q) = sum_v p(v) (ln p(v) - ln q(v))`, the mean over tokens, p of the reference.

use std::borrow::Borrow;

use candle_core::Tensor;
use rayon::prelude::*;

use super::ensemble::log_sum_exp;
use super::evaluate::{EVALUATION_TOKENS, next_group, rows_of_logits, sequences};
use super::sampling::argmax;
use crate::data::{Batch, Example};
use crate::model::Decoder;
use crate::{Error, Result};

/// Over all tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct Agreement {
    /// Mean KL divergence from the reference, in nats.
    pub kl: f64,
    /// Share of the tokens after which both think the same one likeliest, in 0..=1.
    pub same_top_token: f64,
    pub largest_logit_difference: f64,
    pub tokens: usize,
}

/// Holds the predictions of `others` after each token of `examples` against those of `reference`.
///
/// # Errors
/// [`Error::Shape`] for another vocabulary and for an id beyond it.
pub fn agreement<const N: usize>(
    reference: &Decoder,
    others: [&Decoder; N],
    examples: impl IntoIterator<Item: Borrow<Example>>,
) -> Result<[Agreement; N]> {
    let vocab = reference.config().vocab_size;
    if let Some(other) = others
        .iter()
        .find(|other| other.config().vocab_size != vocab)
    {
        return Err(Error::Shape {
            op: "agreement",
            expected: format!("a vocabulary of {vocab}"),
            found: other.config().vocab_size.to_string(),
        });
    }
    let mut sums = [Agreement::default(); N];
    let mut examples = examples.into_iter().peekable();
    while examples.peek().is_some() {
        let group = next_group(&mut examples, EVALUATION_TOKENS);
        let group: Vec<&Example> = group.iter().map(Borrow::borrow).collect();
        let batch = Batch::from_examples(&group);
        let hidden = |decoder: &Decoder| decoder.hidden_states(sequences(&batch), None);
        let expected = hidden(reference)?;
        let found = others.iter().map(|other| hidden(other));
        let found = found.collect::<Result<Vec<_>>>()?;
        let n = batch.input_ids.len();
        for start in (0..n).step_by(rows_of_logits(vocab)) {
            let rows = rows_of_logits(vocab).min(n - start);
            let logits = |decoder: &Decoder, hidden: &Tensor| -> Result<Vec<f32>> {
                let logits = decoder.head_logits(&hidden.narrow(0, start, rows)?)?;
                Ok(logits.flatten_all()?.to_vec1()?)
            };
            let p = logits(reference, &expected)?;
            for ((other, found), sums) in others.iter().zip(&found).zip(&mut sums) {
                sums.add(&p, &logits(other, found)?, vocab);
            }
        }
    }
    Ok(sums.map(|sum| Agreement {
        kl: sum.kl / sum.tokens.max(1) as f64,
        same_top_token: sum.same_top_token / sum.tokens.max(1) as f64,
        ..sum
    }))
}

impl Agreement {
    /// Adds rows of logits, `[n, vocab]` each.
    fn add(&mut self, p: &[f32], q: &[f32], vocab: usize) {
        let rows = p.par_chunks(vocab).zip(q.par_chunks(vocab));
        let rows: Vec<_> = rows.map(|(p, q)| compare(p, q)).collect();
        for (kl, is_same, difference) in rows {
            self.kl += kl;
            self.same_top_token += f64::from(u8::from(is_same));
            self.largest_logit_difference = larger(difference, self.largest_logit_difference);
            self.tokens += 1;
        }
    }
}

/// The divergence, whether the likeliest token is the same, and the largest difference, of the logits after one token.
fn compare(p: &[f32], q: &[f32]) -> (f64, bool, f64) {
    let (log_sum_p, log_sum_q) = (log_sum_exp(p), log_sum_exp(q));
    let (mut kl, mut largest) = (0.0, 0f64);
    for (&p, &q) in p.iter().zip(q) {
        let (p, q) = (f64::from(p), f64::from(q));
        kl += (p - log_sum_p).exp() * ((p - log_sum_p) - (q - log_sum_q));
        largest = larger((p - q).abs(), largest);
    }
    (kl, argmax(p) == argmax(q), largest)
}

/// NaN where one of them is.
fn larger(found: f64, largest: f64) -> f64 {
    match found.is_nan() || found > largest {
        true => found,
        false => largest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_and_agreement_are_those_of_two_small_distributions() {
        let logits = |p: &[f64]| p.iter().map(|p| p.ln() as f32).collect::<Vec<_>>();
        let (p, q) = ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]);
        let (kl, is_same, difference) = compare(&logits(&p), &logits(&q));
        // 0.5 ln 2 - 0.25 ln 2
        assert!((kl - 0.25 * 2f64.ln()).abs() < 1e-6, "{kl}");
        assert!(!is_same && (difference - 2f64.ln()).abs() < 1e-6);
        // What is added to all logits changes no probability.
        let shifted: Vec<f32> = logits(&p).iter().map(|z| z + 3.0).collect();
        let (kl, is_same, difference) = compare(&logits(&p), &shifted);
        assert!(kl.abs() < 1e-6 && is_same && (difference - 3.0).abs() < 1e-6);
        let mut sum = Agreement::default();
        sum.add(&[0.0, f32::NAN], &[0.0, 0.0], 2);
        assert!(sum.kl.is_nan() && sum.largest_logit_difference.is_nan());
    }
}
