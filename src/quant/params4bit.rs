//! Sizes of a 4-bit weight, and the check that its parts belong together.

use candle_core::DType;

use super::{Absmax, Params4bit, dense::checked_numel};
use crate::{Error, Result};

pub(super) const MIN_BLOCK_SIZE: usize = 32;
pub(super) const MAX_BLOCK_SIZE: usize = 4096;

pub(super) fn is_block_size(block_size: usize) -> bool {
    block_size.is_power_of_two() && (MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&block_size)
}

impl Params4bit {
    /// The number of elements of a valid weight.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// The bytes of codes and scales: about 4.127 bits an element with double quantization, 4.5 without.
    pub fn nbytes(&self) -> usize {
        self.packed.len()
            + match &self.absmax {
                Absmax::Single(absmax) => absmax.len(),
                Absmax::Double {
                    codes,
                    nested_absmax,
                    ..
                } => codes.len() + size_of_val(nested_absmax.as_slice()) + size_of::<f32>(),
            }
    }

    /// Checks that every part has the length that `shape` and the block sizes demand, whatever those are.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] with the weight's `name` and the part.
    pub fn validate(&self, name: &str) -> Result<()> {
        let check = |ok: bool, part: &str, expected: String, found: String| match ok {
            true => Ok(()),
            false => Err(Error::TensorMismatch {
                tensor: format!("{name}{part}"),
                expected,
                found,
            }),
        };
        let length = |part: &str, found: usize, expected: usize| {
            check(
                found == expected,
                part,
                format!("{expected} for shape {:?}", self.shape),
                found.to_string(),
            )
        };
        check(
            is_block_size(self.block_size),
            "",
            "a blocksize that is a power of two from 32 to 4096".to_owned(),
            self.block_size.to_string(),
        )?;
        check(
            matches!(self.dtype, DType::F32 | DType::BF16 | DType::F16),
            "",
            "dtype bfloat16, float16 or float32".to_owned(),
            self.dtype.as_str().to_owned(),
        )?;
        // A shape whose element count fits in isize also has f32 values that can be counted in bytes.
        let Some(n) = checked_numel(&self.shape).filter(|&n| n <= isize::MAX as usize / 4) else {
            return check(
                false,
                "",
                "a shape that fits in memory".to_owned(),
                format!("{:?}", self.shape),
            );
        };
        let blocks = n.div_ceil(self.block_size);
        length("", self.packed.len(), n.div_ceil(2))?;
        match &self.absmax {
            Absmax::Single(absmax) => length(".absmax", absmax.len(), blocks * 4),
            Absmax::Double {
                codes,
                nested_absmax,
                nested_block_size,
                offset,
            } => {
                length(".absmax", codes.len(), blocks)?;
                check(
                    *nested_block_size > 0,
                    "",
                    "a nested_blocksize of at least 1".to_owned(),
                    nested_block_size.to_string(),
                )?;
                length(
                    ".nested_absmax",
                    nested_absmax.len(),
                    blocks.div_ceil(*nested_block_size),
                )?;
                check(
                    offset.is_finite(),
                    "",
                    "a finite nested_offset".to_owned(),
                    offset.to_string(),
                )
            }
        }
    }
}
