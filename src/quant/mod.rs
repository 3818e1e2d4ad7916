//! The number format: NF4 and FP4 codes, block-wise absolute maxima, double quantization. No files, no models.
//!
//! Source: arXiv:2305.14314; bit-equal to bitsandbytes 0.50.2.

mod block_sizes;
mod codes;
mod dense;
mod dequantize;
mod double_quant;
mod frozen_weight;
mod isa;
mod lookup;
mod params4bit;
mod quantize;

use bytes::Bytes;
use candle_core::DType;

pub use block_sizes::BlockSizes;
pub use codes::{
    FP4_CODE, NF4_CODE, dynamic_lower_bounds, dynamic_map, nearest_dynamic_code,
    unsigned_dynamic_lower_bounds, unsigned_dynamic_map,
};
pub(crate) use dense::write_floats;
pub use dequantize::DequantizeTo;
pub use double_quant::NESTED_BLOCK_SIZE;
pub use quantize::{DoubleQuant, QuantizeOptions};

/// The 4-bit code of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QuantType {
    Nf4,
    Fp4,
}

/// The scale of each block of weights.
#[derive(Debug, Clone)]
pub enum Absmax {
    /// One little-endian f32 per block.
    Single(Bytes),
    /// One 8-bit code per block, block-wise scaled around `offset` (double quantization).
    Double {
        codes: Bytes,
        nested_absmax: Vec<f32>,
        nested_block_size: usize,
        offset: f32,
    },
}

/// A 4-bit weight, as bitsandbytes stores it.
///
/// # Shapes
/// `shape: [out, in]`, row-major; `packed: [ceil(out * in / 2)]` bytes, the even element in the high nibble; blocks of
/// `block_size` consecutive elements of the flat weight share one scale, across row ends.
#[derive(Debug, Clone)]
pub struct Params4bit {
    pub packed: Bytes,
    pub absmax: Absmax,
    pub quant_type: QuantType,
    pub block_size: usize,
    /// The type the weight had before it was quantized.
    pub dtype: DType,
    pub shape: Vec<usize>,
}

/// A weight kept as stored, little-endian, in bf16, f16 or f32.
#[derive(Debug, Clone)]
pub struct DenseTensor {
    pub dtype: DType,
    pub shape: Vec<usize>,
    pub data: Bytes,
}

/// A weight of the base model: never changed, never copied on load.
#[derive(Debug, Clone)]
pub enum FrozenWeight {
    Quantized(Params4bit),
    Dense(DenseTensor),
}
