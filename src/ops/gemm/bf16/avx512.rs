//! The micro-kernel of AVX512-BF16: 8 rows by 32 columns stay in 16 vector registers while k runs; each pair of k loads two
//! vectors of the right-hand side and broadcasts 8 pairs of the left for 16 products.

use std::arch::x86_64::*;

use super::super::kernel::{LANES, mask};
use super::{LINES, Line, STEP, Tile};

/// Rows that stay in registers.
const ROWS: usize = 8;
const VECS: usize = 2;

/// `tile = lhs rhs` over the steps of one part of `lhs` after the other, or the same added.
///
/// # Safety
/// The processor has AVX512-BF16; the parts of `lhs` have as many lines as `rhs`, and `tile` is ours to write.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn multiply(lhs: &[&[Line]], rhs: &[Line], tile: Tile) {
    for first in (0..tile.rows).step_by(ROWS) {
        let mut sums = [[_mm512_setzero_ps(); VECS]; ROWS];
        let lhs = lhs.iter().flat_map(|part| part.chunks_exact(LINES));
        for (lhs, rhs) in lhs.zip(rhs.chunks_exact(LINES)) {
            for pair in 0..STEP / 2 {
                let b = [vector(&rhs[2 * pair]), vector(&rhs[2 * pair + 1])];
                for (sums, a) in sums.iter_mut().zip(&lhs[first..first + ROWS]) {
                    let a = broadcast(a, pair);
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = _mm512_dpbf16_ps(*sum, a, b);
                    }
                }
            }
        }
        for (row, sums) in (first..tile.rows).zip(sums) {
            for (v, sum) in sums.into_iter().enumerate() {
                let mask = mask(tile.cols.saturating_sub(v * LANES));
                let at = tile.at.wrapping_add(row * tile.row_stride + v * LANES);
                // SAFETY: the mask leaves the columns of the tile.
                unsafe {
                    let sum = match tile.add {
                        true => _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), sum),
                        false => sum,
                    };
                    _mm512_mask_storeu_ps(at, mask, sum);
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn vector(line: &Line) -> __m512bh {
    // SAFETY: both are 64 bytes of plain data.
    unsafe { std::mem::transmute::<Line, __m512bh>(*line) }
}

/// One pair of a line in all lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn broadcast(line: &Line, pair: usize) -> __m512bh {
    // SAFETY: a line holds 16 pairs, as many as there are; 64 bytes of plain data.
    unsafe {
        let pairs: *const i32 = line.0.as_ptr().cast();
        std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*pairs.add(pair)))
    }
}
