//! Matrix products on the CPU: checked views, and tiles of a result handed to threads.

use std::cell::Cell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use gemm::Parallelism;
use rayon::prelude::*;

/// A matrix inside a slice of f32, by its strides in elements.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a> {
    data: &'a [f32],
    pub(super) rows: usize,
    pub(super) cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A row-major matrix at the start of `data` whose rows begin `row_stride` elements apart.
    pub(super) fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(cols <= row_stride || rows <= 1, "rows of a matrix overlap");
        assert!(
            rows == 0 || data.len() >= (rows - 1) * row_stride + cols,
            "matrix past the end of its data"
        );
        Self {
            data,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// A row-major matrix without gaps.
    pub(super) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// The transposed view.
    pub(super) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// A range of rows of this view.
    pub(super) fn rows(self, rows: Range<usize>) -> Self {
        assert!(
            rows.start <= rows.end && rows.end <= self.rows,
            "rows outside the matrix"
        );
        let start = if rows.is_empty() {
            0
        } else {
            rows.start * self.row_stride
        };
        Self {
            data: &self.data[start..],
            rows: rows.len(),
            ..self
        }
    }

    /// A range of columns of this view.
    pub(super) fn cols(self, cols: Range<usize>) -> Self {
        self.t().rows(cols).t()
    }
}

/// A row-major matrix to be written; unlike a slice, several of them can lie between each other's rows.
pub(super) struct MatMut<'a> {
    data: *mut f32,
    pub(super) rows: usize,
    pub(super) cols: usize,
    row_stride: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: a MatMut is the only way to its elements, like a mutable slice.
unsafe impl Send for MatMut<'_> {}

impl<'a> MatMut<'a> {
    pub(super) fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert!(data.len() >= rows * cols, "matrix past the end of its data");
        Self {
            data: data.as_mut_ptr(),
            rows,
            cols,
            row_stride: cols,
            lifetime: PhantomData,
        }
    }

    pub(super) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row outside the matrix");
        // SAFETY: the constructors checked that every row lies in the data, which is exclusively ours.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.row_stride), self.cols) }
    }
}

/// What a product does with the values already there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Into {
    Overwrite,
    Add,
}

/// `dst = factor * lhs rhs`, or the same added to `dst`, on this thread.
pub(super) fn matmul(dst: &mut MatMut<'_>, into: Into, lhs: Mat<'_>, rhs: Mat<'_>, factor: f32) {
    assert_eq!(
        (dst.rows, dst.cols, lhs.cols),
        (lhs.rows, rhs.cols, rhs.rows),
        "matmul shapes"
    );
    if dst.rows == 0 || dst.cols == 0 {
        return;
    }
    // SAFETY: the views were checked against their data when they were made, and the shapes agree.
    unsafe {
        gemm::gemm(
            dst.rows,
            dst.cols,
            lhs.cols,
            dst.data,
            1,
            dst.row_stride as isize,
            into == Into::Add,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// A slice that is shared out among threads as matrices which do not meet.
pub(super) struct Shared<'a> {
    data: *mut f32,
    len: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: access goes through `mat`, whose caller promises that no two matrices in use meet.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(super) fn new(data: &'a mut [f32]) -> Self {
        Self {
            data: data.as_mut_ptr(),
            len: data.len(),
            lifetime: PhantomData,
        }
    }

    /// Data that has no values yet.
    ///
    /// # Safety
    /// What is taken from it has to be overwritten before it is read.
    pub(super) unsafe fn uninit(data: &'a mut [MaybeUninit<f32>]) -> Self {
        Self {
            data: data.as_mut_ptr().cast(),
            len: data.len(),
            lifetime: PhantomData,
        }
    }

    /// The matrix that begins at element `start`.
    ///
    /// # Safety
    /// No other matrix in use at the same time may share an element with this one.
    pub(super) unsafe fn mat(
        &self,
        start: usize,
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> MatMut<'_> {
        assert!(
            rows == 0 || start + (rows - 1) * row_stride + cols <= self.len,
            "matrix past the end of its data"
        );
        MatMut {
            // SAFETY: within the data, as just checked.
            data: unsafe { self.data.add(start) },
            rows,
            cols,
            row_stride,
            lifetime: PhantomData,
        }
    }
}

/// Memory for intermediate values, as long as the longest use of it so far.
#[derive(Default)]
pub(super) struct Scratch(Vec<f32>);

impl Scratch {
    /// The first `len` values, which are whatever was left there.
    pub(super) fn take(&mut self, len: usize) -> &mut [f32] {
        if self.0.len() < len {
            self.0.resize(len, 0.0);
        }
        &mut self.0[..len]
    }
}

thread_local! {
    /// Kept from one product to the next: new memory has to be zeroed each time (2 % of a step).
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Lends `f` the scratch of this thread.
pub(super) fn with_scratch<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    let mut scratch = SCRATCH.take();
    let result = f(&mut scratch);
    SCRATCH.set(scratch);
    result
}

/// Gives `f` the tiles of `width` columns of the row-major `dst: [rows, cols]`, in parallel, each with scratch of its thread.
pub(super) fn for_each_column_tile(
    dst: Shared<'_>,
    (rows, cols): (usize, usize),
    width: usize,
    f: impl Fn(MatMut<'_>, Range<usize>, &mut Scratch) + Sync,
) {
    assert_eq!(dst.len, rows * cols, "tiles of a matrix");
    (0..cols.div_ceil(width)).into_par_iter().for_each(|tile| {
        let range = tile * width..cols.min((tile + 1) * width);
        // SAFETY: tiles are disjoint ranges of columns.
        let tile = unsafe { dst.mat(range.start, rows, range.len(), cols) };
        with_scratch(|scratch| f(tile, range, scratch));
    });
}

/// `dst = factor * lhs rhs`, or the same added, row-major, in parallel over tiles of rows.
pub(super) fn matmul_by_rows(dst: &mut [f32], into: Into, lhs: Mat<'_>, rhs: Mat<'_>, factor: f32) {
    const ROWS: usize = 256;
    let cols = rhs.cols;
    assert_eq!(dst.len(), lhs.rows * cols, "matmul shapes");
    dst.par_chunks_mut((ROWS * cols).max(1))
        .enumerate()
        .for_each(|(i, chunk)| {
            let rows = i * ROWS..lhs.rows.min((i + 1) * ROWS);
            matmul(
                &mut MatMut::new(chunk, rows.len(), cols),
                into,
                lhs.rows(rows),
                rhs,
                factor,
            );
        });
}
