//! The choice of the next token: the likeliest, or a draw from the distribution cut by top-k and top-p.
//!
//! The cuts are applied in the order of transformers: `softmax(logits / temperature)`, the `top_k` likeliest, then of
//! those, renormalized, the fewest likeliest that reach `top_p` together (nucleus sampling, arXiv:1904.09751).

use std::cmp::Ordering;

use crate::data::SplitMix64;
use crate::{Error, Result};

/// How tokens are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingOptions {
    /// 0 takes the likeliest token and draws nothing.
    pub temperature: f32,
    /// `None` keeps the whole vocabulary.
    pub top_k: Option<usize>,
    /// In (0, 1]; 1 keeps all.
    pub top_p: f32,
    pub seed: u64,
}

impl Default for SamplingOptions {
    /// Greedy.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            seed: 0,
        }
    }
}

/// Draws tokens; the same options give the same draws for the same logits, on every machine.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplingOptions,
    random: SplitMix64,
}

impl Sampler {
    /// # Errors
    /// [`Error::Config`] for a temperature that is negative or not finite, a `top_k` of 0, a `top_p` outside (0, 1].
    pub fn new(options: SamplingOptions) -> Result<Self> {
        let SamplingOptions {
            temperature,
            top_k,
            top_p,
            seed,
        } = options;
        if !(temperature >= 0.0 && temperature.is_finite()) {
            let reason = format!(
                "{temperature} is not a temperature; 0 is greedy, 1 the model's own distribution"
            );
            return Err(Error::config("temperature", reason));
        }
        if top_k == Some(0) {
            return Err(Error::config(
                "top_k",
                "0 keeps no token; leave it out to keep all",
            ));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::config("top_p", format!("{top_p} is outside (0, 1]")));
        }
        Ok(Self {
            options,
            random: SplitMix64::new(seed),
        })
    }

    /// The next token for `logits: [V]`; of equal logits the lower token counts as the likelier one.
    ///
    /// # Errors
    /// [`Error::NonFinite`] if a logit is NaN.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        if let Some(index) = logits.iter().position(|l| l.is_nan()) {
            return Err(Error::NonFinite {
                tensor: "logits".into(),
                index,
                value: logits[index],
            });
        }
        if self.options.temperature == 0.0 {
            return Ok(argmax(logits) as u32);
        }
        let candidates = self.candidates(logits);
        let total: f64 = candidates.iter().map(|c| c.weight).sum();
        let mut left = self.random.uniform() * total;
        for candidate in &candidates {
            left -= candidate.weight;
            if left < 0.0 {
                return Ok(candidate.token as u32);
            }
        }
        // Rounding left a remainder: the last token that has a weight at all.
        let last = candidates.iter().rfind(|c| c.weight > 0.0);
        Ok(last.map_or_else(|| argmax(logits), |c| c.token) as u32)
    }

    /// What is left after both cuts, the likeliest first.
    fn candidates(&self, logits: &[f32]) -> Vec<Candidate> {
        let largest = f64::from(logits[argmax(logits)]);
        let temperature = f64::from(self.options.temperature);
        let weight = |logit: f32| ((f64::from(logit) - largest) / temperature).exp();
        let mut candidates: Vec<Candidate> = logits
            .iter()
            .enumerate()
            .map(|(token, &logit)| Candidate {
                token,
                weight: weight(logit),
            })
            .collect();
        if let Some(top_k) = self.options.top_k.filter(|&k| k < candidates.len()) {
            candidates.select_nth_unstable_by(top_k - 1, Candidate::likelier_first);
            candidates.truncate(top_k);
        }
        candidates.sort_unstable_by(Candidate::likelier_first);
        if self.options.top_p < 1.0 {
            let enough =
                f64::from(self.options.top_p) * candidates.iter().map(|c| c.weight).sum::<f64>();
            let mut sum = 0.0;
            let reached = candidates.iter().position(|c| {
                sum += c.weight;
                sum >= enough
            });
            candidates.truncate(reached.map_or(candidates.len(), |last| last + 1));
        }
        candidates
    }
}

struct Candidate {
    token: usize,
    /// Its probability times a factor that is the same for all.
    weight: f64,
}

impl Candidate {
    fn likelier_first(&self, other: &Self) -> Ordering {
        other
            .weight
            .total_cmp(&self.weight)
            .then(self.token.cmp(&other.token))
    }
}

