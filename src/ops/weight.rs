//! A frozen weight where its operations run: in the memory map for the CPU, its parts copied to the device for kernels.
//!
//! On a device a 4-bit weight is dequantized to bf16 in front of the product that needs it, into a scratch buffer that is
//! allocated once and shared by all weights of a model. The buffer keeps what was dequantized last, so that a block that
//! fits is dequantized once for recompute and backward together; where memory is short it holds one weight.

mod stream;

use std::collections::VecDeque;
use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use candle_core::{DType, Device, Tensor};
use half::bf16;

use super::launcher::{Launcher, Operand};
use crate::quant::{Absmax, BlockSizes, DenseTensor, FrozenWeight, Params4bit, dynamic_map};
use crate::{Error, Result};

pub use stream::{BlockBytes, BlockStream, Direction, Entered, Slots};

const OP: &str = "weight";
/// Elements that a thread of the dequantizing kernel takes at a time.
const PER_THREAD: usize = 32;
/// Weights begin at multiples of this many elements of the scratch buffer: 256 bytes.
const ALIGNMENT: usize = 128;

/// A frozen weight, `[out, in]`. It reads as its [`FrozenWeight`] on the host.
#[derive(Debug, Clone)]
pub struct Weight {
    host: FrozenWeight,
    on_device: Option<Arc<DeviceWeight>>,
}

impl From<FrozenWeight> for Weight {
    fn from(host: FrozenWeight) -> Self {
        Self {
            host,
            on_device: None,
        }
    }
}

impl Deref for Weight {
    type Target = FrozenWeight;

    fn deref(&self) -> &FrozenWeight {
        &self.host
    }
}

/// The parts of a weight on the device.
#[derive(Debug)]
enum DeviceWeight {
    /// bf16, `[out, in]`.
    Dense(Tensor),
    Quantized(QuantizedParts),
}

#[derive(Debug)]
struct QuantizedParts {
    id: usize,
    packed: Tensor,
    /// 8-bit codes of the scales, with double quantization.
    codes: Option<Tensor>,
    /// The scales, or those of the codes.
    absmax: Tensor,
    dynamic_map: Tensor,
    code: Tensor,
    offset: f32,
    block_size: usize,
    nested_block_size: usize,
    shape: (usize, usize),
    cache: Arc<DenseCache>,
}

impl Weight {
    /// Copies the weight to the device of `cache`, as stored where it is in 4 bits, in bf16 otherwise.
    ///
    /// # Errors
    /// [`Error::OutOfDeviceMemory`] where it does not fit.
    pub fn on_device(host: FrozenWeight, cache: &Arc<DenseCache>) -> Result<Self> {
        let parts = match &host {
            FrozenWeight::Dense(dense) => DeviceWeight::Dense(upload_dense(dense, cache.device())?),
            FrozenWeight::Quantized(params) => {
                let shape = (host.out_features(), host.in_features());
                let bytes =
                    |bytes: &Bytes| Ok(Tensor::from_slice(bytes, bytes.len(), cache.device())?);
                DeviceWeight::Quantized(QuantizedParts::new(params, shape, cache, bytes)?)
            }
        };
        Ok(Self {
            host,
            on_device: Some(Arc::new(parts)),
        })
    }

    /// A 4-bit weight of the present block of `slots`, which is on the device while that block is entered. Its codes and
    /// their scales are streamed; the scales of those, 1/256 of them, stay.
    ///
    /// # Errors
    /// [`Error::Shape`] for a weight that is not in 4 bits.
    pub fn streamed(
        host: FrozenWeight,
        cache: &Arc<DenseCache>,
        slots: &mut Slots,
    ) -> Result<Self> {
        let FrozenWeight::Quantized(params) = &host else {
            return Err(Error::Shape {
                op: OP,
                expected: "a weight in 4 bits to be streamed".into(),
                found: "a dense one".into(),
            });
        };
        let shape = (host.out_features(), host.in_features());
        let parts = QuantizedParts::new(params, shape, cache, |bytes| slots.place(bytes))?;
        Ok(Self {
            host,
            on_device: Some(Arc::new(DeviceWeight::Quantized(parts))),
        })
    }

