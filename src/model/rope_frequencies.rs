//! The rotary frequencies of a config: `theta^(-2i/E)`, stretched for longer contexts where the config says so.
//!
//! Source: arXiv:2104.09864; scaling as in transformers' `modeling_rope_utils.py` 5.23.

use super::config::{RopeConfig, RopeScaling};

impl RopeConfig {
    /// Radians per position of each pair, `[E/2]`.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        let frequency = |i: usize| self.theta.powf(-2.0 * i as f64 / head_dim as f64);
        (0..head_dim / 2)
            .map(|i| self.scaling.apply(frequency(i)) as f32)
            .collect()
    }
}

impl RopeScaling {
    fn apply(self, frequency: f64) -> f64 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let turns =
                    original_max_position_embeddings as f64 * frequency / std::f64::consts::TAU;
                let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor))
                    .clamp(0.0, 1.0);
                (1.0 - kept) * frequency / factor + kept * frequency
            }
        }
    }
}
