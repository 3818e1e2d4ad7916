//! Looks packed 4-bit codes up in a table of 16 values: the inner loop of dequantization.
//!
//! The table holds `code[c] * absmax` of one block, already rounded to the output type, so an element costs a shuffle.

/// A value of the table, as the bits that are stored: `f32`, or `u16` for bf16 and f16.
pub trait Entry: Copy {
    /// Writes `table[code]` for the `out.len()` codes from the high nibble of `packed[0]` on.
    ///
    /// # Safety
    /// The processor has AVX2.
    #[cfg(target_arch = "x86_64")]
    unsafe fn look_up_avx2(packed: &[u8], table: &[Self; 16], out: &mut [Self]);

    /// Writes `table[code]` for the `out.len()` codes from the high nibble of `packed[0]` on.
    ///
    /// # Safety
    /// The processor has AVX-512 F, BW and VL.
    #[cfg(target_arch = "x86_64")]
    unsafe fn look_up_avx512(packed: &[u8], table: &[Self; 16], out: &mut [Self]);
}

/// Writes `table[code]` for the `out.len()` codes from the high nibble of `packed[0]` on.
#[inline(always)]
pub(super) fn look_up<T: Copy>(packed: &[u8], table: &[T; 16], out: &mut [T]) {
    let (pairs, last) = out.as_chunks_mut::<2>();
    for (pair, &byte) in pairs.iter_mut().zip(packed) {
        *pair = [table[usize::from(byte >> 4)], table[usize::from(byte & 15)]];
    }
    if let [last] = last {
        *last = table[usize::from(packed[pairs.len()] >> 4)];
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Entry, look_up};

    /// The 16 codes of 8 bytes in order, one a byte; only the low 4 bits of each are meaningful.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn codes16(packed: &[u8; 8]) -> __m128i {
        let bytes = _mm_cvtsi64_si128(i64::from_le_bytes(*packed));
        _mm_unpacklo_epi8(_mm_srli_epi16::<4>(bytes), bytes)
    }

    /// The 64 codes of 32 bytes, 0..16 and 32..48 in the first vector, the others in the second.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn codes64(packed: &[u8; 32]) -> (__m256i, __m256i) {
        // SAFETY: reads the 32 bytes of the array, at any alignment.
        let bytes = unsafe { _mm256_loadu_si256(packed.as_ptr().cast()) };
        let high = _mm256_srli_epi16::<4>(bytes);
        (
            _mm256_unpacklo_epi8(high, bytes),
            _mm256_unpackhi_epi8(high, bytes),
        )
    }

    impl Entry for f32 {
        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn look_up_avx2(packed: &[u8], table: &[f32; 16], out: &mut [f32]) {
            // SAFETY: reads the 16 values of the array, at any alignment.
            let (low, high) = unsafe {
                (
                    _mm256_loadu_ps(table.as_ptr()),
                    _mm256_loadu_ps(table.as_ptr().add(8)),
                )
            };
            let select8 = |codes: __m128i| {
                let codes = _mm256_cvtepu8_epi32(codes);
                let bit3 = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
                _mm256_blendv_ps(
                    _mm256_permutevar8x32_ps(low, codes),
                    _mm256_permutevar8x32_ps(high, codes),
                    bit3,
                )
            };
            let (groups, rest) = out.as_chunks_mut::<16>();
            let (bytes, rest_bytes) =
                packed[..groups.len() * 8 + rest.len().div_ceil(2)].split_at(groups.len() * 8);
            for (out, bytes) in groups.iter_mut().zip(bytes.as_chunks::<8>().0) {
                let codes = codes16(bytes);
                let (a, b) = (select8(codes), select8(_mm_srli_si128::<8>(codes)));
                // SAFETY: writes the 16 values of the array, at any alignment.
                unsafe {
                    _mm256_storeu_ps(out.as_mut_ptr(), a);
                    _mm256_storeu_ps(out.as_mut_ptr().add(8), b);
                }
            }
            look_up(rest_bytes, table, rest);
        }

        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
        unsafe fn look_up_avx512(packed: &[u8], table: &[f32; 16], out: &mut [f32]) {
            // SAFETY: reads the 16 values of the array, at any alignment.
            let values = unsafe { _mm512_loadu_ps(table.as_ptr()) };
            // The permutation reads the low 4 bits of an index alone.
            let select16 =
                |codes: __m128i| _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), values);
            let (groups, rest) = out.as_chunks_mut::<64>();
            let (bytes, rest_bytes) =
                packed[..groups.len() * 32 + rest.len().div_ceil(2)].split_at(groups.len() * 32);
            for (out, bytes) in groups.iter_mut().zip(bytes.as_chunks::<32>().0) {
                let (a, b) = codes64(bytes);
                // SAFETY: writes the 64 values of the array, at any alignment.
                unsafe {
                    let out = out.as_mut_ptr();
                    _mm512_storeu_ps(out, select16(_mm256_castsi256_si128(a)));
                    _mm512_storeu_ps(out.add(16), select16(_mm256_castsi256_si128(b)));
                    _mm512_storeu_ps(out.add(32), select16(_mm256_extracti128_si256::<1>(a)));
                    _mm512_storeu_ps(out.add(48), select16(_mm256_extracti128_si256::<1>(b)));
                }
            }
            if rest.is_empty() {
                return;
            }
            let (groups, rest) = rest.as_chunks_mut::<16>();
            let (bytes, rest_bytes) = rest_bytes.split_at(groups.len() * 8);
            for (out, bytes) in groups.iter_mut().zip(bytes.as_chunks::<8>().0) {
                // SAFETY: writes the 16 values of the array, at any alignment.
                unsafe { _mm512_storeu_ps(out.as_mut_ptr(), select16(codes16(bytes))) };
            }
            look_up(rest_bytes, table, rest);
        }
    }

    impl Entry for u16 {
        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn look_up_avx2(packed: &[u8], table: &[u16; 16], out: &mut [u16]) {
            let low_bytes = table.map(|v| v as u8);
            let high_bytes = table.map(|v| (v >> 8) as u8);
            // SAFETY: reads the 16 bytes of each array, at any alignment.
            let (low, high) = unsafe {
                (
                    _mm_loadu_si128(low_bytes.as_ptr().cast()),
                    _mm_loadu_si128(high_bytes.as_ptr().cast()),
                )
            };
            let (groups, rest) = out.as_chunks_mut::<16>();
            let (bytes, rest_bytes) =
                packed[..groups.len() * 8 + rest.len().div_ceil(2)].split_at(groups.len() * 8);
            for (out, bytes) in groups.iter_mut().zip(bytes.as_chunks::<8>().0) {
                let codes = _mm_and_si128(codes16(bytes), _mm_set1_epi8(15));
                let (low, high) = (_mm_shuffle_epi8(low, codes), _mm_shuffle_epi8(high, codes));
                // SAFETY: writes the 16 values of the array, at any alignment.
                unsafe {
                    let out = out.as_mut_ptr().cast::<__m128i>();
                    _mm_storeu_si128(out, _mm_unpacklo_epi8(low, high));
                    _mm_storeu_si128(out.add(1), _mm_unpackhi_epi8(low, high));
                }
            }
            look_up(rest_bytes, table, rest);
        }

        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
        unsafe fn look_up_avx512(packed: &[u8], table: &[u16; 16], out: &mut [u16]) {
            // SAFETY: reads the 16 values of the array, at any alignment.
            let values = unsafe { _mm256_loadu_si256(table.as_ptr().cast()) };
            // The permutation reads the low 5 bits of an index: twice the table makes the fifth meaningless.
            let values = _mm512_broadcast_i64x4(values);
            let select32 =
                |codes: __m256i| _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), values);
            let (groups, rest) = out.as_chunks_mut::<64>();
            let (bytes, rest_bytes) =
                packed[..groups.len() * 32 + rest.len().div_ceil(2)].split_at(groups.len() * 32);
            for (out, bytes) in groups.iter_mut().zip(bytes.as_chunks::<32>().0) {
                let (a, b) = codes64(bytes);
                // SAFETY: writes the 64 values of the array, at any alignment.
                unsafe {
                    let out = out.as_mut_ptr();
                    _mm512_storeu_si512(
                        out.cast(),
                        select32(_mm256_permute2x128_si256::<0x20>(a, b)),
                    );
                    _mm512_storeu_si512(
                        out.add(32).cast(),
                        select32(_mm256_permute2x128_si256::<0x31>(a, b)),
                    );
                }
            }
            if !rest.is_empty() {
                // SAFETY: a processor with AVX-512 has AVX2.
                unsafe { Self::look_up_avx2(rest_bytes, table, rest) };
            }
        }
    }
}