    /// Bytes of a slot for blocks of weights of these numbers of elements.
    pub fn slot_bytes(elements: &[usize], blocks: BlockSizes) -> usize {
        BlockBytes::slot_bytes(
            elements
                .iter()
                .flat_map(|&n| [blocks.packed_bytes(n), blocks.absmax_bytes(n)]),
        )
    }

    /// Brings a 4-bit weight into the scratch buffer of its device, unless it is there; nothing for any other weight.
    pub fn dequantize(&self) -> Result<()> {
        if let Some(device) = self.device() {
            self.dense(&Launcher::on(OP, device)?)?;
        }
        Ok(())
    }

    /// Whether kernels can read it.
    pub fn is_on_device(&self) -> bool {
        self.on_device.is_some()
    }

    /// The device that the weight was copied to.
    pub(super) fn device(&self) -> Option<&Device> {
        match self.on_device.as_deref()? {
            DeviceWeight::Dense(weight) => Some(weight.device()),
            DeviceWeight::Quantized(parts) => Some(parts.packed.device()),
        }
    }

    /// The weight in bf16 on the device, valid until the next weights are asked for: to be used by what is queued next.
    ///
    /// # Errors
    /// [`Error::Shape`] for a weight that was not copied there.
    pub(super) fn dense(&self, launcher: &Launcher) -> Result<Tensor> {
        match self.on_device.as_deref() {
            Some(DeviceWeight::Dense(weight)) => Ok(weight.clone()),
            Some(DeviceWeight::Quantized(parts)) => parts.dense(launcher),
            None => Err(Error::Shape {
                op: OP,
                expected: "a weight on the device".into(),
                found: "it on the host alone".into(),
            }),
        }
    }
}

fn upload_dense(dense: &DenseTensor, device: &Device) -> Result<Tensor> {
    let shape = dense.shape.as_slice();
    if dense.dtype == DType::BF16 {
        return Ok(Tensor::from_raw_buffer(
            &dense.data,
            DType::BF16,
            shape,
            device,
        )?);
    }
    let values: Vec<bf16> = dense.to_f32_vec().into_iter().map(bf16::from_f32).collect();
    Ok(Tensor::from_vec(values, shape, device)?)
}

impl QuantizedParts {
    /// `bring` gives the tensor of bytes that will be on the device.
    fn new(
        params: &Params4bit,
        shape: (usize, usize),
        cache: &Arc<DenseCache>,
        mut bring: impl FnMut(&Bytes) -> Result<Tensor>,
    ) -> Result<Self> {
        let device = cache.device();
        let packed = bring(&params.packed)?;
        let (codes, absmax, offset, nested_block_size) = match &params.absmax {
            // As bytes, which kernels read as what they are.
            Absmax::Single(absmax) => (None, bring(absmax)?, 0.0, 1),
            Absmax::Double {
                codes,
                nested_absmax,
                nested_block_size,
                offset,
            } => {
                let absmax = Tensor::from_slice(nested_absmax, nested_absmax.len(), device)?;
                (Some(bring(codes)?), absmax, *offset, *nested_block_size)
            }
        };
        Ok(Self {
            id: cache.next_id.fetch_add(1, Ordering::Relaxed),
            packed,
            codes,
            absmax,
            dynamic_map: Tensor::from_slice(dynamic_map(), 256, device)?,
            code: Tensor::from_slice(params.quant_type.code(), 16, device)?,
            offset,
            block_size: params.block_size,
            nested_block_size,
            shape,
            cache: Arc::clone(cache),
        })
    }

    fn dense(&self, launcher: &Launcher) -> Result<Tensor> {
        let elements = self.shape.0 * self.shape.1;
        let (range, is_there) = self.cache.place(self.id, elements)?;
        let dense = self.cache.buffer.narrow(0, range.start, elements)?;
        if !is_there {
            self.dequantize(launcher, &dense)?;
        }
        Ok(dense.reshape(self.shape)?)
    }

