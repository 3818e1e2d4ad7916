//! Results divided into tiles, for the threads.

use std::ops::Range;

use rayon::prelude::*;

use super::{Into, Mat, MatMut, Shared, matmul};
use crate::device::ComputeDtype;

/// What the rows or the columns of a result are divided into for the threads: `most` at a time, or less if that leaves some
/// thread without two shares; there are `beside` of the others.
///
/// No element of a product may depend on the number of threads. The crate `gemm` takes its sums in another order where a result
/// has at most 64 rows and columns, or 256 elements in all; so no share is as small, or all are whatever the number of threads.
fn shares(
    len: usize,
    beside: usize,
    most: usize,
) -> impl IndexedParallelIterator<Item = Range<usize>> {
    /// Rows and columns that our own kernels pack together.
    const UNIT: usize = 32;
    let units = len.div_ceil(UNIT);
    // Three units in each, the last of which may not be whole.
    let possible = if beside < 4 { 0 } else { units / 3 };
    let wanted = 2 * rayon::current_num_threads();
    let count = wanted.min(possible).max(len.div_ceil(most));
    let start = move |share| len.min(UNIT * (units * share / count));
    let shares = (0..count).into_par_iter();
    shares.map(move |share| start(share)..start(share + 1))
}

/// Gives `f` tiles of the row-major `dst: [rows, cols]`, all of its rows and up to `widest` columns, in parallel.
pub(in crate::ops) fn for_each_column_tile(
    dst: Shared<'_>,
    (rows, cols): (usize, usize),
    widest: usize,
    f: impl Fn(MatMut<'_>, Range<usize>) + Sync,
) {
    assert_eq!(dst.len, rows * cols, "tiles of a matrix");
    shares(cols, rows, widest).for_each(|range| {
        // SAFETY: tiles are disjoint ranges of columns.
        let tile = unsafe { dst.mat(range.start, rows, range.len(), cols) };
        f(tile, range);
    });
}

/// The same with all of its columns and up to `tallest` rows.
pub(in crate::ops) fn for_each_row_tile(
    dst: Shared<'_>,
    (rows, cols): (usize, usize),
    tallest: usize,
    f: impl Fn(MatMut<'_>, Range<usize>) + Sync,
) {
    assert_eq!(dst.len, rows * cols, "tiles of a matrix");
    shares(rows, cols, tallest).for_each(|range| {
        // SAFETY: tiles are disjoint ranges of rows.
        let tile = unsafe { dst.mat(range.start * cols, range.len(), cols, cols) };
        f(tile, range);
    });
}

/// `dst = factor * lhs rhs` in `dtype`, or the same added, row-major, in parallel over tiles of rows.
pub(in crate::ops) fn matmul_by_rows(
    dst: &mut [f32],
    into: Into,
    (lhs, dtype): (Mat<'_>, ComputeDtype),
    rhs: Mat<'_>,
    factor: f32,
) {
    const TALLEST: usize = 256;
    let shape = (lhs.rows, rhs.cols);
    for_each_row_tile(Shared::new(dst), shape, TALLEST, |mut tile, rows| {
        matmul(&mut tile, into, lhs.rows(rows).to(dtype), rhs, factor);
    });
}
