//! AdamW over the adapters of a decoder, with moments in f32 or in 8 bits, and clipping by the global norm.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::TrainConfig;
use super::config::Optim;
use crate::model::{Decoder, Slot};
use crate::ops::adamw::moments_8bit::{self, BLOCK_SIZE};
use crate::ops::adamw::{self, AdamW, Weight};
use crate::quant::DenseTensor;
use crate::{Error, Result};

/// Added to the norm before dividing by it, as in torch's `clip_grad_norm_`.
const CLIP_EPSILON: f64 = 1e-6;

/// Tensors with fewer elements keep f32 moments under an 8-bit optimizer, as in bitsandbytes.
pub(super) const MIN_8BIT_ELEMENTS: usize = 4096;

/// The moments of neighbouring trained tensors, flat as in [`Parameters`](crate::model::Parameters).
#[derive(Debug)]
struct Group {
    /// The part of the flat parameters that they belong to.
    range: Range<usize>,
    moments: Moments,
}

/// Named as in torch.
#[derive(Debug)]
enum Moments {
    F32 { exp_avg: Tensor, exp_avg_sq: Tensor },
    EightBit(moments_8bit::Moments),
}

/// The settings, and the moments of all trained tensors.
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
    groups: Vec<Group>,
    slots: Vec<Slot>,
}

impl Optimizer {
    /// Moments of zero for every trained tensor.
    pub fn new(config: &TrainConfig, decoder: &Decoder) -> Result<Self> {
        let slots = decoder.parameters().slots();
        let grads = decoder.parameters().grads();
        Ok(Self {
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
            max_grad_norm: config.max_grad_norm,
            step: 0,
            groups: groups(config.optim, slots, grads)?,
            slots: slots.to_vec(),
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
        for group in &self.groups {
            let part = |flat: &Tensor| flat.narrow(0, group.range.start, group.range.len());
            let low = parameters.low().map(part).transpose()?;
            let weight = Weight {
                value: &part(parameters.values())?,
                low: low.as_ref(),
            };
            let grad = part(parameters.grads())?;
            match &group.moments {
                Moments::F32 {
                    exp_avg,
                    exp_avg_sq,
                } => adamw::forward(&update, weight, &grad, exp_avg, exp_avg_sq)?,
                Moments::EightBit(moments) => {
                    moments_8bit::forward(&update, weight, &grad, moments)?;
                }
            }
        }
        Ok(())
    }

    /// The moments by name: `exp_avg.NAME` and `exp_avg_sq.NAME`; in 8 bits these are the codes, and their scales are
    /// `exp_avg_absmax.NAME` and `exp_avg_sq_absmax.NAME`.
    pub fn state(&self) -> Result<BTreeMap<String, DenseTensor>> {
        let stored = |(name, moment): (String, Tensor)| Ok((name, to_stored(&moment)?));
        self.named_moments()?.into_iter().map(stored).collect()
    }

    /// Takes up moments that [`state`](Self::state) gave after `step` updates.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] for a moment that is missing, of another type, as another `optim` leaves it, or shaped
    /// otherwise.
    pub fn restore(&mut self, step: usize, state: &BTreeMap<String, DenseTensor>) -> Result<()> {
        self.step = step;
        for (name, moment) in self.named_moments()? {
            let fits = |stored: &&DenseTensor| {
                stored.shape == moment.dims() && stored.dtype == moment.dtype()
            };
            let Some(stored) = state.get(&name).filter(fits) else {
                let describe = |dtype: DType, shape: &[usize]| format!("{dtype:?} {shape:?}");
                return Err(Error::TensorMismatch {
                    expected: describe(moment.dtype(), moment.dims()),
                    found: state
                        .get(&name)
                        .map_or("nothing".into(), |o| describe(o.dtype, &o.shape)),
                    tensor: name,
                });
            };
            let values =
                Tensor::from_raw_buffer(&stored.data, stored.dtype, &stored.shape, &Device::Cpu)?;
            moment.slice_set(&values.to_device(moment.device())?, 0, 0)?;
        }
        Ok(())
    }

    /// Views of the moments of each tensor by name.
    fn named_moments(&self) -> Result<Vec<(String, Tensor)>> {
        let mut named = Vec::new();
        for slot in &self.slots {
            let of_group = |group: &&Group| group.range.contains(&slot.range.start);
            let group = self.groups.iter().find(of_group);
            let group = group.expect("every slot is in a group");
            let start = slot.range.start - group.range.start;
            let part = |flat: &Tensor| flat.narrow(0, start, slot.range.len())?.reshape(slot.shape);
            let blocks = slot.range.len().div_ceil(BLOCK_SIZE);
            let scales = |flat: &Tensor| flat.narrow(0, start / BLOCK_SIZE, blocks);
            let mut put =
                |kind: &str, moment| named.push((format!("{kind}.{}", slot.name), moment));
            match &group.moments {
                Moments::F32 {
                    exp_avg,
                    exp_avg_sq,
                } => {
                    put("exp_avg", part(exp_avg)?);
                    put("exp_avg_sq", part(exp_avg_sq)?);
                }
                Moments::EightBit(moments_8bit::Moments { m, v, .. }) => {
                    put("exp_avg", part(&m.codes)?);
                    put("exp_avg_absmax", scales(&m.absmax)?);
                    put("exp_avg_sq", part(&v.codes)?);
                    put("exp_avg_sq_absmax", scales(&v.absmax)?);
                }
            }
        }
        Ok(named)
    }
}

/// Moments of zero for the flat parameters, in as few groups as their kinds allow.
fn groups(optim: Optim, slots: &[Slot], grads: &Tensor) -> Result<Vec<Group>> {
    let in_8_bits =
        |slot: &Slot| optim == Optim::Adamw8bit && slot.range.len() >= MIN_8BIT_ELEMENTS;
    let runs: Vec<&[Slot]> = slots
        .chunk_by(|a, b| in_8_bits(a) == in_8_bits(b))
        .collect();
    let starts = runs.iter().map(|run| run[0].range.start);
    // What lies between two tensors belongs to the first.
    let ends = starts.clone().skip(1).chain([grads.elem_count()]);
    let group = |((run, start), end): ((&&[Slot], usize), usize)| {
        let (n, device) = (end - start, grads.device());
        let zeros = || Tensor::zeros(n, DType::F32, device);
        let moments = match in_8_bits(&run[0]) {
            true => Moments::EightBit(moments_8bit::Moments::zeros(n, device)?),
            false => Moments::F32 {
                exp_avg: zeros()?,
                exp_avg_sq: zeros()?,
            },
        };
        Ok(Group {
            range: start..end,
            moments,
        })
    };
    runs.iter().zip(starts).zip(ends).map(group).collect()
}

/// A moment as it is stored: f32, or bytes.
fn to_stored(moment: &Tensor) -> Result<DenseTensor> {
    let (shape, flat) = (moment.dims().to_vec(), moment.flatten_all()?);
    Ok(match moment.dtype() {
        DType::U8 => DenseTensor {
            dtype: DType::U8,
            shape,
            data: flat.to_vec1::<u8>()?.into(),
        },
        _ => DenseTensor::from_f32(shape, &flat.to_vec1::<f32>()?),
    })
}