/// The index of the largest of `values`, the first of equals.
pub(super) fn argmax<T: PartialOrd>(values: &[T]) -> usize {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f32, top_k: Option<usize>, top_p: f32) -> Sampler {
        let options = SamplingOptions {
            temperature,
            top_k,
            top_p,
            seed: 7,
        };
        Sampler::new(options).unwrap()
    }

    fn frequencies(mut sampler: Sampler, probabilities: &[f32]) -> Vec<f64> {
        const DRAWS: usize = 40_000;
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
        let mut counts = vec![0usize; logits.len()];
        for _ in 0..DRAWS {
            counts[sampler.sample(&logits).unwrap() as usize] += 1;
        }
        counts.iter().map(|&c| c as f64 / DRAWS as f64).collect()
    }

    fn assert_near(found: &[f64], expected: &[f64]) {
        let far = found
            .iter()
            .zip(expected)
            .any(|(f, e)| (f - e).abs() > 0.01);
        assert!(!far, "found {found:?}, expected {expected:?}");
    }

    #[test]
    fn temperature_zero_takes_the_first_of_the_largest() {
        assert_eq!(
            sampler(0.0, None, 1.0)
                .sample(&[0.0, 3.0, -1.0, 3.0])
                .unwrap(),
            1
        );
    }

    #[test]
    fn draws_follow_the_distribution() {
        let p = [0.5, 0.125, 0.25, 0.125];
        assert_near(
            &frequencies(sampler(1.0, None, 1.0), &p),
            &[0.5, 0.125, 0.25, 0.125],
        );
    }

    #[test]
    fn temperature_sharpens_by_its_inverse_power() {
        // Squared and normalized: 0.64 / 0.68 and 0.04 / 0.68.
        assert_near(
            &frequencies(sampler(0.5, None, 1.0), &[0.8, 0.2]),
            &[16.0 / 17.0, 1.0 / 17.0],
        );
    }

    #[test]
    fn top_k_keeps_the_k_likeliest_and_the_lower_of_a_tie() {
        let p = [0.125, 0.5, 0.125, 0.25];
        assert_near(
            &frequencies(sampler(1.0, Some(2), 1.0), &p),
            &[0.0, 2.0 / 3.0, 0.0, 1.0 / 3.0],
        );
        let found = frequencies(sampler(1.0, Some(3), 1.0), &p);
        assert_eq!(found[2], 0.0);
        assert!(found[0] > 0.0);
    }

    #[test]
    fn top_p_keeps_the_fewest_that_reach_it() {
        let p = [0.1, 0.5, 0.1, 0.3];
        assert_near(
            &frequencies(sampler(1.0, None, 0.6), &p),
            &[0.0, 0.625, 0.0, 0.375],
        );
        assert_near(
            &frequencies(sampler(1.0, None, 0.01), &p),
            &[0.0, 1.0, 0.0, 0.0],
        );
    }

    #[test]
    fn top_p_counts_within_what_top_k_left() {
        // Of 0.5 and 0.3 renormalized the first is 0.625: enough for 0.6.
        let p = [0.5, 0.3, 0.2];
        assert_near(
            &frequencies(sampler(1.0, Some(2), 0.6), &p),
            &[1.0, 0.0, 0.0],
        );
    }

    #[test]
    fn a_seed_gives_its_draws_again_and_another_seed_others() {
        let logits = vec![0.0; 50];
        let draws = |seed| {
            let options = SamplingOptions {
                temperature: 1.0,
                seed,
                ..SamplingOptions::default()
            };
            let mut sampler = Sampler::new(options).unwrap();
            (0..20)
                .map(|_| sampler.sample(&logits).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
    }

    #[test]
    fn a_nan_logit_is_an_error_with_its_token() {
        let error = sampler(1.0, None, 1.0)
            .sample(&[0.0, f32::NAN])
            .unwrap_err();
        assert!(
            matches!(error, Error::NonFinite { index: 1, .. }),
            "{error}"
        );
    }

    #[test]
    fn options_outside_their_range_are_errors_that_name_them() {
        for (options, key) in [
            ((-1.0, None, 1.0), "temperature"),
            ((f32::NAN, None, 1.0), "temperature"),
            ((1.0, Some(0), 1.0), "top_k"),
            ((1.0, None, 0.0), "top_p"),
            ((1.0, None, 1.5), "top_p"),
        ] {
            let (temperature, top_k, top_p) = options;
            let error = Sampler::new(SamplingOptions {
                temperature,
                top_k,
                top_p,
                seed: 0,
            })
            .unwrap_err();
            assert!(error.to_string().contains(key), "{error}");
        }
    }
}
