//! AdamW over the adapters of a decoder, with f32 moments, and clipping by the global norm.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use super::TrainConfig;
use crate::model::Decoder;
use crate::ops::adamw::{self, AdamW};
use crate::quant::DenseTensor;
use crate::{Error, Result};

/// Added to the norm before dividing by it, as in torch's `clip_grad_norm_`.
const CLIP_EPSILON: f64 = 1e-6;

/// The settings, and the moments of each trained tensor in the order of [`Decoder::trainables`].
#[derive(Debug)]
pub struct Optimizer {
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
    /// 0 for never.
    max_grad_norm: f64,
    /// Updates done.
    step: usize,
    moments: Vec<Moments>,
}

/// Named as in torch.
#[derive(Debug)]
struct Moments {
    name: String,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

impl Optimizer {
    /// Moments of zero for every trained tensor.
    pub fn new(config: &TrainConfig, decoder: &Decoder) -> Result<Self> {
        let moments = decoder.trainables().map(|(name, trainable)| {
            let zeros = || {
                Tensor::zeros(
                    trainable.value.shape(),
                    DType::F32,
                    trainable.value.device(),
                )
            };
            Ok(Moments {
                name,
                exp_avg: zeros()?,
                exp_avg_sq: zeros()?,
            })
        });
        Ok(Self {
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
            max_grad_norm: config.max_grad_norm,
            step: 0,
            moments: moments.collect::<Result<_>>()?,
        })
    }

    /// Sets every gradient to zero.
    pub fn zero_grad(&self, decoder: &Decoder) -> Result<()> {
        decoder
            .trainables()
            .try_for_each(|(_, trainable)| adamw::zero(&trainable.grad))
    }

    /// The norm of all gradients together.
    pub fn grad_norm(&self, decoder: &Decoder) -> Result<f64> {
        let mut squares = 0.0;
        for (_, trainable) in decoder.trainables() {
            squares += adamw::squared_norm(&trainable.grad)?;
        }
        Ok(squares.sqrt())
    }

    /// Clips the gradients, whose norm is `grad_norm`, and updates every trained tensor.
    pub fn update(&mut self, decoder: &Decoder, learning_rate: f64, grad_norm: f64) -> Result<()> {
        self.step += 1;
        let grad_scale = match self.max_grad_norm > 0.0 {
            true => (self.max_grad_norm / (grad_norm + CLIP_EPSILON)).min(1.0) as f32,
            false => 1.0,
        };
        let update = AdamW {
            learning_rate,
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            weight_decay: self.weight_decay,
            step: self.step,
            grad_scale,
        };
        for ((_, trainable), moments) in decoder.trainables().zip(&self.moments) {
            adamw::forward(
                &update,
                &trainable.value,
                &trainable.grad,
                &moments.exp_avg,
                &moments.exp_avg_sq,
            )?;
        }
        Ok(())
    }

    /// The moments by name: `exp_avg.NAME` and `exp_avg_sq.NAME`.
    pub fn state(&self) -> Result<BTreeMap<String, DenseTensor>> {
        let mut state = BTreeMap::new();
        for moments in &self.moments {
            for (kind, tensor) in moments.by_kind() {
                let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
                state.insert(
                    format!("{kind}.{}", moments.name),
                    DenseTensor::from_f32(tensor.dims().to_vec(), &values),
                );
            }
        }
        Ok(state)
    }

    /// Takes up moments that [`state`](Self::state) gave after `step` updates.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] for a moment that is missing or shaped otherwise.
    pub fn restore(&mut self, step: usize, state: &BTreeMap<String, DenseTensor>) -> Result<()> {
        self.step = step;
        for moments in &self.moments {
            for (kind, tensor) in moments.by_kind() {
                let name = format!("{kind}.{}", moments.name);
                let stored = state
                    .get(&name)
                    .filter(|stored| stored.shape == tensor.dims());
                let Some(stored) = stored else {
                    return Err(Error::TensorMismatch {
                        expected: format!("{:?}", tensor.dims()),
                        found: state
                            .get(&name)
                            .map_or("nothing".into(), |other| format!("{:?}", other.shape)),
                        tensor: name,
                    });
                };
                let values =
                    Tensor::from_vec(stored.to_f32_vec(), tensor.shape(), tensor.device())?;
                tensor.slice_set(&values, 0, 0)?;
            }
        }
        Ok(())
    }
}

impl Moments {
    fn by_kind(&self) -> [(&'static str, &Tensor); 2] {
        [("exp_avg", &self.exp_avg), ("exp_avg_sq", &self.exp_avg_sq)]
    }
}
