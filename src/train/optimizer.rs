//! AdamW over the adapters of a decoder, with moments in f32 or in 8 bits, and clipping by the global norm.

mod moments;

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use moments::Moments;

use super::TrainConfig;
use crate::device::Side;
use crate::model::{Decoder, LowerHalves, Slot};
use crate::ops::adamw::{self, AdamW, Weight};
use crate::ops::paged::{PagedTensor, Pager, Purpose};
use crate::quant::DenseTensor;
use crate::store::LORA_B;
use crate::{Error, Result};

/// Added to the norm before dividing by it, as in torch's `clip_grad_norm_`.
const CLIP_EPSILON: f64 = 1e-6;

/// Tensors with fewer elements keep f32 moments under an 8-bit optimizer, as in bitsandbytes.
pub(super) const MIN_8BIT_ELEMENTS: usize = 4096;

/// Elements that visit the device at a time, where the moments are in host memory: enough for a copy at full speed.
pub(super) const PAGE_ELEMENTS: usize = 1 << 21;

/// Neighbouring trained tensors, flat as in [`Parameters`](crate::model::Parameters).
#[derive(Debug)]
struct Group {
    /// The part of the flat parameters that they are.
    range: Range<usize>,
    kind: Kind,
    moments: Moments,
}

/// What neighbours must have in common to be updated together.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Kind {
    in_8_bits: bool,
    /// Their learning rate, as a multiple of the run's.
    lr_ratio: f64,
}

impl Kind {
    fn of(slot: &Slot, config: &TrainConfig) -> Self {
        // As in PEFT: the magnitudes of DoRA are vectors.
        let is_b = slot.name.ends_with(LORA_B) || slot.shape.len() == 1;
        Self {
            in_8_bits: config.optim.is_8bit() && slot.range.len() >= MIN_8BIT_ELEMENTS,
            lr_ratio: config.loraplus_lr_ratio.filter(|_| is_b).unwrap_or(1.0),
        }
    }
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
    /// Where pages visit the device, of f32 moments and of 8-bit ones; `None` where they live there.
    pagers: Option<[Pager; 2]>,
}

impl Optimizer {
    /// Moments of zero for every trained tensor.
    pub fn new(config: &TrainConfig, decoder: &Decoder) -> Result<Self> {
        let slots = decoder.parameters().slots();
        let grads = decoder.parameters().grads();
        let side = decoder.placement().residence.optimizer;
        let groups = groups(config, slots, grads, side)?;
        let pagers = match side {
            Side::Device => None,
            Side::Host => Some([
                pager(&groups, false, grads.device())?,
                pager(&groups, true, grads.device())?,
            ]),
        };
        Ok(Self {
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
            max_grad_norm: config.max_grad_norm,
            step: 0,
            groups,
            slots: slots.to_vec(),
            pagers,
        })
    }

    /// Whether its moments are those of the tensors that the decoder trains.
    pub fn is_of(&self, decoder: &Decoder) -> bool {
        self.slots == decoder.parameters().slots()
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

    /// Clips the gradients, whose norm is `grad_norm`, and updates every trained tensor, in place. The decoder is taken `&mut` so
    /// that no cache of it outlives the values it was made with.
    pub fn update(
        &mut self,
        decoder: &mut Decoder,
        learning_rate: f64,
        grad_norm: f64,
    ) -> Result<()> {
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
        let flat = Flat {
            values: decoder.parameters().values(),
            grads: decoder.parameters().grads(),
        };
        let of_group = |group: &Group| AdamW {
            learning_rate: learning_rate * group.kind.lr_ratio,
            ..update
        };
        match (&mut self.pagers, decoder.parameters().low()) {
            (Some(pagers), Some(LowerHalves::Paged(low))) => {
                for (in_8_bits, pager) in [false, true].into_iter().zip(pagers) {
                    let of_kind = |group: &&Group| group.kind.in_8_bits == in_8_bits;
                    let groups = self.groups.iter().filter(of_kind);
                    update_paged(pager, groups, low, &flat, of_group)?;
                }
                Ok(())
            }
            (_, low) => {
                let low = match low {
                    Some(LowerHalves::OnDevice(low)) => Some(low),
                    _ => None,
                };
                self.groups.iter().try_for_each(|group| {
                    let low = low.map(|low| part(low, &group.range)).transpose()?;
                    let (value, grad) = flat.part(&group.range)?;
                    let weight = Weight {
                        value: &value,
                        low: low.as_ref(),
                    };
                    group.moments.update(&of_group(group), weight, &grad)
                })
            }
        }
    }

    /// The moments by name: `exp_avg.NAME` and `exp_avg_sq.NAME`; in 8 bits these are the codes, and their scales are
    /// `exp_avg_absmax.NAME` and `exp_avg_sq_absmax.NAME`.
    pub fn state(&self) -> Result<BTreeMap<String, DenseTensor>> {
        let mut state = BTreeMap::new();
        for slot in &self.slots {
            let (group, elements) = self.place(slot);
            let stored = group.moments.stored(&elements, &slot.shape)?;
            let named = stored.into_iter();
            state.extend(named.map(|(kind, moment)| (format!("{kind}.{}", slot.name), moment)));
        }
        Ok(state)
    }

    /// Takes up moments that [`state`](Self::state) gave after `step` updates.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] for a moment that is missing, of another type, as another `optim` leaves it, or shaped
    /// otherwise.
    pub fn restore(&mut self, step: usize, state: &BTreeMap<String, DenseTensor>) -> Result<()> {
        self.step = step;
        for slot in &self.slots {
            let (group, elements) = self.place(slot);
            let moments = group.moments.described(&elements, &slot.shape);
            let stored = moments.map(|(kind, dtype, shape)| {
                let name = format!("{kind}.{}", slot.name);
                match state.get(&name) {
                    Some(found) if found.shape == shape && found.dtype == dtype => Ok(found),
                    found => Err(Error::TensorMismatch {
                        tensor: name,
                        expected: format!("{dtype:?} {shape:?}"),
                        found: found.map_or("nothing".into(), |found| {
                            format!("{:?} {:?}", found.dtype, found.shape)
                        }),
                    }),
                }
            });
            let stored = stored.collect::<Result<Vec<_>>>()?;
            group.moments.restore(&elements, &stored)?;
        }
        Ok(())
    }

    /// The group of a tensor, and the tensor's elements in it.
    fn place(&self, slot: &Slot) -> (&Group, Range<usize>) {
        let of_group = |group: &&Group| group.range.contains(&slot.range.start);
        let group = self.groups.iter().find(of_group);
        let group = group.expect("every slot is in a group");
        let start = slot.range.start - group.range.start;
        (group, start..start + slot.range.len())
    }
}

/// The flat values and their gradients.
struct Flat<'a> {
    values: &'a Tensor,
    grads: &'a Tensor,
}

