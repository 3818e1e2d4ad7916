//! Double quantization: the absmax of each block becomes an 8-bit code of the dynamic map.
//!
//! `offset = mean(absmax)`, `z = absmax - offset`; blocks of 256 of `z` share `nested_absmax = max |z|`, and
//! `absmax' = dynamic_map[code] * nested_absmax + offset`, with two roundings. Source: arXiv:2305.14314, section 3.

use bytes::Bytes;
use rayon::prelude::*;

use super::{Absmax, codes};

/// The number of absmax that share one `nested_absmax`, as bitsandbytes always has it.
pub const NESTED_BLOCK_SIZE: usize = 256;

impl Absmax {
    /// Quantizes the scales of a weight to 8 bits each, around their mean.
    pub(super) fn double(absmax: &[f32]) -> Self {
        Self::double_around(absmax, mean(absmax))
    }

    /// Quantizes the scales of a weight to 8 bits each, around a given `offset`.
    ///
    /// bitsandbytes sums the mean in an order of its own; with its offset the codes are comparable.
    pub fn double_around(absmax: &[f32], offset: f32) -> Self {
        let mut codes = vec![0; absmax.len()];
        let nested_absmax = absmax
            .par_chunks(NESTED_BLOCK_SIZE)
            .zip(codes.par_chunks_mut(NESTED_BLOCK_SIZE))
            .map(|(absmax, codes)| quantize_nested_block(absmax, offset, codes))
            .collect();
        Self::Double {
            codes: Bytes::from(codes),
            nested_absmax,
            nested_block_size: NESTED_BLOCK_SIZE,
            offset,
        }
    }
}

/// Partial sums of [`mean`]: a warp's 32 lanes, 32 times.
const LANES: usize = 1024;

/// The mean, summed in f64 in the order of a block of 1024 GPU threads: the same bits on every device.
///
/// Sum `i` takes the scales `i`, `i + 1024`, ...; then 32 neighbours, and at last the 32 results, are folded in halves.
fn mean(absmax: &[f32]) -> f32 {
    if absmax.is_empty() {
        return 0.0;
    }
    let mut sums = [0f64; LANES];
    for absmax in absmax.chunks(LANES) {
        for (sum, &a) in sums.iter_mut().zip(absmax) {
            *sum += f64::from(a);
        }
    }
    let (warps, _) = sums.as_chunks::<32>();
    let of_warps = std::array::from_fn(|w| fold_in_halves(warps[w]));
    (fold_in_halves(of_warps) / absmax.len() as f64) as f32
}

fn fold_in_halves(mut sums: [f64; 32]) -> f64 {
    for half in [16, 8, 4, 2, 1] {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
    }
    sums[0]
}

/// Writes the codes of one nested block and returns its `nested_absmax`.
fn quantize_nested_block(absmax: &[f32], offset: f32, codes: &mut [u8]) -> f32 {
    let nested_absmax = f32::from_bits(
        absmax
            .iter()
            .fold(0, |m, &a| (a - offset).abs().to_bits().max(m)),
    );
    if nested_absmax == 0.0 {
        codes.fill(0);
        return 0.0;
    }
    let reciprocal = 1.0 / nested_absmax;
    let bounds = codes::dynamic_lower_bounds();
    for (code, &a) in codes.iter_mut().zip(absmax) {
        *code = codes::nearest_dynamic_code((a - offset) * reciprocal, bounds);
    }
    nested_absmax
}

/// The scales of consecutive blocks, without a division per block.
pub(super) struct Scales<'a> {
    absmax: &'a Absmax,
    dynamic_map: &'static [f32; 256],
    next: usize,
    nested: usize,
    /// Blocks left that share `nested_absmax[nested]`.
    nested_left: usize,
}

impl<'a> Scales<'a> {
    pub(super) fn starting_at(absmax: &'a Absmax, block: usize) -> Self {
        let (nested, nested_left) = match absmax {
            Absmax::Single(_) => (0, usize::MAX),
            Absmax::Double {
                nested_block_size, ..
            } => (
                block / nested_block_size,
                nested_block_size - block % nested_block_size,
            ),
        };
        Self {
            absmax,
            dynamic_map: codes::dynamic_map(),
            next: block,
            nested,
            nested_left,
        }
    }

    /// The scale of the next block.
    #[inline(always)]
    pub(super) fn advance(&mut self) -> f32 {
        let block = self.next;
        self.next += 1;
        match self.absmax {
            Absmax::Single(bytes) => {
                let bytes = &bytes[block * 4..][..4];
                f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
            }
            Absmax::Double {
                codes,
                nested_absmax,
                nested_block_size,
                offset,
            } => {
                if self.nested_left == 0 {
                    self.nested += 1;
                    self.nested_left = *nested_block_size;
                }
                self.nested_left -= 1;
                self.dynamic_map[usize::from(codes[block])] * nested_absmax[self.nested] + offset
            }
        }
    }
}
