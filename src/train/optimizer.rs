//! AdamW over the adapters of a decoder, with f32 moments, and clipping by the global norm.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::TrainConfig;
use crate::model::{Decoder, Slot};
use crate::ops::adamw::{self, AdamW, Weight};
use crate::quant::DenseTensor;
use crate::{Error, Result};

/// Added to the norm before dividing by it, as in torch's `clip_grad_norm_`.
const CLIP_EPSILON: f64 = 1e-6;

/// The settings, and the moments of all trained tensors, flat as in [`Parameters`](crate::model::Parameters).
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
    // Named as in torch.
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    slots: Vec<Slot>,
}

impl Optimizer {
    /// Moments of zero for every trained tensor.
    pub fn new(config: &TrainConfig, decoder: &Decoder) -> Result<Self> {
        let grads = decoder.parameters().grads();
        Ok(Self {
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
            max_grad_norm: config.max_grad_norm,
            step: 0,
            exp_avg: grads.zeros_like()?,
            exp_avg_sq: grads.zeros_like()?,
            slots: decoder.parameters().slots().to_vec(),
        })
    }

    /// Sets every gradient to zero.
    pub fn zero_grad(&self, decoder: &Decoder) -> Result<()> {
        adamw::zero(decoder.parameters().grads())
    }

    /// The norm of all gradients together.
    pub fn grad_norm(&self, decoder: &Decoder) -> Result<f64> {
        let parameters = decoder.parameters();
        Ok(adamw::squared_norm(parameters.values(), parameters.grads())?.sqrt())
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
        let parameters = decoder.parameters();
        let weight = Weight {
            value: parameters.values(),
            low: parameters.low(),
        };
        let grads = parameters.grads();
        adamw::forward(&update, weight, grads, &self.exp_avg, &self.exp_avg_sq)
    }

    /// The moments by name: `exp_avg.NAME` and `exp_avg_sq.NAME`.
    pub fn state(&self) -> Result<BTreeMap<String, DenseTensor>> {
        let mut state = BTreeMap::new();
        for (name, moment) in self.moments()? {
            let values: Vec<f32> = moment.flatten_all()?.to_vec1()?;
            let moment = DenseTensor::from_f32(moment.dims().to_vec(), &values);
            state.insert(name, moment);
        }
        Ok(state)
    }

    /// Takes up moments that [`state`](Self::state) gave after `step` updates.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] for a moment that is missing or shaped otherwise.
    pub fn restore(&mut self, step: usize, state: &BTreeMap<String, DenseTensor>) -> Result<()> {
        self.step = step;
        for (name, moment) in self.moments()? {
            let stored = state
                .get(&name)
                .filter(|stored| stored.shape == moment.dims());
            let Some(stored) = stored else {
                return Err(Error::TensorMismatch {
                    expected: format!("{:?}", moment.dims()),
                    found: state
                        .get(&name)
                        .map_or("nothing".into(), |other| format!("{:?}", other.shape)),
                    tensor: name,
                });
            };
            let values = Tensor::from_vec(stored.to_f32_vec(), moment.shape(), moment.device())?;
            moment.slice_set(&values, 0, 0)?;
        }
        Ok(())
    }

    /// Views of both moments of each tensor by name.
    fn moments(&self) -> Result<Vec<(String, Tensor)>> {
        let kinds = [("exp_avg", &self.exp_avg), ("exp_avg_sq", &self.exp_avg_sq)];
        let named = |slot: &Slot, (kind, flat): (&str, &Tensor)| {
            Ok((format!("{kind}.{}", slot.name), slot.view(flat)?))
        };
        self.slots
            .iter()
            .flat_map(|slot| kinds.map(|kind| named(slot, kind)))
            .collect()
    }
}
