//! The code maps: 16 values of a 4-bit code, 256 values of the 8-bit code of a block's absmax.
//!
//! NF4 holds the quantiles of a normal distribution, FP4 is a float with 1 sign, 2 exponent and 1 mantissa bit, the
//! dynamic map has a decimal exponent of variable length. Source: arXiv:2305.14314, arXiv:1511.04561, bitsandbytes 0.50.2.

use std::sync::LazyLock;

use super::QuantType;

/// The values of the NF4 codes, ascending.
pub const NF4_CODE: [f32; 16] = from_bits([
    0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000,
    0x3da2faff, 0x3e24cae3, 0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000,
]);

/// The values of the FP4 codes: bit 3 is the sign, and the magnitudes do not ascend.
pub const FP4_CODE: [f32; 16] = from_bits([
    0x00000000, 0x3baaaaab, 0x3f2aaaab, 0x3f800000, 0x3eaaaaab, 0x3f000000, 0x3e2aaaab, 0x3e800000,
    0x00000000, 0xbbaaaaab, 0xbf2aaaab, 0xbf800000, 0xbeaaaaab, 0xbf000000, 0xbe2aaaab, 0xbe800000,
]);

/// `NF4_THRESHOLDS[k]` separates the codes `k` and `k + 1`; a value equal to it takes `k`.
pub(super) const NF4_THRESHOLDS: [f32; 15] = from_bits([
    0xbf591cd8, 0xbf1c5270, 0xbeeb8480, 0xbeadea76, 0xbe703cec, 0xbe0d38bc, 0xbd3a7871, 0x3d22faff,
    0x3df64862, 0x3e5067e0, 0x3e9582d4, 0x3ec753f9, 0x3f006d04, 0x3f248daf, 0x3f5c89da,
]);

/// Between the magnitudes of FP4 in ascending order; a value equal to a threshold takes the lower magnitude.
///
/// These are the constants of the CUDA kernel of bitsandbytes; its CPU kernel differs from them by an ulp.
pub(super) const FP4_THRESHOLDS: [f32; 7] = from_bits([
    0x3b2aaab9, 0x3db00000, 0x3e555555, 0x3e955555, 0x3ed55556, 0x3f155550, 0x3f555555,
]);

/// The FP4 codes in ascending order of magnitude.
pub(super) const FP4_BY_MAGNITUDE: [u32; 8] = [0, 1, 6, 7, 4, 5, 2, 3];

const fn from_bits<const N: usize>(bits: [u32; N]) -> [f32; N] {
    let mut values = [0.0; N];
    let mut i = 0;
    while i < N {
        values[i] = f32::from_bits(bits[i]);
        i += 1;
    }
    values
}

impl QuantType {
    /// The value of each code; a weight is `code()[c] * absmax` of its block.
    pub fn code(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4_CODE,
            Self::Fp4 => &FP4_CODE,
        }
    }

    /// The code of 0.0, which fills the last low nibble of an odd number of elements.
    pub(super) fn zero_code(self) -> u8 {
        match self {
            Self::Nf4 => 7,
            Self::Fp4 => 0,
        }
    }
}

/// The signed dynamic map: the 256 values of an 8-bit code, ascending from -0.993 over 0 (code 127) to 1 (code 255).
///
/// For `e` in 0..7 the interval [0.1, 1] is split into `2^e` equal parts, whose midpoints are scaled by `10^(e - 6)`;
/// these with both signs, 0 and 1 are the map.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: LazyLock<[f32; 256]> = LazyLock::new(|| {
        let mut map = [0.0; 256];
        for (k, value) in decades(1).enumerate() {
            map[128 + k] = value;
            map[126 - k] = -value;
        }
        map[255] = 1.0;
        map
    });
    &MAP
}

/// The unsigned dynamic map, of the second moment in 8 bits: ascending from 0 (code 0) to 1 (code 255).
///
/// As [`dynamic_map`], without the negative half and with `2^(e + 1)` parts in its place.
pub fn unsigned_dynamic_map() -> &'static [f32; 256] {
    static MAP: LazyLock<[f32; 256]> = LazyLock::new(|| {
        let mut map = [0.0; 256];
        for (k, value) in decades(2).enumerate() {
            map[1 + k] = value;
        }
        map[255] = 1.0;
        map
    });
    &MAP
}

/// The midpoints of the `first_parts * 2^e` equal parts of [0.1, 1], times `10^(e - 6)`, for `e` in 0..7: ascending.
fn decades(first_parts: usize) -> impl Iterator<Item = f32> {
    const SCALES: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    SCALES.into_iter().enumerate().flat_map(move |(e, scale)| {
        let parts = first_parts << e;
        let step = (1.0 - 0.1f32) / parts as f32;
        // torch.linspace counts from the nearer end, each edge with one rounding.
        let edge = move |k: usize| {
            if k < parts.div_ceil(2) {
                step.mul_add(k as f32, 0.1)
            } else {
                (-step).mul_add((parts - k) as f32, 1.0)
            }
        };
        (0..parts).map(move |k| (edge(k) + edge(k + 1)) / 2.0 * scale)
    })
}

/// `dynamic_lower_bounds()[k]` separates the codes `k - 1` and `k` of [`dynamic_map`]; a value equal to it takes `k - 1`.
pub fn dynamic_lower_bounds() -> &'static [f32; 256] {
    static BOUNDS: LazyLock<[f32; 256]> = LazyLock::new(|| lower_bounds(dynamic_map()));
    &BOUNDS
}

/// The same for [`unsigned_dynamic_map`].
pub fn unsigned_dynamic_lower_bounds() -> &'static [f32; 256] {
    static BOUNDS: LazyLock<[f32; 256]> = LazyLock::new(|| lower_bounds(unsigned_dynamic_map()));
    &BOUNDS
}

fn lower_bounds(map: &[f32; 256]) -> [f32; 256] {
    std::array::from_fn(|k| match k {
        0 => f32::NEG_INFINITY,
        _ => 0.5 * (map[k - 1] + map[k]),
    })
}

/// The code of the value that is nearest to `value`: the largest whose lower bound is below it, bit by bit and without a
/// branch to mispredict.
#[inline(always)]
pub fn nearest_dynamic_code(value: f32, lower_bounds: &[f32; 256]) -> u8 {
    [128u8, 64, 32, 16, 8, 4, 2, 1]
        .into_iter()
        .fold(0, |code, bit| {
            code + bit * u8::from(lower_bounds[usize::from(code | bit)] < value)
        })
}
