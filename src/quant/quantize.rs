//! Quantization to 4 bits: block-wise division by the absolute maximum, then the nearest code.

use std::ops::Range;

use bytes::Bytes;
use candle_core::DType;
use rayon::prelude::*;

use super::{
    Absmax, DenseTensor, Params4bit, QuantType,
    codes::{FP4_BY_MAGNITUDE, FP4_THRESHOLDS, NF4_THRESHOLDS},
    isa::Isa,
    params4bit::{MAX_BLOCK_SIZE, is_block_size},
};
use crate::{Error, Result};

/// Elements that one task of the thread pool quantizes.
const TASK_ELEMENTS: usize = 1 << 16;

/// bitsandbytes divides by no less than this: a block of zeros or of subnormals takes the code of 0.0.
const MIN_DIVISOR: f32 = 1e-38;

/// How the scale of each block is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum DoubleQuant {
    /// In f32.
    No,
    /// As an 8-bit code.
    #[default]
    Yes,
}

/// What to quantize to; the default is the paper's: NF4 in blocks of 64 with double quantization.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct QuantizeOptions {
    pub quant_type: QuantType,
    /// Elements that share one scale: a power of two from 32 to 4096.
    pub block_size: usize,
    pub double_quant: DoubleQuant,
}

/// How a weight was quantized.
impl From<&Params4bit> for QuantizeOptions {
    fn from(params: &Params4bit) -> Self {
        Self {
            quant_type: params.quant_type,
            block_size: params.block_size,
            double_quant: match params.absmax {
                Absmax::Single(_) => DoubleQuant::No,
                Absmax::Double { .. } => DoubleQuant::Yes,
            },
        }
    }
}

impl Default for QuantizeOptions {
    fn default() -> Self {
        Self {
            quant_type: QuantType::Nf4,
            block_size: 64,
            double_quant: DoubleQuant::Yes,
        }
    }
}

impl Params4bit {
    /// Quantizes `weight` in blocks of `block_size` consecutive elements of the flat tensor.
    ///
    /// A block is multiplied by the reciprocal of its absolute maximum and each value takes the nearest of
    /// [`QuantType::code`]; a tie takes the lower code (FP4: the lower magnitude). The result does not depend on the
    /// number of threads.
    ///
    /// # Shapes
    /// `weight: [out, in]` -> `packed: [ceil(out * in / 2)]` bytes, `absmax: [ceil(out * in / block_size)]`.
    ///
    /// # Errors
    /// [`Error::NonFinite`] with the first NaN or infinity, [`Error::TensorMismatch`] if `weight` is not valid,
    /// [`Error::Config`] if the block size is not; `name` is the tensor's in the message.
    ///
    /// Source: arXiv:2305.14314; bit-equal to bitsandbytes 0.50.2 (`tests/nf4_golden.rs`).
    pub fn quantize(name: &str, weight: &DenseTensor, options: QuantizeOptions) -> Result<Self> {
        weight.validate(name)?;
        let read = |start, out: &mut [f32]| weight.read_range(start, out);
        quantize_read(name, (weight.dtype, &weight.shape), options, read)
    }

    /// The same for `values` in memory, of a weight that has the type and the shape of `like`.
    ///
    /// # Errors
    /// Those of [`quantize`](Self::quantize).
    pub fn quantize_f32(
        name: &str,
        values: &[f32],
        like: &DenseTensor,
        options: QuantizeOptions,
    ) -> Result<Self> {
        if values.len() != like.numel() {
            return Err(Error::TensorMismatch {
                tensor: name.to_owned(),
                expected: format!("{:?}", like.shape),
                found: format!("{} values", values.len()),
            });
        }
        let read = |start, out: &mut [f32]| out.copy_from_slice(&values[start..start + out.len()]);
        quantize_read(name, (like.dtype, &like.shape), options, read)
    }
}

/// Quantizes the weight whose flat elements from `start` on `read(start, out)` writes to `out`.
fn quantize_read(
    name: &str,
    (dtype, shape): (DType, &[usize]),
    options: QuantizeOptions,
    read: impl Fn(usize, &mut [f32]) + Sync,
) -> Result<Params4bit> {
    let QuantizeOptions {
        quant_type,
        block_size,
        double_quant,
    } = options;
    if !is_block_size(block_size) {
        return Err(Error::config(
            "block_size",
            format!("expected a power of two from 32 to 4096, found {block_size}"),
        ));
    }
    let n = shape.iter().product::<usize>();
    let mut packed = vec![0; n.div_ceil(2)];
    let mut absmax = vec![0.0; n.div_ceil(block_size)];
    let non_finite = packed
        .par_chunks_mut(TASK_ELEMENTS / 2)
        .zip(absmax.par_chunks_mut(TASK_ELEMENTS / block_size))
        .enumerate()
        .filter_map(|(task, (packed, absmax))| {
            let start = task * TASK_ELEMENTS;
            quantize_task(&read, start..n, options, packed, absmax)
        })
        .min();
    if let Some(index) = non_finite {
        let mut value = [0.0];
        read(index, &mut value);
        return Err(Error::NonFinite {
            tensor: name.to_owned(),
            index,
            value: value[0],
        });
    }
    Ok(Params4bit {
        packed: Bytes::from(packed),
        absmax: match double_quant {
            DoubleQuant::No => {
                Absmax::Single(absmax.iter().flat_map(|a| a.to_le_bytes()).collect())
            }
            DoubleQuant::Yes => Absmax::double(&absmax),
        },
        quant_type,
        block_size,
        dtype,
        shape: shape.to_vec(),
    })
}

