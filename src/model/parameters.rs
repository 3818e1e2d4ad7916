//! The trained values of a decoder, all in one piece: the optimizer updates them together.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::bf16;

use crate::Result;
use crate::device::{Placement, Side};
use crate::ops::adamw;
use crate::ops::paged::PagedTensor;
use crate::quant::FrozenWeight;

/// Every trained tensor begins at a multiple of this many elements: a block of 8-bit moments belongs to one tensor, and
/// its memory is aligned for wide accesses.
pub const TRAINED_ALIGNMENT: usize = 256;

/// A tensor that is trained, with the gradient that backward adds to: views into the [`Parameters`] of its decoder.
#[derive(Debug, Clone)]
pub struct Trainable {
    /// What forward and backward read: f32 on the CPU, else the upper half of the master, bf16.
    pub value: Tensor,
    /// The lower half of the f32 master, where `value` is bf16.
    low: Option<LowerHalf>,
    /// f32.
    pub grad: Tensor,
}

/// Of one tensor, as i16.
#[derive(Debug, Clone)]
enum LowerHalf {
    OnDevice(Tensor),
    Paged(Arc<PagedTensor>, Range<usize>),
}

impl LowerHalf {
    fn read(&self) -> Result<Vec<i16>> {
        match self {
            Self::OnDevice(low) => Ok(low.flatten_all()?.to_vec1()?),
            Self::Paged(low, elements) => low.with_bytes(elements.clone(), |bytes| {
                let halves = bytes.as_chunks::<2>().0.iter();
                halves.map(|half| i16::from_ne_bytes(*half)).collect()
            }),
        }
    }
}

/// Of all tensors, flat, as i16.
#[derive(Debug, Clone)]
pub enum LowerHalves {
    OnDevice(Tensor),
    Paged(Arc<PagedTensor>),
}

impl LowerHalves {
    fn new(low: Vec<i16>, placement: &Placement) -> Result<Self> {
        let (n, device) = (low.len(), &placement.device);
        if placement.residence.optimizer == Side::Device {
            return Ok(Self::OnDevice(Tensor::from_vec(low, n, device)?));
        }
        let paged = PagedTensor::zeros(n, DType::I16, device)?;
        paged.with_bytes(0..n, |bytes| {
            bytes.copy_from_slice(bytemuck::cast_slice(&low))
        })?;
        Ok(Self::Paged(Arc::new(paged)))
    }

    fn of(&self, slot: &Slot) -> Result<LowerHalf> {
        Ok(match self {
            Self::OnDevice(low) => LowerHalf::OnDevice(slot.view(low)?),
            Self::Paged(low) => LowerHalf::Paged(Arc::clone(low), slot.range.clone()),
        })
    }
}

impl Trainable {
    /// The lower half of the f32 master, where `value` is bf16 and the half is on its device.
    pub(super) fn low_on_device(&self) -> Option<&Tensor> {
        match &self.low {
            Some(LowerHalf::OnDevice(low)) => Some(low),
            Some(LowerHalf::Paged(..)) | None => None,
        }
    }

    /// The f32 master, row-major.
    pub fn master(&self) -> Result<Vec<f32>> {
        let Some(low) = &self.low else {
            return Ok(self.value.flatten_all()?.to_vec1()?);
        };
        let high: Vec<bf16> = self.value.flatten_all()?.to_vec1()?;
        let halves = high.into_iter().zip(low.read()?);
        Ok(halves.map(|(h, l)| adamw::join_master(h, l)).collect())
    }
}

/// A tensor to be trained.
pub(super) struct NewParameter {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) values: NewValues,
}

/// Row-major.
pub(super) enum NewValues {
    Given(Vec<f32>),
    /// A copy of these.
    Of(FrozenWeight),
}

impl NewValues {
    fn read(self) -> Vec<f32> {
        match self {
            Self::Given(values) => values,
            Self::Of(weight) => {
                let mut values = vec![0.0; weight.out_features() * weight.in_features()];
                weight.read_range(0, &mut values);
                values
            }
        }
    }
}

/// The values of all tensors, one after another: the masters, or their halves where kernels compute.
enum Flat {
    Masters(Vec<f32>),
    Halves(Vec<bf16>, Vec<i16>),
}

impl Flat {
    fn with_capacity(n: usize, dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::Masters(Vec::with_capacity(n)),
            _ => Self::Halves(Vec::with_capacity(n), Vec::with_capacity(n)),
        }
    }

    fn extend(&mut self, values: impl Iterator<Item = f32>) {
        match self {
            Self::Masters(masters) => masters.extend(values),
            Self::Halves(high, low) => {
                for (h, l) in values.map(adamw::split_master) {
                    high.push(h);
                    low.push(l);
                }
            }
        }
    }
}

