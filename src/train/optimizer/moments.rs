//! The moments of neighbouring trained tensors: on the device, or in host memory from where they visit it a page at a time.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use crate::Result;
use crate::device::Side;
use crate::ops::adamw::moments_8bit::{self, BLOCK_SIZE, Moment};
use crate::ops::adamw::{self, AdamW, Weight};
use crate::ops::paged::{PagedTensor, Part};
use crate::quant::DenseTensor;

/// What the moments of `elements` elements are made of, by the names under which they are saved: type, and elements for one
/// of the moments' own.
const F32: [(&str, DType, usize); 2] = [("exp_avg", DType::F32, 1), ("exp_avg_sq", DType::F32, 1)];
const EIGHT_BIT: [(&str, DType, usize); 4] = [
    ("exp_avg", DType::U8, 1),
    ("exp_avg_absmax", DType::F32, BLOCK_SIZE),
    ("exp_avg_sq", DType::U8, 1),
    ("exp_avg_sq_absmax", DType::F32, BLOCK_SIZE),
];

fn layout(in_8_bits: bool) -> &'static [(&'static str, DType, usize)] {
    if in_8_bits { &EIGHT_BIT } else { &F32 }
}

/// Type and elements of each tensor that the moments of `elements` elements are made of.
pub fn tensors(in_8_bits: bool, elements: usize) -> impl Iterator<Item = (DType, usize)> {
    let layout = layout(in_8_bits).iter();
    layout.map(move |(_, dtype, per)| (*dtype, elements.div_ceil(*per)))
}

/// Both moments of flat neighbours.
#[derive(Debug)]
pub(super) struct Moments {
    in_8_bits: bool,
    tensors: Vec<Home>,
    /// What 8-bit codes stand for.
    maps: [Tensor; 2],
}

#[derive(Debug)]
enum Home {
    Device(Tensor),
    Host(PagedTensor),
}

impl Moments {
    /// Of `n` elements, all zero.
    pub(super) fn zeros(in_8_bits: bool, n: usize, side: Side, device: &Device) -> Result<Self> {
        let tensors = tensors(in_8_bits, n).map(|(dtype, len)| {
            Ok(match side {
                Side::Device => Home::Device(Tensor::zeros(len, dtype, device)?),
                Side::Host => Home::Host(PagedTensor::zeros(len, dtype, device)?),
            })
        });
        Ok(Self {
            in_8_bits,
            tensors: tensors.collect::<Result<_>>()?,
            maps: moments_8bit::maps(device)?,
        })
    }

    /// Updates all of `weight`, where the moments are on the device.
    pub(super) fn update(&self, update: &AdamW, weight: Weight<'_>, grad: &Tensor) -> Result<()> {
        let on_device = self.tensors.iter().filter_map(|home| match home {
            Home::Device(tensor) => Some(tensor.clone()),
            Home::Host(_) => None,
        });
        self.update_with(update, weight, grad, &on_device.collect::<Vec<_>>())
    }

    /// Updates a part of the weight with those tensors of its moments, which are on the device.
    pub(super) fn update_with(
        &self,
        update: &AdamW,
        weight: Weight<'_>,
        grad: &Tensor,
        moments: &[Tensor],
    ) -> Result<()> {
        let moment = |codes: &Tensor, absmax: &Tensor| Moment {
            codes: codes.clone(),
            absmax: absmax.clone(),
        };
        match moments {
            [m, v] => adamw::forward(update, weight, grad, m, v),
            [m, m_absmax, v, v_absmax] => {
                let moments = moments_8bit::Moments {
                    m: moment(m, m_absmax),
                    v: moment(v, v_absmax),
                    maps: self.maps.clone(),
                };
                moments_8bit::forward(update, weight, grad, &moments)
            }
            _ => unreachable!("moments are made of two tensors or of four"),
        }
    }