/// Quantizes the blocks of `absmax`, the first of which begins at `elements.start`; returns the first element that is not
/// finite.
fn quantize_task(
    read: &impl Fn(usize, &mut [f32]),
    elements: Range<usize>,
    options: QuantizeOptions,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Option<usize> {
    let isa = Isa::detect();
    // The largest block, and a multiple of each smaller one.
    let mut buffer = [0.0; MAX_BLOCK_SIZE];
    for (i, (packed, absmax)) in packed
        .chunks_mut(MAX_BLOCK_SIZE / 2)
        .zip(absmax.chunks_mut(MAX_BLOCK_SIZE / options.block_size))
        .enumerate()
    {
        let start = elements.start + i * MAX_BLOCK_SIZE;
        let values = &mut buffer[..MAX_BLOCK_SIZE.min(elements.end - start)];
        read(start, values);
        quantize_blocks_with(isa, values, options, packed, absmax);
        if absmax.iter().any(|a| !a.is_finite()) {
            return values
                .iter()
                .position(|v| !v.is_finite())
                .map(|k| start + k);
        }
    }
    None
}

fn quantize_blocks_with(
    isa: Isa,
    values: &[f32],
    options: QuantizeOptions,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    match isa {
        Isa::Portable => quantize_blocks(values, options, packed, absmax),
        // SAFETY: `Isa` says that the processor has the instructions.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { quantize_blocks_avx2(values, options, packed, absmax) },
        // SAFETY: `Isa` says that the processor has the instructions.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { quantize_blocks_avx512(values, options, packed, absmax) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn quantize_blocks_avx2(
    values: &[f32],
    options: QuantizeOptions,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    quantize_blocks(values, options, packed, absmax);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn quantize_blocks_avx512(
    values: &[f32],
    options: QuantizeOptions,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    quantize_blocks(values, options, packed, absmax);
}

#[inline(always)]
fn quantize_blocks(
    values: &[f32],
    options: QuantizeOptions,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let block_size = options.block_size;
    for ((values, packed), absmax) in values
        .chunks(block_size)
        .zip(packed.chunks_mut(block_size / 2))
        .zip(absmax)
    {
        *absmax = absolute_maximum(values);
        let reciprocal = 1.0 / absmax.max(MIN_DIVISOR);
        match options.quant_type {
            QuantType::Nf4 => encode(values, reciprocal, packed, QuantType::Nf4, nf4_code),
            QuantType::Fp4 => encode(values, reciprocal, packed, QuantType::Fp4, fp4_code),
        }
    }
}

/// The largest magnitude, by the bits: a NaN or an infinity is larger than every number.
#[inline(always)]
fn absolute_maximum(values: &[f32]) -> f32 {
    let bits = values.iter().fold(0, |m, v| v.abs().to_bits().max(m));
    f32::from_bits(bits)
}

#[inline(always)]
fn encode(
    values: &[f32],
    reciprocal: f32,
    packed: &mut [u8],
    quant_type: QuantType,
    code: impl Fn(f32) -> u32,
) {
    let (pairs, odd) = values.as_chunks::<2>();
    for (byte, [even, odd]) in packed.iter_mut().zip(pairs) {
        *byte = (code(even * reciprocal) << 4 | code(odd * reciprocal)) as u8;
    }
    if let [last] = odd {
        packed[pairs.len()] = (code(last * reciprocal) as u8) << 4 | quant_type.zero_code();
    }
}

#[inline(always)]
fn nf4_code(value: f32) -> u32 {
    NF4_THRESHOLDS.iter().map(|&t| u32::from(t < value)).sum()
}

#[inline(always)]
fn fp4_code(value: f32) -> u32 {
    let magnitude = FP4_THRESHOLDS.iter().zip(&FP4_BY_MAGNITUDE[1..]).fold(
        FP4_BY_MAGNITUDE[0],
        |code, (&t, &above)| {
            if t < value.abs() { above } else { code }
        },
    );
    magnitude | u32::from(value < 0.0) << 3
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_instruction_set_gives_the_same_bits(
            values in prop::collection::vec(-4.0f32..4.0, 1..1500),
            block_size in prop::sample::select(vec![32usize, 64, 256]),
            quant_type in prop::sample::select(vec![QuantType::Nf4, QuantType::Fp4]),
        ) {
            let options = QuantizeOptions { quant_type, block_size, ..Default::default() };
            let quantize = |isa| {
                let mut packed = vec![0xff; values.len().div_ceil(2)];
                let mut absmax = vec![f32::NAN; values.len().div_ceil(block_size)];
                quantize_blocks_with(isa, &values, options, &mut packed, &mut absmax);
                (packed, absmax)
            };
            let portable = quantize(Isa::Portable);
            for isa in Isa::all_detected() {
                prop_assert_eq!(&quantize(isa), &portable);
            }
        }
    }
}
