//! The same masks with AVX2: eight calls of Philox side by side, in two halves whose instructions hide each other's latency.

use std::arch::x86_64::*;

use super::super::philox::{MULTIPLIERS, round_keys};
use super::{Mask, PER_CALL, chunks};

/// Elements that are masked at a time.
const CHUNK: usize = 8 * PER_CALL;
const LANES: usize = 8;

/// Whether this processor can.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx2")
}

/// Puts what `mask` keeps of `x`, whose first element is number `first`, into `out`: copied, or with `ADD` added to what is there.
///
/// # Safety
/// [`is_available`].
#[target_feature(enable = "avx2")]
pub(super) unsafe fn put_kept<const ADD: bool>(
    mask: &Mask,
    first: usize,
    x: &[f32],
    out: &mut [f32],
) {
    let keys = round_keys(mask.key);
    for (call, skipped, part) in chunks::<CHUNK>(first, x.len()) {
        let kept = bits(mask, &keys, call) >> skipped;
        let (x, out) = (&x[part.clone()], &mut out[part]);
        let len = x.len();
        let whole = len - len % LANES;
        for start in (0..whole).step_by(LANES) {
            // SAFETY: `x` and `out` have `whole` elements.
            unsafe {
                let out = out.as_mut_ptr().add(start);
                let x = _mm256_loadu_ps(x.as_ptr().add(start));
                let mut put = _mm256_and_ps(x, elements(kept >> start));
                if ADD {
                    put = _mm256_add_ps(_mm256_loadu_ps(out), put);
                }
                _mm256_storeu_ps(out, put);
            }
        }
        for i in whole..len {
            let put = if kept >> i & 1 == 1 { x[i] } else { 0.0 };
            out[i] = if ADD { out[i] + put } else { put };
        }
    }
}

/// All bits of those of eight elements whose bit is set.
#[target_feature(enable = "avx2")]
#[inline]
fn elements(bits: u64) -> __m256 {
    let of_each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    let set = _mm256_and_si256(_mm256_set1_epi32(i32::from(bits as u8)), of_each);
    _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, of_each))
}

/// A bit for each of the 64 elements of eight calls, set where it is kept.
#[target_feature(enable = "avx2")]
#[inline]
fn bits(mask: &Mask, keys: &[[u32; 2]], first_call: u64) -> u64 {
    let all = |word: u32| _mm256_set1_epi64x(i64::from(word));
    let high = |words| _mm256_srli_epi64::<32>(words);
    // A word is the low half of 64 bits; multiplication reads no more, so the high half may hold anything.
    let mut halves = [0, 4].map(|first| {
        let lanes = _mm256_setr_epi64x(first, first + 1, first + 2, first + 3);
        let calls = _mm256_add_epi64(_mm256_set1_epi64x(first_call as i64), lanes);
        [calls, high(calls), all(mask.stream[0]), all(mask.stream[1])]
    });
    let [by_0, by_1] = MULTIPLIERS.map(all);
    for &key in keys {
        let [key_0, key_1] = key.map(all);
        for c in &mut halves {
            let (p0, p1) = (_mm256_mul_epu32(c[0], by_0), _mm256_mul_epu32(c[2], by_1));
            *c = [
                _mm256_xor_si256(_mm256_xor_si256(high(p1), c[1]), key_0),
                p1,
                _mm256_xor_si256(_mm256_xor_si256(high(p0), c[3]), key_1),
                p0,
            ];
        }
    }
    let threshold = _mm256_set1_epi16(mask.threshold as i16);
    let [low, high] = halves.map(|c| {
        let pair = |low, high| _mm256_blend_epi32::<0xAA>(low, _mm256_slli_epi64::<32>(high));
        let (front, back) = (pair(c[0], c[1]), pair(c[2], c[3]));
        let kept = |numbers| _mm256_cmpeq_epi16(_mm256_max_epu16(numbers, threshold), numbers);
        // Unpacking and packing both stay within the halves of a register, so that the calls come out in their order.
        let (even, odd) = (
            _mm256_unpacklo_epi64(front, back),
            _mm256_unpackhi_epi64(front, back),
        );
        _mm256_movemask_epi8(_mm256_packs_epi16(kept(even), kept(odd))) as u32
    });
    u64::from(low) | u64::from(high) << 32
}
