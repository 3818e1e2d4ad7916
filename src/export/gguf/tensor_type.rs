//! The types of a tensor in a GGUF file, which tensor has which, and how a row of f32 values is stored.
//!
//! Q8_0: blocks of 32 values of a row, each an f16 scale `d = max |x| / 127` and 32 bytes `round(x / d)`; halves round away
//! from zero. Source: `ggml-quants.c` of ggml; `llama-quant.cpp` of llama.cpp for which tensor has which.

use candle_core::DType;
use half::f16;

use super::k_quants;
use crate::model::{DecoderConfig, ModelTensor, Module};
use crate::quant::write_floats;

/// What a GGUF file is called by: the type of its matrices, or of most of them; vectors are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgufType {
    F32,
    F16,
    Bf16,
    /// 8.5 bits an element.
    Q8_0,
    /// 6.6 bits an element.
    Q6K,
    /// 5.5 bits an element, and 6.6 for the head and where more bits tell most.
    Q5KM,
    /// 4.5 bits an element, and more in the same places.
    Q4KM,
}

/// The type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TensorType {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// Elements of a Q8_0 block.
const BLOCK: usize = 32;

/// The element of a row that is not finite, or too large for the type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooLarge(pub usize);

impl GgufType {
    /// `general.file_type`.
    pub(super) fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 7,
            Self::Q4KM => 15,
            Self::Q5KM => 17,
            Self::Q6K => 18,
            Self::Bf16 => 32,
        }
    }

    /// The type of a tensor of a model in a file of this type.
    pub(super) fn of(self, tensor: ModelTensor, config: &DecoderConfig) -> TensorType {
        let is_head = match tensor {
            ModelTensor::Head => true,
            ModelTensor::Embedding => config.tie_word_embeddings,
            _ => false,
        };
        let layers = config.num_layers;
        let tells_most = match tensor {
            ModelTensor::Weight(layer, Module::V | Module::Down) => {
                let first = layers / 8;
                layer < first || layer >= 7 * layers / 8 || (layer - first) % 3 == 2
            }
            _ => is_head,
        };
        let is_qkv = matches!(tensor, ModelTensor::Weight(_, Module::Qkv));
        // Eight heads of a model of 70B share one, which is small.
        let is_shared = layers == 80 && config.num_kv_heads < config.num_heads;
        let wanted = match self {
            Self::Q4KM | Self::Q5KM if tells_most => TensorType::Q6K,
            Self::Q4KM if is_shared && matches!(tensor, ModelTensor::Weight(_, Module::V)) => {
                TensorType::Q5K
            }
            Self::Q4KM if is_qkv => TensorType::Q5K,
            Self::Q5KM if is_qkv => TensorType::Q6K,
            _ => self.of_most(),
        };
        wanted.for_shape(&tensor.shape(config))
    }

    /// The type of a matrix or vector of an adapter.
    pub(super) fn of_shape(self, shape: &[usize]) -> TensorType {
        self.of_most().for_shape(shape)
    }

    /// Whether a matrix is of another type because its rows are no blocks of 256.
    pub(super) fn is_widened(self, shape: &[usize]) -> bool {
        let block = self.of_most().block().0;
        block == k_quants::BLOCK && matches!(shape, [_, columns] if !columns.is_multiple_of(block))
    }

    fn of_most(self) -> TensorType {
        match self {
            Self::F32 => TensorType::F32,
            Self::F16 => TensorType::F16,
            Self::Bf16 => TensorType::Bf16,
            Self::Q8_0 => TensorType::Q8_0,
            Self::Q6K => TensorType::Q6K,
            Self::Q5KM => TensorType::Q5K,
            Self::Q4KM => TensorType::Q4K,
        }
    }
}

impl TensorType {
    /// This, or a wider type where rows are no whole blocks; f32 for vectors.
    fn for_shape(self, shape: &[usize]) -> Self {
        let [_, columns] = shape else {
            return Self::F32;
        };
        let types = [self, Self::Q8_0, Self::F16].into_iter();
        let mut fitting = types.filter(|wanted| columns.is_multiple_of(wanted.block().0));
        fitting.next().unwrap_or(Self::F16)
    }

    /// `ggml_type`.
    pub(super) fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 8,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::Bf16 => 30,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
            Self::Bf16 => "bf16",
        }
    }

    /// Elements of a block, and its bytes.
    fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (BLOCK, 2 + BLOCK),
            Self::Q4K => (k_quants::BLOCK, 144),
            Self::Q5K => (k_quants::BLOCK, 176),
            Self::Q6K => (k_quants::BLOCK, 210),
        }
    }

    /// The bytes of so many elements, whole blocks.
    pub(super) fn nbytes(self, elements: usize) -> usize {
        let (block, bytes) = self.block();
        elements / block * bytes
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
            Self::Q4K => return encode_k(row, k_quants::encode_q4, out),
            Self::Q5K => return encode_k(row, k_quants::encode_q5, out),
            Self::Q6K => return encode_k(row, k_quants::encode_q6, out),
        };
        let start = out.len();
        out.resize(start + self.nbytes(row.len()), 0);
        write_floats(row, dtype, &mut out[start..]).map_err(TooLarge)
    }
}

/// Appends blocks of 256.
fn encode_k(
    row: &[f32],
    encode: impl Fn(&[f32; k_quants::BLOCK], &mut Vec<u8>) -> Result<(), k_quants::ScaleTooLarge>,
    out: &mut Vec<u8>,
) -> Result<(), TooLarge> {
    for (block, values) in row.as_chunks().0.iter().enumerate() {
        let start = block * k_quants::BLOCK;
        if let Some(at) = values.iter().position(|x| !x.is_finite()) {
            return Err(TooLarge(start + at));
        }
        encode(values, out).map_err(|_| TooLarge(start + largest(values)))?;
    }
    Ok(())
}

fn largest(values: &[f32]) -> usize {
    let absolute = |at: &usize| values[*at].abs();
    let largest = (0..values.len()).max_by(|a, b| absolute(a).total_cmp(&absolute(b)));
    largest.unwrap_or(0)
}

/// Appends a Q8_0 block; the error is the element that has no place in it.
fn encode_block(values: &[f32], out: &mut Vec<u8>) -> Result<(), usize> {
    if let Some(at) = values.iter().position(|x| !x.is_finite()) {
        return Err(at);
    }
    let largest = largest(values);
    let d = values[largest].abs() / 127.0;
    let stored = f16::from_f32(d);
    if !stored.is_finite() {
        return Err(largest);
    }
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    out.extend(stored.to_le_bytes());
    out.extend(values.iter().map(|x| (x * inverse).round() as i8 as u8));
    Ok(())
}