    fn dequantize(&self, launcher: &Launcher, out: &Tensor) -> Result<()> {
        let elements = out.elem_count();
        let operands = [
            Operand::Read(&self.packed),
            self.codes.as_ref().map_or(Operand::Null, Operand::Read),
            Operand::Read(&self.absmax),
            Operand::Read(&self.dynamic_map),
            Operand::Read(&self.code),
            Operand::F32(self.offset),
            Operand::U32(self.block_size.ilog2() as usize),
            Operand::U32(self.nested_block_size),
            Operand::U64(elements),
            Operand::Write(out),
        ];
        let grid = launcher.grid_stride(elements, PER_THREAD);
        // SAFETY: a valid weight has the codes and scales of all its elements.
        unsafe { launcher.launch("nf4_dequantize_bf16", grid, &operands) }
    }
}

/// The scratch buffer that 4-bit weights are dequantized into, a ring of the weights used last.
#[derive(Debug)]
pub struct DenseCache {
    /// bf16, flat.
    buffer: Tensor,
    held: Mutex<Held>,
    next_id: AtomicUsize,
}

/// What lies in the ring, the oldest first.
#[derive(Debug, Default)]
struct Held {
    weights: VecDeque<(usize, Range<usize>)>,
    next: usize,
}

impl DenseCache {
    /// Room for weights of these numbers of elements on `device` at a time.
    pub fn new(weights: &[usize], device: &Device) -> Result<Self> {
        Ok(Self {
            buffer: Tensor::zeros(Self::capacity(weights), DType::BF16, device)?,
            held: Mutex::default(),
            next_id: AtomicUsize::new(0),
        })
    }

    /// Elements that such a buffer has.
    pub fn capacity(weights: &[usize]) -> usize {
        weights.iter().map(|n| n.next_multiple_of(ALIGNMENT)).sum()
    }

    fn device(&self) -> &Device {
        self.buffer.device()
    }

    /// Where weight `id` lies, and whether it is there already; otherwise the place is its own from now on.
    fn place(&self, id: usize, elements: usize) -> Result<(Range<usize>, bool)> {
        let capacity = self.buffer.elem_count();
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.place(id, elements.next_multiple_of(ALIGNMENT), capacity)
            .ok_or_else(|| Error::Shape {
                op: OP,
                expected: format!("weights of at most {capacity} elements"),
                found: elements.to_string(),
            })
    }
}

impl Held {
    fn place(
        &mut self,
        id: usize,
        elements: usize,
        capacity: usize,
    ) -> Option<(Range<usize>, bool)> {
        if let Some((_, range)) = self.weights.iter().find(|(held, _)| *held == id) {
            return Some((range.clone(), true));
        }
        if elements > capacity {
            return None;
        }
        let start = if self.next + elements <= capacity {
            self.next
        } else {
            0
        };
        let range = start..start + elements;
        self.weights
            .retain(|(_, other)| other.end <= range.start || range.end <= other.start);
        self.weights.push_back((id, range.clone()));
        self.next = range.end;
        Some((range, false))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_that_fit_together_stay() {
        let mut held = Held::default();
        assert_eq!(held.place(0, 40, 100), Some((0..40, false)));
        assert_eq!(held.place(1, 60, 100), Some((40..100, false)));
        assert_eq!(held.place(0, 40, 100), Some((0..40, true)));
        assert_eq!(held.place(1, 60, 100), Some((40..100, true)));
    }

    #[test]
    fn a_weight_takes_the_place_of_those_it_overlaps() {
        let mut held = Held::default();
        held.place(0, 40, 100);
        held.place(1, 50, 100);
        assert_eq!(held.place(2, 30, 100), Some((0..30, false)));
        assert_eq!(held.place(1, 50, 100), Some((40..90, true)));
        assert_eq!(held.place(0, 40, 100), Some((30..70, false)));
        assert_eq!(held.place(2, 30, 100), Some((0..30, true)));
        assert_eq!(held.place(1, 50, 100), Some((0..50, false)));
    }

    #[test]
    fn a_weight_larger_than_the_buffer_is_refused() {
        assert_eq!(Held::default().place(0, 101, 100), None);
    }
}