/// All trained tensors of a decoder, one after another in flat tensors of one length.
#[derive(Debug, Clone)]
pub struct Parameters {
    values: Tensor,
    low: Option<LowerHalves>,
    grads: Tensor,
    slots: Vec<Slot>,
}

/// Where a tensor lies in the flat ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    pub name: String,
    pub shape: Vec<usize>,
    pub range: Range<usize>,
}

impl Parameters {
    /// Lays the tensors out, with gradients of zero.
    pub(super) fn new(tensors: Vec<NewParameter>, placement: &Placement) -> Result<Self> {
        let aligned = |shape: &[usize]| {
            let elements: usize = shape.iter().product();
            elements.next_multiple_of(TRAINED_ALIGNMENT)
        };
        let n = tensors.iter().map(|new| aligned(&new.shape)).sum();
        let mut flat = Flat::with_capacity(n, placement.dtype);
        let mut slots = Vec::with_capacity(tensors.len());
        let mut start = 0;
        for NewParameter {
            name,
            shape,
            values,
        } in tensors
        {
            let values = values.read();
            let (range, end) = (start..start + values.len(), start + aligned(&shape));
            let gap = end - range.end;
            flat.extend(values.into_iter().chain(std::iter::repeat_n(0.0, gap)));
            slots.push(Slot { name, shape, range });
            start = end;
        }
        let device = &placement.device;
        let (values, low) = match flat {
            Flat::Masters(masters) => (Tensor::from_vec(masters, n, device)?, None),
            Flat::Halves(high, low) => {
                let low = LowerHalves::new(low, placement)?;
                (Tensor::from_vec(high, n, device)?, Some(low))
            }
        };
        Ok(Self {
            grads: Tensor::zeros(n, DType::F32, device)?,
            values,
            low,
            slots,
        })
    }

    /// None at all.
    pub(super) fn none(device: &Device) -> Result<Self> {
        Ok(Self {
            values: Tensor::zeros(0, DType::F32, device)?,
            low: None,
            grads: Tensor::zeros(0, DType::F32, device)?,
            slots: Vec::new(),
        })
    }

    fn slot(&self, name: &str) -> &Slot {
        let slot = self.slots.iter().find(|slot| slot.name == name);
        slot.unwrap_or_else(|| panic!("{name} is trained"))
    }

    /// Views of a tensor that is there.
    pub(super) fn trainable(&self, name: &str) -> Result<Trainable> {
        let slot = self.slot(name);
        Ok(Trainable {
            value: slot.view(&self.values)?,
            low: self.low.as_ref().map(|low| low.of(slot)).transpose()?,
            grad: slot.view(&self.grads)?,
        })
    }

    /// The values and the gradients of matrices that lie one right after another, as those of one: `[rows of all, cols]`.
    pub(super) fn together(&self, names: &[String]) -> Result<(Tensor, Tensor)> {
        let slots: Vec<&Slot> = names.iter().map(|name| self.slot(name)).collect();
        for pair in slots.windows(2) {
            let is_next = pair[0].range.end == pair[1].range.start;
            assert!(is_next, "there is a gap before {}", pair[1].name);
        }
        let (first, last) = (slots[0], slots[slots.len() - 1]);
        let rows = slots.iter().map(|slot| slot.shape[0]).sum();
        let all = Slot {
            name: first.name.clone(),
            shape: vec![rows, first.shape[1]],
            range: first.range.start..last.range.end,
        };
        Ok((all.view(&self.values)?, all.view(&self.grads)?))
    }

    /// The flat values, `[n]`: f32, or the upper halves in bf16.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// The lower halves of the f32 masters, where the values are bf16.
    pub fn low(&self) -> Option<&LowerHalves> {
        self.low.as_ref()
    }

    /// The flat gradients in f32, `[n]`.
    pub fn grads(&self) -> &Tensor {
        &self.grads
    }

    /// Where each tensor lies: in the order of the forward pass, of layers that read the same input all A before all B.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }
}

impl Slot {
    /// The part of a flat tensor that is this one's, in its shape.
    pub fn view(&self, flat: &Tensor) -> Result<Tensor> {
        Ok(flat
            .narrow(0, self.range.start, self.range.len())?
            .reshape(&*self.shape)?)
    }
}
