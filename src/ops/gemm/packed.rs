//! Sums of products with AVX-512: `dst = sum of lhs_t rhs_t`, as one product along the terms' joined k.
//!
//! Blocks of up to 256 columns and 1024 steps of k: the right-hand side is packed into panels of 32 columns that stay in
//! the L2 cache (weights are dequantized into them), and every 12 rows of the left-hand side are copied and meet them all.

use std::arch::x86_64::*;
use std::cell::Cell;
use std::ops::Range;

use super::kernel::{
    Ahead, LANES, LHS_STRIDE, Lhs, MAX_K, ROWS, Tile, VECS, mask, multiply, transpose,
};
use super::pieces::{Strips, blocks, for_each_piece, parts};
use super::{F32Term, Into, Mat, MatMut, Scratch};

/// Columns of a block: with 768 steps of k, 3/4 of the L2 cache of a Zen 4.
const BLOCK_COLS: usize = 256;
const PANEL: usize = VECS * LANES;

/// What a thread packs into.
#[derive(Default)]
struct Buffers {
    lhs: Scratch,
    rhs: Scratch,
    /// Dequantized weights before they are packed.
    weight: Scratch,
}

thread_local! {
    static BUFFERS: Cell<Buffers> = Cell::default();
}

/// Whether this processor can.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
}

/// `dst = sum of the terms`, or the same added.
///
/// # Safety
/// The processor has AVX-512 F, the terms fit `dst`, and there is at least one.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn product(dst: &mut MatMut<'_>, into: Into, terms: &[F32Term<'_>]) {
    let k: usize = terms.iter().map(F32Term::k).sum();
    // Equal blocks, of whole blocks of quantization where there are several.
    let block_k = match k.div_ceil(MAX_K) {
        0 | 1 => k.max(1),
        blocks => k.div_ceil(blocks).next_multiple_of(64),
    };
    let mut buffers = BUFFERS.take();
    for (cols, steps) in blocks(dst.cols, BLOCK_COLS, k, block_k) {
        let add = into == Into::Add || steps.start > 0;
        block(dst, add, terms, cols, steps, &mut buffers);
    }
    BUFFERS.set(buffers);
}

/// One block of columns over one block of k.
#[target_feature(enable = "avx512f")]
fn block(
    dst: &mut MatMut<'_>,
    add: bool,
    terms: &[F32Term<'_>],
    cols: Range<usize>,
    steps: Range<usize>,
    buffers: &mut Buffers,
) {
    let k = steps.len();
    let mut rhs = Panels {
        data: aligned(&mut buffers.rhs, k * cols.len().next_multiple_of(LANES)),
        k,
        cols: cols.len(),
    };
    let mut at = 0;
    for (term, within) in parts(terms, F32Term::k, &steps) {
        let len = within.len();
        pack_rhs(
            &mut rhs,
            at,
            term,
            within,
            cols.clone(),
            &mut buffers.weight,
        );
        at += len;
    }
    let mut lhs = Vec::with_capacity(terms.len());
    let copies = buffers.lhs.take(ROWS * LHS_STRIDE);
    let panels = cols.len().div_ceil(PANEL);
    for row in (0..dst.rows).step_by(ROWS) {
        let rows = ROWS.min(dst.rows - row);
        lhs.clear();
        let mut at = 0;
        for (term, within) in parts(terms, F32Term::k, &steps) {
            let part = term.lhs.rows(row..row + rows).cols(within);
            lhs.push(readable(part, &mut copies[at..]));
            at += part.cols;
        }
        let mut ahead = rows_ahead(&terms[0], &steps, row + rows);
        let rows_left = ahead.rows;
        ahead.rows = rows_left.div_ceil(panels);
        for (panel, start) in cols.clone().step_by(PANEL).enumerate() {
            let end = cols.end.min(start + PANEL);
            let mut ahead = ahead;
            ahead.at = ahead.at.wrapping_add(panel * ahead.rows * ahead.stride);
            ahead.rows = ahead.rows.min(rows_left.saturating_sub(panel * ahead.rows));
            // SAFETY: the buffers hold `rows` rows and, from panel to panel, `k` steps of 32 columns (16 in a last panel
            // of as many); the tile lies in `dst`, whose rows and columns were respected.
            unsafe {
                let tile = Tile {
                    at: dst.data.add(row * dst.row_stride + start),
                    row_stride: dst.row_stride,
                    cols: end - start,
                    add,
                };
                multiply(rows, &lhs, rhs.panel(panel).0.as_ptr(), tile, ahead);
            }
        }
    }
}

/// The next rows of the first term's left-hand side.
fn rows_ahead(term: &F32Term<'_>, steps: &Range<usize>, row: usize) -> Ahead {
    let lhs = term.lhs;
    let in_rows = lhs.col_stride == 1 && steps.start < lhs.cols;
    Ahead {
        at: lhs
            .data
            .as_ptr()
            .wrapping_add(row * lhs.row_stride + steps.start),
        rows: if in_rows { ROWS.min(lhs.rows - row) } else { 0 },
        stride: lhs.row_stride,
    }
}

/// Where the kernel reads up to [`ROWS`] rows: where they are, or from `copies` at [`LHS_STRIDE`].
fn readable(lhs: Mat<'_>, copies: &mut [f32]) -> Lhs {
    /// Rows at multiples of this distance share so few sets of the L1 cache that they drive each other out.
    const CROWDED: usize = 2048 / size_of::<f32>();
    let (mut at, mut row_stride) = (lhs.data.as_ptr(), lhs.row_stride);
    if lhs.col_stride == 1 && lhs.rows > 1 && lhs.row_stride.is_multiple_of(CROWDED) {
        for row in 0..lhs.rows {
            let from = &lhs.data[row * lhs.row_stride..][..lhs.cols];
            copies[row * LHS_STRIDE..][..lhs.cols].copy_from_slice(from);
        }
        (at, row_stride) = (copies.as_ptr(), LHS_STRIDE);
    }
    Lhs {
        at,
        row_stride,
        k_stride: lhs.col_stride,
        k: lhs.cols,
    }
}

/// A block of the right-hand side: panels of 32 columns, a last one of 16 if that is enough, each `[k][32 or 16]`.
struct Panels<'a> {
    data: &'a mut [f32],
    k: usize,
    cols: usize,
}