impl Flat<'_> {
    fn part(&self, range: &Range<usize>) -> Result<(Tensor, Tensor)> {
        Ok((part(self.values, range)?, part(self.grads, range)?))
    }
}

fn part(flat: &Tensor, range: &Range<usize>) -> Result<Tensor> {
    Ok(flat.narrow(0, range.start, range.len())?)
}

/// Slots for the pages of these groups' moments of one kind.
fn pager(groups: &[Group], in_8_bits: bool, device: &Device) -> Result<Pager> {
    let of_kind = groups.iter().filter(|g| g.kind.in_8_bits == in_8_bits);
    let longest = of_kind.map(|group| group.range.len()).max().unwrap_or(0);
    Pager::new(&page(in_8_bits, longest.min(PAGE_ELEMENTS)), device)
}

/// Type and elements of each tensor of a page: those of the moments, and the lower halves.
pub(super) fn page(in_8_bits: bool, elements: usize) -> Vec<(DType, usize)> {
    let moments = moments::tensors(in_8_bits, elements);
    moments.chain([(DType::I16, elements)]).collect()
}

/// Updates groups page by page: while one is updated, the next comes and the one before goes.
fn update_paged<'a>(
    pager: &mut Pager,
    groups: impl Iterator<Item = &'a Group>,
    low: &PagedTensor,
    flat: &Flat<'_>,
    update: impl Fn(&Group) -> AdamW,
) -> Result<()> {
    let in_flat = |group: &Group, page: &Range<usize>| {
        group.range.start + page.start..group.range.start + page.end
    };
    let pages = groups.flat_map(|group| {
        let starts = (0..group.range.len()).step_by(PAGE_ELEMENTS);
        starts.map(move |start| {
            let page = start..group.range.len().min(start + PAGE_ELEMENTS);
            let mut parts = group.moments.paged_parts(&page);
            parts.push((low, in_flat(group, &page)));
            ((group, page), parts)
        })
    });
    pager.for_each(Purpose::Write, pages, |(group, page), tensors| {
        let (low, moments) = tensors.split_last().expect("the lower halves are last");
        let (value, grad) = flat.part(&in_flat(group, &page))?;
        let weight = Weight {
            value: &value,
            low: Some(low),
        };
        let update = update(group);
        group.moments.update_with(&update, weight, &grad, moments)
    })
}

/// Moments of zero for the flat parameters, in as few groups as their kinds allow.
fn groups(config: &TrainConfig, slots: &[Slot], grads: &Tensor, side: Side) -> Result<Vec<Group>> {
    let kind = |slot: &Slot| Kind::of(slot, config);
    let runs: Vec<&[Slot]> = slots.chunk_by(|a, b| kind(a) == kind(b)).collect();
    let starts = runs.iter().map(|run| run[0].range.start);
    // What lies between two tensors belongs to the first.
    let ends = starts.clone().skip(1).chain([grads.elem_count()]);
    let group = |((run, start), end): ((&&[Slot], usize), usize)| {
        let kind = kind(&run[0]);
        Ok(Group {
            range: start..end,
            kind,
            moments: Moments::zeros(kind.in_8_bits, end - start, side, grads.device())?,
        })
    };
    runs.iter().zip(starts).zip(ends).map(group).collect()
}