    /// The parts that belong to some elements, where they are on the host.
    pub(super) fn paged_parts(&self, elements: &Range<usize>) -> Vec<Part<'_>> {
        let tensors = self.tensors.iter().zip(layout(self.in_8_bits));
        let parts = tensors.filter_map(|(home, (_, _, per))| match home {
            Home::Host(paged) => Some((paged, part(elements, *per))),
            Home::Device(_) => None,
        });
        parts.collect()
    }

    /// Name, type and shape of each moment of some elements that make up a tensor of `shape`.
    pub(super) fn described(
        &self,
        elements: &Range<usize>,
        shape: &[usize],
    ) -> impl Iterator<Item = (&'static str, DType, Vec<usize>)> {
        let (elements, shape) = (elements.clone(), shape.to_vec());
        let layout = layout(self.in_8_bits).iter();
        layout.map(move |(name, dtype, per)| {
            let shape = match per {
                1 => shape.clone(),
                _ => vec![part(&elements, *per).len()],
            };
            (*name, *dtype, shape)
        })
    }

    /// The same with what they hold.
    pub(super) fn stored(
        &self,
        elements: &Range<usize>,
        shape: &[usize],
    ) -> Result<Vec<(&'static str, DenseTensor)>> {
        let layout = layout(self.in_8_bits).iter();
        let moments = self.described(elements, shape).zip(layout);
        let stored = moments.zip(&self.tensors);
        let stored = stored.map(|(((name, dtype, shape), (_, _, per)), home)| {
            let data = home.read(part(elements, *per))?.into();
            Ok((name, DenseTensor { dtype, shape, data }))
        });
        stored.collect()
    }

    /// Takes up what [`stored`](Self::stored) gave, in its order. The last block of codes is filled with those of zero, which
    /// is what the updates leave there: any other would count in its scale.
    pub(super) fn restore(&self, elements: &Range<usize>, stored: &[&DenseTensor]) -> Result<()> {
        let tensors = self.tensors.iter().zip(layout(self.in_8_bits));
        for ((home, (_, _, per)), stored) in tensors.zip(stored) {
            home.write(part(elements, *per), stored)?;
        }
        let rest = elements.end..elements.end.next_multiple_of(BLOCK_SIZE);
        if let ([m, _, v, _], false) = (&self.tensors[..], rest.is_empty()) {
            for (codes, zero) in [m, v].into_iter().zip(moments_8bit::zero_codes()) {
                let zeros = DenseTensor {
                    dtype: DType::U8,
                    shape: vec![rest.len()],
                    data: vec![zero; rest.len()].into(),
                };
                codes.write(rest.clone(), &zeros)?;
            }
        }
        Ok(())
    }
}

/// The elements that belong to those of a moment, where one belongs to `per` of them.
fn part(elements: &Range<usize>, per: usize) -> Range<usize> {
    elements.start / per..elements.end.div_ceil(per)
}

impl Home {
    fn read(&self, range: Range<usize>) -> Result<Vec<u8>> {
        match self {
            Self::Host(paged) => paged.with_bytes(range, |bytes| bytes.to_vec()),
            Self::Device(tensor) => {
                let values = tensor.narrow(0, range.start, range.len())?;
                Ok(match values.dtype() {
                    DType::U8 => values.to_vec1::<u8>()?,
                    _ => bytemuck::cast_slice(&values.to_vec1::<f32>()?).to_vec(),
                })
            }
        }
    }

    fn write(&self, range: Range<usize>, stored: &DenseTensor) -> Result<()> {
        match self {
            Self::Host(paged) => {
                paged.with_bytes(range, |bytes| bytes.copy_from_slice(&stored.data))
            }
            Self::Device(tensor) => {
                let values = Tensor::from_raw_buffer(
                    &stored.data,
                    stored.dtype,
                    &[range.len()],
                    &Device::Cpu,
                )?;
                tensor.slice_set(&values.to_device(tensor.device())?, 0, range.start)?;
                Ok(())
            }
        }
    }
}