impl Panels<'_> {
    /// A panel and the columns it has room for.
    fn panel(&mut self, panel: usize) -> (&mut [f32], usize) {
        let first = panel * PANEL;
        let width = (self.cols - first).next_multiple_of(LANES).min(PANEL);
        (&mut self.data[first * self.k..][..width * self.k], width)
    }
}

/// Writes the part `steps` of a term from step `at` of the panels on.
#[target_feature(enable = "avx512f")]
fn pack_rhs(
    panels: &mut Panels<'_>,
    at: usize,
    term: &F32Term<'_>,
    steps: Range<usize>,
    cols: Range<usize>,
    scratch: &mut Scratch,
) {
    // 16 rows of a weight are 16 KiB, which stay in the L1 cache.
    let strips = Strips {
        mat: MAX_K,
        weight: 16,
        transposed: MAX_K,
    };
    for_each_piece(
        &term.rhs,
        (&steps, &cols),
        PANEL,
        strips,
        scratch,
        |k, panel, piece| {
            pack_panel(panels.panel(panel), at + k, piece, term.factor);
        },
    );
}

/// Writes `factor * rhs` from step `at` of a panel on, with zeros in the columns that `rhs` lacks.
#[target_feature(enable = "avx512f")]
fn pack_panel((panel, width): (&mut [f32], usize), at: usize, rhs: Mat<'_>, factor: f32) {
    let panel = &mut panel[at * width..];
    for group in (0..width).step_by(LANES) {
        let cols = group.min(rhs.cols)..rhs.cols.min(group + LANES);
        let rhs = rhs.cols(cols);
        if rhs.col_stride == 1 {
            let (mask, factor) = (mask(rhs.cols), _mm512_set1_ps(factor));
            for step in 0..rhs.rows {
                let to = &mut panel[step * width + group..][..LANES];
                let from = &rhs.data[step * rhs.row_stride..][..rhs.cols];
                // SAFETY: the mask leaves the elements of `from`; `to` has 16.
                unsafe {
                    let values = _mm512_maskz_loadu_ps(mask, from.as_ptr());
                    _mm512_storeu_ps(to.as_mut_ptr(), _mm512_mul_ps(values, factor));
                }
            }
        } else {
            for start in (0..rhs.rows).step_by(LANES) {
                let steps = start..rhs.rows.min(start + LANES);
                let to = &mut panel[start * width + group..];
                transpose_block(rhs.rows(steps).t(), factor, to, width);
            }
        }
    }
}

/// Writes the transpose of `factor * block`, at most 16 x 16 and row-major, as rows of 16 at `stride`, with zeros where
/// the block has no row.
#[target_feature(enable = "avx512f")]
fn transpose_block(block: Mat<'_>, factor: f32, to: &mut [f32], stride: usize) {
    assert!(
        block.col_stride == 1 && block.cols > 0 && to.len() >= (block.cols - 1) * stride + LANES
    );
    let (mask, factor) = (mask(block.cols), _mm512_set1_ps(factor));
    let mut rows = [_mm512_setzero_ps(); LANES];
    for (row, values) in rows.iter_mut().enumerate().take(block.rows) {
        let from = &block.data[row * block.row_stride..][..block.cols];
        // SAFETY: the mask leaves the elements of `from`.
        *values = unsafe { _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from.as_ptr()), factor) };
    }
    for (row, values) in transpose(rows).into_iter().enumerate().take(block.cols) {
        // SAFETY: `to` has 16 elements from there on, as was checked.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr().add(row * stride), values) };
    }
}

/// `len` values of `scratch`, on the boundary of a cache line.
fn aligned(scratch: &mut Scratch, len: usize) -> &mut [f32] {
    let values = scratch.take(len + LANES);
    let skipped = values.as_ptr().align_offset(64).min(LANES);
    &mut values[skipped..][..len]
}
