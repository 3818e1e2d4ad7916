//! A frozen weight where its operations run: in the memory map for the CPU, its parts copied to the device for kernels.
//!
//! On a device a 4-bit weight is dequantized to bf16 in front of the product that needs it, or beside the product before
//! that one, into the scratch buffer that is a [`DenseCache`].

mod dense_cache;
mod stream;

use std::ops::Deref;
use std::sync::Arc;

use bytes::Bytes;
use candle_core::{DType, Device, Tensor};
use half::bf16;

use super::launcher::{Launcher, Operand};
use crate::device::{self, ComputeDtype, Marker};
use crate::quant::{Absmax, BlockSizes, DenseTensor, FrozenWeight, Params4bit, dynamic_map};
use crate::{Error, Result};

pub use dense_cache::{Announced, DenseCache};
pub use stream::{BlockBytes, BlockStream, Direction, Entered, Slots};

const OP: &str = "weight";
const KERNEL: &str = "nf4_dequantize_bf16";
/// Elements that a thread of the dequantizing kernel takes at a time.
const PER_THREAD: usize = 32;

/// A frozen weight, `[out, in]`. It reads as its [`FrozenWeight`] on the host.
#[derive(Debug, Clone)]
pub struct Weight {
    host: FrozenWeight,
    /// Of its products on the host.
    compute_dtype: ComputeDtype,
    on_device: Option<DeviceWeight>,
}

impl From<FrozenWeight> for Weight {
    fn from(host: FrozenWeight) -> Self {
        Self::on_host(host, ComputeDtype::F32)
    }
}

impl Deref for Weight {
    type Target = FrozenWeight;

    fn deref(&self) -> &FrozenWeight {
        &self.host
    }
}

/// The parts of a weight on the device.
#[derive(Debug, Clone)]
enum DeviceWeight {
    /// bf16, `[out, in]`.
    Dense(Tensor),
    Quantized(Arc<QuantizedParts>),
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
    /// For the CPU, whose products with it are in `compute_dtype`.
    pub fn on_host(host: FrozenWeight, compute_dtype: ComputeDtype) -> Self {
        Self {
            host,
            compute_dtype,
            on_device: None,
        }
    }

    /// Of products on the CPU.
    pub(crate) fn compute_dtype(&self) -> ComputeDtype {
        self.compute_dtype
    }

    /// Copies the weight to the device of `cache`, as stored where it is in 4 bits, in bf16 otherwise.
    ///
    /// # Errors
    /// [`Error::OutOfDeviceMemory`] where it does not fit.
    pub fn on_device(host: FrozenWeight, cache: &Arc<DenseCache>) -> Result<Self> {
        let parts = match &host {
            FrozenWeight::Dense(dense) => DeviceWeight::Dense(upload_dense(dense, cache.device())?),
            FrozenWeight::Quantized(params) => {
                let shape = (host.out_features(), host.in_features());
                let bytes = |bytes: &Bytes| {
                    device::bring_in(bytes);
                    Ok(Tensor::from_slice(bytes, bytes.len(), cache.device())?)
                };
                let parts = QuantizedParts::new(params, shape, cache, bytes)?;
                DeviceWeight::Quantized(Arc::new(parts))
            }
        };
        Ok(Self {
            host,
            compute_dtype: ComputeDtype::Bf16,
            on_device: Some(parts),
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
            compute_dtype: ComputeDtype::Bf16,
            on_device: Some(DeviceWeight::Quantized(Arc::new(parts))),
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
        match self.on_device.as_ref()? {
            DeviceWeight::Dense(weight) => Some(weight.device()),
            DeviceWeight::Quantized(parts) => Some(parts.packed.device()),
        }
    }

    /// The weight in bf16 on the device, valid until the next weights are asked for: to be used by what is queued next.
    ///
    /// # Errors
    /// [`Error::Shape`] for a weight that was not copied there.
    pub(super) fn dense(&self, launcher: &Launcher) -> Result<Tensor> {
        match self.on_device.as_ref() {
            Some(DeviceWeight::Dense(weight)) => Ok(weight.clone()),
            Some(DeviceWeight::Quantized(parts)) => parts.cache.dense(parts, launcher),
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
    device::bring_in(&dense.data);
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
            id: cache.next_id(),
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

    fn elements(&self) -> usize {
        self.shape.0 * self.shape.1
    }

    /// Dequantizes into `out`, in front of what is queued next.
    fn dequantize(&self, launcher: &Launcher, out: &Tensor) -> Result<()> {
        let grid = launcher.grid_stride(self.elements(), PER_THREAD);
        // SAFETY: a valid weight has the codes and scales of all its elements, and `out` has as many.
        unsafe { launcher.launch(KERNEL, grid, &self.operands(out)) }
    }

    /// Dequantizes into `out` beside what is queued next, once `after` is reached.
    ///
    /// # Safety
    /// The weight and `out` live, and nothing else uses `out`, until the kernels have been made to wait for the marker.
    unsafe fn dequantize_aside(
        &self,
        launcher: &Launcher,
        out: &Tensor,
        after: &Marker,
    ) -> Result<Marker> {
        let grid = launcher.grid_stride(self.elements(), PER_THREAD);
        // SAFETY: as above, and as the caller promises; nothing writes the parts of a weight while it is in use.
        unsafe { launcher.launch_aside(KERNEL, grid, &self.operands(out), after) }
    }

    fn operands<'a>(&'a self, out: &'a Tensor) -> [Operand<'a>; 10] {
        [
            Operand::Read(&self.packed),
            self.codes.as_ref().map_or(Operand::Null, Operand::Read),
            Operand::Read(&self.absmax),
            Operand::Read(&self.dynamic_map),
            Operand::Read(&self.code),
            Operand::F32(self.offset),
            Operand::U32(self.block_size.ilog2() as usize),
            Operand::U32(self.nested_block_size),
            Operand::U64(self.elements()),
            Operand::Write(out),
        ]
    }
}
