//! An adapter that was trained on initialized weights, as one for the original weights.
//!
//! With the initial factors `B_0 A_0` the trained model is `W_0 + s B A`, and the model before training, `W_0 + s B_0 A_0`,
//! stands for the original `W`. The change is `s (B A - B_0 A_0) = s [B, -B_0] [A; A_0]`: an adapter of twice the rank.
//! Source: `path_initial_model_for_weight_conversion` of PEFT 0.21.

use std::f64::consts::SQRT_2;

use super::adapter::{Adapter, CONFIG_FILE, LORA_A, LORA_B};
use super::adapter_config::AdapterConfig;
use crate::quant::DenseTensor;
use crate::{Error, Result};

impl Adapter {
    /// This adapter, which was trained from `initial`, as one for the weights that `initial` was made of.
    ///
    /// # Shapes
    /// `lora_A: [2 r, in]`, `lora_B: [out, 2 r]`; `lora_alpha` is such that the scaling stays.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] if `initial` has other layers, another rank or another scaling.
    pub fn relative_to_original(&self, initial: &Self) -> Result<Self> {
        let of = |config: &AdapterConfig| {
            let (r, scaling) = (config.r, config.scaling());
            let patterns = (&config.rank_pattern, &config.alpha_pattern);
            format!(
                "r {r} [{}] with scaling {scaling} [{}]",
                patterns.0, patterns.1
            )
        };
        if of(&self.config) != of(&initial.config) {
            return Err(Error::TensorMismatch {
                tensor: CONFIG_FILE.into(),
                expected: format!("{}, as the initial adapter", of(&initial.config)),
                found: of(&self.config),
            });
        }
        // Modules that are trained whole are the same for both.
        let is_whole = |adapter: &Self, name: &str| adapter.module_to_save(name).is_some();
        let names = |adapter: &Self| {
            let names = adapter.tensors.keys();
            let of_layers = names.filter(|name| !is_whole(adapter, name));
            of_layers.cloned().collect::<Vec<_>>()
        };
        if names(self) != names(initial) {
            return Err(Error::TensorMismatch {
                tensor: "lora_A".into(),
                expected: "the layers of the initial adapter".into(),
                found: "others".into(),
            });
        }
        let tensors = self.tensors.iter().map(|(name, trained)| {
            if is_whole(self, name) {
                return Ok((name.clone(), trained.clone()));
            }
            let initial = &initial.tensors[name];
            if trained.shape != initial.shape {
                return Err(Error::TensorMismatch {
                    tensor: name.clone(),
                    expected: format!("{:?}, as in the initial adapter", initial.shape),
                    found: format!("{:?}", trained.shape),
                });
            }
            let joined = if name.ends_with(LORA_A) {
                below(trained, initial)
            } else if name.ends_with(LORA_B) {
                beside_negated(trained, initial)
            } else {
                return Err(Error::TensorMismatch {
                    tensor: name.clone(),
                    expected: "lora_A or lora_B of a linear layer".into(),
                    found: "a tensor that cannot be converted".into(),
                });
            };
            Ok((name.clone(), joined))
        });
        let alpha_factor = if self.config.use_rslora { SQRT_2 } else { 2.0 };
        Ok(Self {
            tensors: tensors.collect::<Result<_>>()?,
            config: AdapterConfig {
                r: 2 * self.config.r,
                lora_alpha: alpha_factor * self.config.lora_alpha,
                rank_pattern: self.config.rank_pattern.clone().map(|r| 2 * r),
                alpha_pattern: self
                    .config
                    .alpha_pattern
                    .clone()
                    .map(|alpha| alpha_factor * alpha),
                ..self.config.clone()
            },
        })
    }
}

/// `[A; A_0]`.
fn below(a: &DenseTensor, initial: &DenseTensor) -> DenseTensor {
    let values = [a.to_f32_vec(), initial.to_f32_vec()].concat();
    DenseTensor::from_f32(vec![2 * a.shape[0], a.shape[1]], &values)
}

/// `[B, -B_0]`.
fn beside_negated(b: &DenseTensor, initial: &DenseTensor) -> DenseTensor {
    let (out, r) = (b.shape[0], b.shape[1]);
    let (b, initial) = (b.to_f32_vec(), initial.to_f32_vec());
    let rows = b.chunks(r).zip(initial.chunks(r));
    let values: Vec<f32> = rows
        .flat_map(|(b, initial)| b.iter().copied().chain(initial.iter().map(|v| -v)))
        .collect();
    DenseTensor::from_f32(vec![out, 2 * r], &values)
}
