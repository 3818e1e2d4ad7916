//! Checked views of matrices in slices of f32.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// A matrix inside a slice of f32, by its strides in elements.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Mat<'a> {
    pub(super) data: &'a [f32],
    pub(in crate::ops) rows: usize,
    pub(in crate::ops) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A row-major matrix at the start of `data` whose rows begin `row_stride` elements apart.
    pub(in crate::ops) fn strided(
        data: &'a [f32],
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Self {
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
    pub(in crate::ops) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// The transposed view.
    pub(in crate::ops) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// A range of rows of this view.
    pub(in crate::ops) fn rows(self, rows: Range<usize>) -> Self {
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
    pub(in crate::ops) fn cols(self, cols: Range<usize>) -> Self {
        self.t().rows(cols).t()
    }
}

/// A row-major matrix to be written; unlike a slice, several of them can lie between each other's rows.
pub(in crate::ops) struct MatMut<'a> {
    pub(super) data: *mut f32,
    pub(in crate::ops) rows: usize,
    pub(in crate::ops) cols: usize,
    pub(super) row_stride: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: a MatMut is the only way to its elements, like a mutable slice.
unsafe impl Send for MatMut<'_> {}

impl<'a> MatMut<'a> {
    pub(in crate::ops) fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert!(data.len() >= rows * cols, "matrix past the end of its data");
        Self {
            data: data.as_mut_ptr(),
            rows,
            cols,
            row_stride: cols,
            lifetime: PhantomData,
        }
    }

    /// A range of rows.
    pub(in crate::ops) fn rows(&mut self, rows: Range<usize>) -> MatMut<'_> {
        assert!(
            rows.start <= rows.end && rows.end <= self.rows,
            "rows outside the matrix"
        );
        MatMut {
            data: self.data.wrapping_add(rows.start * self.row_stride),
            rows: rows.len(),
            lifetime: PhantomData,
            ..*self
        }
    }

    pub(in crate::ops) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row outside the matrix");
        // SAFETY: the constructors checked that every row lies in the data, which is exclusively ours.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.row_stride), self.cols) }
    }
}

/// A slice that is shared out among threads as matrices which do not meet.
pub(in crate::ops) struct Shared<'a> {
    data: *mut f32,
    pub(super) len: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: access goes through `mat`, whose caller promises that no two matrices in use meet.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(in crate::ops) fn new(data: &'a mut [f32]) -> Self {
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
    pub(in crate::ops) unsafe fn uninit(data: &'a mut [MaybeUninit<f32>]) -> Self {
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
    pub(in crate::ops) unsafe fn mat(
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
