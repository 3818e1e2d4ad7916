//! The same masks with AVX-512: eight calls of Philox side by side, and the bits of their 64 elements in two comparisons.

use std::arch::x86_64::*;

use super::super::philox::{MULTIPLIERS, round_keys};
use super::{Mask, PER_CALL, chunks};

/// Elements that are masked at a time.
const CHUNK: usize = 8 * PER_CALL;
const LANES: usize = 16;

/// Whether this processor can.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")
}

/// Puts what `mask` keeps of `x`, whose first element is number `first`, into `out`: copied, or with `ADD` added to what is there.
///
/// # Safety
/// [`is_available`], and `out` is as long as `x`.
#[target_feature(enable = "avx512f,avx512bw")]
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
        let (vectors, rest) = x.as_chunks::<LANES>();
        let (out_vectors, out_rest) = out.as_chunks_mut::<LANES>();
        for (i, (x, out)) in vectors.iter().zip(out_vectors).enumerate() {
            let (x, out) = (x.as_ptr(), out.as_mut_ptr());
            // SAFETY: both have so many elements.
            unsafe {
                let mut put = _mm512_maskz_loadu_ps((kept >> (i * LANES)) as u16, x);
                if ADD {
                    put = _mm512_add_ps(_mm512_loadu_ps(out), put);
                }
                _mm512_storeu_ps(out, put);
            }
        }
        let kept = kept >> (vectors.len() * LANES % CHUNK);
        for (i, (&x, out)) in rest.iter().zip(out_rest).enumerate() {
            let put = if kept >> i & 1 == 1 { x } else { 0.0 };
            *out = if ADD { *out + put } else { put };
        }
    }
}

/// A bit for each of the 64 elements of eight calls, set where it is kept.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn bits(mask: &Mask, keys: &[[u32; 2]], first_call: u64) -> u64 {
    let all = |word: u32| _mm512_set1_epi64(i64::from(word));
    // In an order that unpacking below undoes.
    let order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    let calls = _mm512_add_epi64(_mm512_set1_epi64(first_call as i64), order);
    let high = |words| _mm512_srli_epi64::<32>(words);
    // A word is the low half of 64 bits; multiplication reads no more, so the high half may hold anything.
    let mut c = [calls, high(calls), all(mask.stream[0]), all(mask.stream[1])];
    let [by_0, by_1] = MULTIPLIERS.map(all);
    for &[key_0, key_1] in keys {
        let (p0, p1) = (_mm512_mul_epu32(c[0], by_0), _mm512_mul_epu32(c[2], by_1));
        c = [
            _mm512_xor_si512(_mm512_xor_si512(high(p1), c[1]), all(key_0)),
            p1,
            _mm512_xor_si512(_mm512_xor_si512(high(p0), c[3]), all(key_1)),
            p0,
        ];
    }
    let pair = |low, high| _mm512_mask_blend_epi32(0xAAAA, low, _mm512_slli_epi64::<32>(high));
    let (front, back) = (pair(c[0], c[1]), pair(c[2], c[3]));
    let threshold = _mm512_set1_epi16(mask.threshold as i16);
    let kept = |numbers| u64::from(_mm512_cmpge_epu16_mask(numbers, threshold));
    kept(_mm512_unpacklo_epi64(front, back)) | kept(_mm512_unpackhi_epi64(front, back)) << 32
}
