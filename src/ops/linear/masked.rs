//! The adapter's products with an input that dropout has masked, `x' = keep_scale mask x`:
//! `u = x' A^T`, `dA += du^T x'`, `dx += keep_scale mask (du A)`.
//!
//! On the CPU: a block of the input is masked into scratch that stays in the cache and multiplied at once. No mask and no
//! masked input is ever whole. `kernels` does the same on a device.

use std::cell::Cell;
use std::ops::Range;

use super::super::dropout::Mask;
use super::super::gemm::{
    Into, Mat, MatMut, Shared, for_each_column_tile, for_each_row_tile, matmul,
};
use super::super::simd::prefetch;
use super::WIDEST_TILE;
use crate::device::ComputeDtype;

/// Rows, and at most as many columns, of a block that is masked: 256 KiB, a part of the L2 cache.
const BLOCK: usize = 256;

thread_local! {
    /// Kept from one product to the next: new memory would have to be zeroed each time.
    static BLOCK_SCRATCH: Cell<Vec<f32>> = Cell::default();
}

/// Lends `f` the scratch of this thread, which holds a block.
fn with_block<R>(f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut block = BLOCK_SCRATCH.take();
    block.resize(BLOCK * BLOCK, 0.0);
    let result = f(&mut block);
    BLOCK_SCRATCH.set(block);
    result
}

fn blocks(of: usize) -> impl Iterator<Item = Range<usize>> {
    (0..of)
        .step_by(BLOCK)
        .map(move |start| start..of.min(start + BLOCK))
}

/// A row-major matrix, with its mask.
#[derive(Clone, Copy)]
pub(super) struct Masked<'a> {
    pub(super) x: &'a [f32],
    pub(super) cols: usize,
    pub(super) mask: Mask,
    /// Of its products.
    pub(super) dtype: ComputeDtype,
}

impl Masked<'_> {
    /// Writes the kept elements of these rows and columns, row-major and without gaps.
    fn read(&self, rows: Range<usize>, cols: Range<usize>, block: &mut [f32]) {
        for (row, block) in rows.zip(block.chunks_exact_mut(cols.len())) {
            let first = row * self.cols + cols.start;
            let x = &self.x[first..];
            prefetch(x.get(self.cols..).unwrap_or_default(), cols.len());
            self.mask.keep(first, &x[..cols.len()], block);
        }
    }
}

/// `u = x' A^T`.
///
/// # Shapes
/// `x: [N, in]`, `a: [R, in]`, `u: [N, R]`.
pub(super) fn down_project(x: Masked<'_>, a: Mat<'_>, u: &mut [f32]) {
    let shape = (u.len() / a.rows, a.rows);
    for_each_row_tile(Shared::new(u), shape, BLOCK, |mut u, rows| {
        for ins in blocks(x.cols) {
            with_block(|block| {
                x.read(rows.clone(), ins.clone(), block);
                let into = if ins.start == 0 {
                    Into::Overwrite
                } else {
                    Into::Add
                };
                let block = Mat::new(block, rows.len(), ins.len());
                let block = block.to(x.dtype);
                matmul(&mut u, into, block, a.cols(ins).t(), x.mask.keep_scale());
            });
        }
    });
}

/// `dA += du^T x'`.
///
/// # Shapes
/// `x: [N, in]`, `du: [N, R]`, `d_a: [R, in]`.
pub(super) fn add_grad_a(x: Masked<'_>, du: Mat<'_>, d_a: &mut [f32]) {
    let dims = (du.cols, x.cols);
    for_each_column_tile(Shared::new(d_a), dims, WIDEST_TILE, |mut tile, ins| {
        for rows in blocks(du.rows) {
            with_block(|block| {
                x.read(rows.clone(), ins.clone(), block);
                let block = Mat::new(block, rows.len(), ins.len());
                let du = du.rows(rows).t().to(x.dtype);
                matmul(&mut tile, Into::Add, du, block, x.mask.keep_scale());
            });
        }
    });
}

/// `dx = keep_scale mask (du A)` for the columns `ins` of `dx: [N, in]`, at most [`BLOCK`] of them.
///
/// # Shapes
/// `du: [N, R]`, `a: [R, in]`, `dx: [N, ins]`.
pub(super) fn up_project(
    (du, dtype): (Mat<'_>, ComputeDtype),
    a: Mat<'_>,
    mask: Mask,
    ins: Range<usize>,
    dx: &mut MatMut<'_>,
) {
    for rows in blocks(du.rows) {
        let mut part = dx.rows(rows.clone());
        let (du, a_part) = (du.rows(rows.clone()).to(dtype), a.cols(ins.clone()));
        matmul(&mut part, Into::Overwrite, du, a_part, mask.keep_scale());
        for (i, row) in rows.enumerate() {
            mask.zero_dropped(row * a.cols + ins.start, part.row(i));
        }
    }
}

/// The same added to `dx`.
pub(super) fn add_up_project(
    (du, dtype): (Mat<'_>, ComputeDtype),
    a: Mat<'_>,
    mask: Mask,
    ins: Range<usize>,
    dx: &mut MatMut<'_>,
) {
    for rows in blocks(du.rows) {
        with_block(|block| {
            let block = &mut block[..rows.len() * ins.len()];
            matmul(
                &mut MatMut::new(block, rows.len(), ins.len()),
                Into::Overwrite,
                du.rows(rows.clone()).to(dtype),
                a.cols(ins.clone()),
                mask.keep_scale(),
            );
            for (row, product) in rows.clone().zip(block.chunks_exact(ins.len())) {
                if row + 1 < rows.end {
                    prefetch(dx.row(row + 1), ins.len());
                }
                mask.add_kept(row * a.cols + ins.start, product, dx.row(row));
            }
        });
    }
}
