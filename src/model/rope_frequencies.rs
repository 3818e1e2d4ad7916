//! The rotary frequencies of a config: `theta^(-2i/E)`, stretched for longer contexts where the config says so.
//!
//! Source: arXiv:2104.09864; scaling as in transformers' `modeling_rope_utils.py` 5.24.

use super::config::{QueryScaling, RopeConfig, RopeScaling};

impl QueryScaling {
    /// Of the query at `position`.
    pub fn factor(&self, position: usize) -> f32 {
        let lengths = (position / self.length) as f64;
        (1.0 + self.beta * lengths.ln_1p()) as f32
    }
}

impl RopeConfig {
    /// Whether batches whose longest sequence has so many tokens have other frequencies than short ones.
    pub fn is_long(&self, length: usize) -> bool {
        match self.scaling {
            RopeScaling::LongRope {
                original_max_position_embeddings,
                ..
            } => length > original_max_position_embeddings,
            _ => false,
        }
    }

    /// Radians per position of each pair of `rotary_dim` columns, for batches that [are long](Self::is_long) or not.
    pub fn inv_freq(&self, rotary_dim: usize, is_long: bool) -> Vec<f32> {
        let frequency = |i: usize| self.theta.powf(-2.0 * i as f64 / rotary_dim as f64);
        (0..rotary_dim / 2)
            .map(|i| self.stretched(i, frequency(i), rotary_dim, is_long) as f32)
            .collect()
    }

    /// What cosines and sines are multiplied by.
    pub fn amplitude(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            }
            | RopeScaling::LongRope {
                attention_factor, ..
            } => attention_factor as f32,
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 1.0,
        }
    }

    /// The frequency of pair `i`.
    fn stretched(&self, i: usize, frequency: f64, rotary_dim: usize, is_long: bool) -> f64 {
        let interpolated =
            |factor: f64, kept: f64| (1.0 - kept) * frequency / factor + kept * frequency;
        match self.scaling {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let turns =
                    original_max_position_embeddings as f64 * frequency / std::f64::consts::TAU;
                let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor))
                    .clamp(0.0, 1.0);
                interpolated(factor, kept)
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_max_position_embeddings,
                truncate,
                ..
            } => {
                // The pair that turns so many times over the original context.
                let pair = |turns: f64| {
                    let length = original_max_position_embeddings as f64;
                    let ratio = length / (turns * std::f64::consts::TAU);
                    rotary_dim as f64 * ratio.ln() / (2.0 * self.theta.ln())
                };
                let (first, last) = match truncate {
                    true => (pair(beta_fast).floor(), pair(beta_slow).ceil()),
                    false => (pair(beta_fast), pair(beta_slow)),
                };
                let first = first.max(0.0);
                let last = last.min((rotary_dim - 1) as f64);
                // Two that are the same make a step.
                let width = if first == last { 0.001 } else { last - first };
                let divided = ((i as f64 - first) / width).clamp(0.0, 1.0);
                interpolated(factor, 1.0 - divided)
            }
            RopeScaling::LongRope {
                ref short_factors,
                ref long_factors,
                ..
            } => {
                let factors = if is_long { long_factors } else { short_factors };
                frequency / factors[i]
            }
        }
    }
}
