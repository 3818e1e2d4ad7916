//! The blocks of a quantization, and what follows from them for memory.

use super::{Absmax, DoubleQuant, NESTED_BLOCK_SIZE, Params4bit, QuantizeOptions};

/// How many values share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    pub block_size: usize,
    /// Scales that share one of their own, with double quantization.
    pub nested_block_size: Option<usize>,
}

impl From<QuantizeOptions> for BlockSizes {
    fn from(options: QuantizeOptions) -> Self {
        Self {
            block_size: options.block_size,
            nested_block_size: match options.double_quant {
                DoubleQuant::Yes => Some(NESTED_BLOCK_SIZE),
                DoubleQuant::No => None,
            },
        }
    }
}

impl From<&Params4bit> for BlockSizes {
    fn from(params: &Params4bit) -> Self {
        Self {
            block_size: params.block_size,
            nested_block_size: match params.absmax {
                Absmax::Single(_) => None,
                Absmax::Double {
                    nested_block_size, ..
                } => Some(nested_block_size),
            },
        }
    }
}

impl BlockSizes {
    /// Bytes of the codes of `elements` values.
    pub fn packed_bytes(&self, elements: usize) -> usize {
        elements.div_ceil(2)
    }

    /// Bytes of their scales: f32, or 8-bit codes with double quantization.
    pub fn absmax_bytes(&self, elements: usize) -> usize {
        let scales = elements.div_ceil(self.block_size);
        match self.nested_block_size {
            None => size_of::<f32>() * scales,
            Some(_) => scales,
        }
    }

    /// Bytes of the scales of those codes, in f32.
    pub fn nested_absmax_bytes(&self, elements: usize) -> usize {
        let scales = elements.div_ceil(self.block_size);
        self.nested_block_size
            .map_or(0, |nested| size_of::<f32>() * scales.div_ceil(nested))
    }
}
