//! The AVX-512 micro-kernel of matrix products, and the transposition that feeds it.
//!
//! A tile of the result, up to 12 rows by 32 columns, stays in 24 vector registers while k runs: each step loads 2 vectors
//! of the right-hand side and broadcasts 12 numbers of the left for 24 multiply-adds, so that loads never are the limit.
//!
//! The left-hand side is read where it lies, by its strides; the right-hand side from a panel `[k][16 VECS]`.

use std::arch::x86_64::*;

/// Floats of a vector register.
pub(super) const LANES: usize = 16;
/// Rows of the largest tile.
pub(super) const ROWS: usize = 12;
/// Vectors in a row of the largest tile.
pub(super) const VECS: usize = 2;
/// Steps of k in one call, at most: a row of the left-hand side that is at hand.
pub(super) const MAX_K: usize = 1024;
/// Distance of such rows: not a multiple of 4096 bytes, or all of them would fall on one set of the cache.
pub(super) const LHS_STRIDE: usize = MAX_K + LANES;

/// Memory to fetch into the L2 cache meanwhile: `rows` rows that are `stride` elements apart, as long as k.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    pub at: *const f32,
    pub rows: usize,
    pub stride: usize,
}

/// A tile of the result in memory.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub at: *mut f32,
    pub row_stride: usize,
    pub cols: usize,
    /// Whether the product is added to what is there.
    pub add: bool,
}

/// Rows of a left-hand side for `k` steps, by the distances of its elements.
#[derive(Clone, Copy)]
pub(super) struct Lhs {
    pub at: *const f32,
    pub row_stride: usize,
    pub k_stride: usize,
    pub k: usize,
}

type Kernel = unsafe fn(&[Lhs], *const f32, Tile, Ahead);

/// `tile = lhs rhs` over the steps of one `lhs` after the other, or the same added, for `rows` rows.
///
/// # Safety
/// The processor has AVX-512 F; `1 <= rows <= ROWS`, `1 <= tile.cols <= 32`, each `lhs` holds `rows` rows, `rhs` holds 16
/// or, for more than 16 columns, 32 numbers for each of their steps, and `tile` is ours to write.
#[inline]
pub(super) unsafe fn multiply(rows: usize, lhs: &[Lhs], rhs: *const f32, tile: Tile, ahead: Ahead) {
    const KERNELS: [[Kernel; ROWS]; VECS] = {
        macro_rules! kernels {
            ($vecs:literal: $($rows:literal)*) => { [$(kernel::<$rows, $vecs>),*] };
        }
        [
            kernels!(1: 1 2 3 4 5 6 7 8 9 10 11 12),
            kernels!(2: 1 2 3 4 5 6 7 8 9 10 11 12),
        ]
    };
    let kernel = KERNELS[tile.cols.div_ceil(LANES) - 1][rows - 1];
    // SAFETY: as the caller promises.
    unsafe { kernel(lhs, rhs, tile, ahead) }
}

#[target_feature(enable = "avx512f")]
unsafe fn kernel<const ROWS: usize, const VECS: usize>(
    lhs: &[Lhs],
    mut rhs: *const f32,
    tile: Tile,
    mut ahead: Ahead,
) {
    let at = |r: usize, v: usize| tile.at.wrapping_add(r * tile.row_stride + v * LANES);
    for r in 0..ROWS {
        for v in 0..VECS {
            _mm_prefetch::<_MM_HINT_T0>(at(r, v).cast());
        }
    }
    let mut acc = [[_mm512_setzero_ps(); VECS]; ROWS];
    for lhs in lhs {
        // One pointer for 3 rows: an address reaches 0, 1 or 2 strides far.
        let mut threes: [*const f32; 4] =
            std::array::from_fn(|i| lhs.at.wrapping_add(3 * i * lhs.row_stride));
        let mut left = lhs.k;
        while left > 0 {
            // A cache line of each row ahead in the time of 16 steps: seldom enough to cost nothing.
            for row in 0..ahead.rows {
                _mm_prefetch::<_MM_HINT_T1>(ahead.at.wrapping_add(row * ahead.stride).cast());
            }
            ahead.at = ahead.at.wrapping_add(LANES);
            let steps = left.min(LANES);
            left -= steps;
            for _ in 0..steps {
                // SAFETY: `lhs` and `rhs` hold `k` steps.
                unsafe {
                    let b: [__m512; VECS] =
                        std::array::from_fn(|v| _mm512_loadu_ps(rhs.add(v * LANES)));
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let a = threes[r / 3].wrapping_add(r % 3 * lhs.row_stride);
                        let a = _mm512_set1_ps(*a);
                        for (acc, &b) in acc.iter_mut().zip(&b) {
                            *acc = _mm512_fmadd_ps(a, b, *acc);
                        }
                    }
                    rhs = rhs.add(VECS * LANES);
                }
                threes = threes.map(|at| at.wrapping_add(lhs.k_stride));
            }
        }
    }
    let last = u16::MAX >> (VECS * LANES - tile.cols);
    for (r, acc) in acc.iter().enumerate() {
        for (v, &acc) in acc.iter().enumerate() {
            let mask = if v + 1 == VECS { last } else { u16::MAX };
            // SAFETY: the mask leaves the columns of the tile.
            unsafe {
                let sum = if tile.add {
                    _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at(r, v)), acc)
                } else {
                    acc
                };
                _mm512_mask_storeu_ps(at(r, v), mask, sum);
            }
        }
    }
}

/// Transposes a 16 x 16 matrix that lies in 16 vectors.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(rows: [__m512; LANES]) -> [__m512; LANES] {
    // Interleaves numbers, then pairs, then quarters of vectors, twice.
    let mut pairs = rows;
    for i in (0..LANES).step_by(2) {
        pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    let mut fours = pairs;
    for i in (0..LANES).step_by(4) {
        for (half, pair) in [(0, i), (2, i + 1)] {
            let (a, b) = (
                _mm512_castps_pd(pairs[pair]),
                _mm512_castps_pd(pairs[pair + 2]),
            );
            fours[i + half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            fours[i + half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    // `fours[4 g + c]` holds columns c, c + 4, c + 8, c + 12 of the rows 4 g .. 4 g + 4.
    let mut columns = fours;
    for c in 0..4 {
        let even = |a, b| _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
        let odd = |a, b| _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
        let (a, b, c_, d) = (fours[c], fours[4 + c], fours[8 + c], fours[12 + c]);
        let (ab0, ab1, cd0, cd1) = (even(a, b), odd(a, b), even(c_, d), odd(c_, d));
        columns[c] = even(ab0, cd0);
        columns[c + 4] = even(ab1, cd1);
        columns[c + 8] = odd(ab0, cd0);
        columns[c + 12] = odd(ab1, cd1);
    }
    columns
}

/// A mask of the first `n` lanes, all if there are more.
pub(super) fn mask(n: usize) -> __mmask16 {
    if n >= LANES { u16::MAX } else { (1 << n) - 1 }
}
