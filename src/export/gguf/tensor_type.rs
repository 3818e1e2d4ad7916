//! The types of a tensor in a GGUF file, and how a row of f32 values is stored in each.
//!
//! Q8_0: blocks of 32 values of a row, each an f16 scale `d = max |x| / 127` and 32 bytes `round(x / d)`; halves round away
//! from zero. Source: `ggml-quants.c` of ggml.

use candle_core::DType;
use half::f16;

use crate::quant::write_floats;

/// The type that the matrices of a GGUF file are stored in; vectors are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgufType {
    F32,
    F16,
    Bf16,
    /// 8.5 bits an element. A matrix whose rows are no multiple of 32 is stored in f16.
    Q8_0,
}

/// Elements of a Q8_0 block.
const BLOCK: usize = 32;

/// The element of a row that is not finite, or too large for the type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooLarge(pub usize);

impl GgufType {
    /// `ggml_type`.
    pub(super) fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 8,
            Self::Bf16 => 30,
        }
    }

    /// `general.file_type` of a file whose matrices are mostly of this type.
    pub(super) fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 7,
            Self::Bf16 => 32,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
            Self::Bf16 => "bf16",
        }
    }

    /// The type of a tensor of `shape` in a file of this type.
    pub(super) fn of_shape(self, shape: &[usize]) -> Self {
        match (shape, self) {
            ([_, columns], Self::Q8_0) if !columns.is_multiple_of(BLOCK) => Self::F16,
            ([_, _], _) => self,
            _ => Self::F32,
        }
    }

    /// The bytes of so many elements, whole blocks.
    pub(super) fn nbytes(self, elements: usize) -> usize {
        match self {
            Self::F32 => 4 * elements,
            Self::F16 | Self::Bf16 => 2 * elements,
            Self::Q8_0 => elements / BLOCK * (BLOCK + 2),
        }
    }

    /// Appends the bytes of `row`.
    pub(super) fn encode(self, row: &[f32], out: &mut Vec<u8>) -> Result<(), TooLarge> {
        let dtype = match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::Q8_0 => {
                for (block, values) in row.chunks(BLOCK).enumerate() {
                    encode_block(values, out).map_err(|at| TooLarge(block * BLOCK + at))?;
                }
                return Ok(());
            }
        };
        let start = out.len();
        out.resize(start + self.nbytes(row.len()), 0);
        write_floats(row, dtype, &mut out[start..]).map_err(TooLarge)
    }
}

/// Appends a Q8_0 block; the error is the element that has no place in it.
fn encode_block(values: &[f32], out: &mut Vec<u8>) -> Result<(), usize> {
    if let Some(at) = values.iter().position(|x| !x.is_finite()) {
        return Err(at);
    }
    let absolute = |at: &usize| values[*at].abs();
    let largest = (0..values.len()).max_by(|a, b| absolute(a).total_cmp(&absolute(b)));
    let largest = largest.unwrap_or(0);
    let d = absolute(&largest) / 127.0;
    let stored = f16::from_f32(d);
    if !stored.is_finite() {
        return Err(largest);
    }
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    out.extend(stored.to_le_bytes());
    out.extend(values.iter().map(|x| (x * inverse).round() as i8 as u8));
    Ok(())
}
