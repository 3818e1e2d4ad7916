//! Matrix products on the CPU: checked views, sums of products, and tiles of a result handed to threads.
//!
//! In f32 our own kernel makes them where there is AVX-512 (`kernel`, `packed`), elsewhere the crate `gemm`. In bf16, with sums
//! in f32, they are made by AMX or AVX512-BF16 (`bf16`), elsewhere in f32 of rounded numbers.

#[cfg(target_arch = "x86_64")]
mod bf16;
#[cfg(target_arch = "x86_64")]
mod kernel;
#[cfg(target_arch = "x86_64")]
mod packed;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use gemm::Parallelism;
use rayon::prelude::*;

use crate::device::ComputeDtype;
use crate::quant::FrozenWeight;

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

    /// As the left-hand side of a product in `dtype`.
    pub(super) fn to(self, dtype: ComputeDtype) -> Lhs<'a> {
        match dtype {
            ComputeDtype::F32 => Lhs::F32(self),
            ComputeDtype::Bf16 => Lhs::Bf16(self),
        }
    }

    /// Its values rounded to bf16, row-major; each multiplied by `factor` before.
    fn rounded(self, factor: f32) -> Vec<f32> {
        let at = |row, col| self.data[row * self.row_stride + col * self.col_stride];
        let row = |row| (0..self.cols).map(move |col| round(factor * at(row, col)));
        (0..self.rows).flat_map(row).collect()
    }
}

fn round(value: f32) -> f32 {
    half::bf16::from_f32(value).to_f32()
}

/// The left-hand side of a product, which decides in what numbers the product is made.
#[derive(Clone, Copy)]
pub(super) enum Lhs<'a> {
    F32(Mat<'a>),
    /// Both sides are rounded to bf16 as they are read; sums are in f32.
    Bf16(Mat<'a>),
    /// The same, of a side that was rounded before.
    #[cfg(target_arch = "x86_64")]
    Packed(&'a bf16::PackedLhs),
}

impl<'a> From<Mat<'a>> for Lhs<'a> {
    fn from(mat: Mat<'a>) -> Self {
        Self::F32(mat)
    }
}

impl<'a> Lhs<'a> {
    /// What is not packed, which few rows never are.
    fn unpacked(self) -> Mat<'a> {
        match self {
            Self::F32(mat) | Self::Bf16(mat) => mat,
            #[cfg(target_arch = "x86_64")]
            Self::Packed(_) => unreachable!("it is packed"),
        }
    }

    fn dims(&self) -> (usize, usize) {
        match self {
            Self::F32(mat) | Self::Bf16(mat) => (mat.rows, mat.cols),
            #[cfg(target_arch = "x86_64")]
            Self::Packed(packed) => packed.dims(),
        }
    }
}

/// A matrix that is the left-hand side of many products: for those in bf16 it is packed once, by all threads, unless it has
/// few rows.
pub(super) struct SharedLhs<'a> {
    mat: Mat<'a>,
    dtype: ComputeDtype,
    #[cfg(target_arch = "x86_64")]
    packed: Option<bf16::PackedLhs>,
}

impl<'a> SharedLhs<'a> {
    pub(super) fn new(mat: Mat<'a>, dtype: ComputeDtype) -> Self {
        Self {
            mat,
            dtype,
            #[cfg(target_arch = "x86_64")]
            packed: is_packed(mat.rows, dtype).then(|| bf16::PackedLhs::new(mat)),
        }
    }

    pub(super) fn lhs(&self) -> Lhs<'_> {
        #[cfg(target_arch = "x86_64")]
        if let Some(packed) = &self.packed {
            return Lhs::Packed(packed);
        }
        self.mat.to(self.dtype)
    }
}

/// Whether a left-hand side that products share is packed for them.
#[cfg(target_arch = "x86_64")]
fn is_packed(rows: usize, dtype: ComputeDtype) -> bool {
    dtype == ComputeDtype::Bf16 && rows >= MIN_PACKED_ROWS && bf16::available().is_some()
}

/// Bytes that the CPU packs of a left-hand side `[rows, k]` for all of its products in `dtype`, while they last.
pub fn packed_lhs_bytes(rows: usize, k: usize, dtype: ComputeDtype) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_packed(rows, dtype) {
        return bf16::PackedLhs::bytes(rows, k);
    }
    let _ = (rows, k, dtype);
    0
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

    /// A range of rows.
    pub(super) fn rows(&mut self, rows: Range<usize>) -> MatMut<'_> {
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

/// A window of a frozen weight, read where it is needed.
#[derive(Clone)]
pub(super) struct Window<'a> {
    pub(super) weight: &'a FrozenWeight,
    pub(super) outs: Range<usize>,
    pub(super) ins: Range<usize>,
}

/// The right-hand side of a product.
#[derive(Clone)]
pub(super) enum Rhs<'a> {
    Mat(Mat<'a>),
    /// `[outs, ins]`.
    Weight(Window<'a>),
    /// `[ins, outs]`.
    Transposed(Window<'a>),
}

impl<'a> From<Mat<'a>> for Rhs<'a> {
    fn from(mat: Mat<'a>) -> Self {
        Self::Mat(mat)
    }
}

impl Rhs<'_> {
    fn dims(&self) -> (usize, usize) {
        match self {
            Self::Mat(mat) => (mat.rows, mat.cols),
            Self::Weight(w) => (w.outs.len(), w.ins.len()),
            Self::Transposed(w) => (w.ins.len(), w.outs.len()),
        }
    }
}

/// `factor * lhs rhs`.
#[derive(Clone)]
pub(super) struct Term<'a, L = Lhs<'a>> {
    pub(super) lhs: L,
    pub(super) rhs: Rhs<'a>,
    pub(super) factor: f32,
}

type F32Term<'a> = Term<'a, Mat<'a>>;

impl<L> Term<'_, L> {
    fn k(&self) -> usize {
        self.rhs.dims().0
    }
}

/// Blocks of columns of a sum of products over blocks of the terms' joined k, those of the same columns one after another. There
/// is one even if k is 0: the result still has to be written.
fn blocks(
    cols: usize,
    block_cols: usize,
    k: usize,
    block_k: usize,
) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let block = |start: usize, len: usize, all: usize| start..all.min(start + len);
    (0..cols).step_by(block_cols).flat_map(move |first| {
        let steps = (0..k.max(1)).step_by(block_k);
        steps.map(move |start| (block(first, block_cols, cols), block(start, block_k, k)))
    })
}

/// The terms that have a part in `steps` of their joined k, each with its own steps, of which it has `steps_of`.
fn parts<'t, T>(
    terms: &'t [T],
    steps_of: impl Fn(&T) -> usize,
    steps: &Range<usize>,
) -> impl Iterator<Item = (&'t T, Range<usize>)> {
    let Range { start, end } = *steps;
    let mut first = 0;
    terms.iter().filter_map(move |term| {
        let own = first..first + steps_of(term);
        first = own.end;
        let (start, end) = (start.max(own.start), end.min(own.end));
        (start < end).then(|| (term, start - own.start..end - own.start))
    })
}

/// How many k of a right-hand side are read at a time.
struct Strips {
    /// Of a matrix, for all columns: more are read panel by panel, each row of which may begin on another page.
    mat: usize,
    /// Of a weight `[outs, ins]`, for all columns.
    weight: usize,
    /// Of a weight `[ins, outs]`, for one panel.
    transposed: usize,
}

/// Gives `f` the part `steps` by `cols` of a right-hand side in pieces `[k, up to width columns]`, with the first k of each,
/// counted from that of `steps`, and its panel. Weights are dequantized into `scratch`.
fn for_each_piece(
    rhs: &Rhs<'_>,
    (steps, cols): (&Range<usize>, &Range<usize>),
    width: usize,
    strips: Strips,
    scratch: &mut Scratch,
    mut f: impl FnMut(usize, usize, Mat<'_>),
) {
    let panels = || {
        let starts = cols.clone().step_by(width).enumerate();
        starts.map(|(panel, start)| (panel, start..cols.end.min(start + width)))
    };
    let shifted = |range: &Range<usize>, by: usize| range.start + by..range.end + by;
    let strips_of = |len: usize| {
        let starts = steps.clone().step_by(len);
        starts.map(move |start| start..steps.end.min(start + len))
    };
    match rhs {
        Rhs::Mat(rhs) => {
            for k in strips_of(strips.mat) {
                for (panel, cols) in panels() {
                    f(k.start - steps.start, panel, rhs.rows(k.clone()).cols(cols));
                }
            }
        }
        Rhs::Weight(Window { weight, outs, ins }) => {
            for k in strips_of(strips.weight) {
                let strip = scratch.take(k.len() * cols.len());
                weight.read_tile(shifted(&k, outs.start), shifted(cols, ins.start), strip);
                let strip = Mat::new(strip, k.len(), cols.len());
                for (panel, part) in panels() {
                    let part = part.start - cols.start..part.end - cols.start;
                    f(k.start - steps.start, panel, strip.cols(part));
                }
            }
        }
        Rhs::Transposed(Window { weight, outs, ins }) => {
            for k in strips_of(strips.transposed) {
                for (panel, part) in panels() {
                    let strip = scratch.take(part.len() * k.len());
                    weight.read_tile(shifted(&part, outs.start), shifted(&k, ins.start), strip);
                    let strip = Mat::new(strip, part.len(), k.len()).t();
                    f(k.start - steps.start, panel, strip);
                }
            }
        }
    }
}

impl<'a> Term<'a> {
    /// The same, if it is in f32.
    fn in_f32(&self) -> Option<F32Term<'a>> {
        match self.lhs {
            Lhs::F32(lhs) => Some(self.with(lhs)),
            _ => None,
        }
    }

    fn with<L>(&self, lhs: L) -> Term<'a, L> {
        Term {
            lhs,
            rhs: self.rhs.clone(),
            factor: self.factor,
        }
    }
}

/// `dst = factor * lhs rhs`, or the same added to `dst`, on this thread.
pub(super) fn matmul<'a>(
    dst: &mut MatMut<'_>,
    into: Into,
    lhs: impl std::convert::Into<Lhs<'a>>,
    rhs: impl std::convert::Into<Rhs<'a>>,
    factor: f32,
) {
    let (lhs, rhs) = (lhs.into(), rhs.into());
    matmul_sum(dst, into, &[Term { lhs, rhs, factor }]);
}

/// `dst` = the sum of the terms, or the same added to `dst`, on this thread. All of them are in f32 or all in bf16.
pub(super) fn matmul_sum(dst: &mut MatMut<'_>, into: Into, terms: &[Term<'_>]) {
    for Term { lhs, rhs, .. } in terms {
        let ((rows, k), (rhs_k, cols)) = (lhs.dims(), rhs.dims());
        assert_eq!(
            (dst.rows, dst.cols, k),
            (rows, cols, rhs_k),
            "matmul shapes"
        );
    }
    assert!(!terms.is_empty(), "a sum of no products");
    if dst.rows == 0 || dst.cols == 0 {
        return;
    }
    let in_f32: Vec<_> = terms.iter().filter_map(Term::in_f32).collect();
    if in_f32.is_empty() {
        return bf16_sum(dst, into, terms);
    }
    assert_eq!(in_f32.len(), terms.len(), "a sum in f32 and bf16");
    f32_sum(dst, into, &in_f32);
}

/// Fewer rows are a matter of reading the right-hand side once; packing it would cost more than it saves.
const MIN_PACKED_ROWS: usize = 32;

fn f32_sum(dst: &mut MatMut<'_>, into: Into, terms: &[F32Term<'_>]) {
    #[cfg(target_arch = "x86_64")]
    if dst.rows >= MIN_PACKED_ROWS && packed::is_available() {
        // SAFETY: just checked.
        return unsafe { packed::product(dst, into, terms) };
    }
    sum_by_crate(dst, into, terms);
}

fn sum_by_crate(dst: &mut MatMut<'_>, into: Into, terms: &[F32Term<'_>]) {
    for (i, F32Term { lhs, rhs, factor }) in terms.iter().enumerate() {
        let into = if i == 0 { into } else { Into::Add };
        with_values(rhs, |rhs| matmul_by_crate(dst, into, *lhs, rhs, *factor));
    }
}

/// Whether the CPU here multiplies in bf16 faster than in f32.
pub fn is_bf16_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    return bf16::is_fast();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

fn bf16_sum(dst: &mut MatMut<'_>, into: Into, terms: &[Term<'_>]) {
    let reads_weight = terms.iter().any(|term| !matches!(term.rhs, Rhs::Mat(_)));
    if dst.rows < MIN_PACKED_ROWS && reads_weight {
        // Text is written so, token by token.
        let in_f32 = terms.iter().map(|term| term.with(term.lhs.unpacked()));
        return f32_sum(dst, into, &in_f32.collect::<Vec<_>>());
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(instructions) = bf16::available() {
        return bf16::product(instructions, dst, into, terms);
    }
    sum_of_rounded(dst, into, terms);
}

/// The same in f32, which makes the same products of the rounded numbers and sums them in another order.
fn sum_of_rounded(dst: &mut MatMut<'_>, into: Into, terms: &[Term<'_>]) {
    for (i, Term { lhs, rhs, factor }) in terms.iter().enumerate() {
        let lhs = lhs.unpacked();
        let (k, cols) = rhs.dims();
        let values = lhs.rounded(1.0);
        let rhs = with_values(rhs, |rhs| rhs.rounded(*factor));
        let into = if i == 0 { into } else { Into::Add };
        let term = F32Term {
            lhs: Mat::new(&values, lhs.rows, k),
            rhs: Mat::new(&rhs, k, cols).into(),
            factor: 1.0,
        };
        f32_sum(dst, into, &[term]);
    }
}

/// Lends `f` the values of `rhs`, all of them dequantized.
fn with_values<R>(rhs: &Rhs<'_>, f: impl FnOnce(Mat<'_>) -> R) -> R {
    let (window, is_transposed) = match rhs {
        Rhs::Mat(mat) => return f(*mat),
        Rhs::Weight(window) => (window, false),
        Rhs::Transposed(window) => (window, true),
    };
    with_scratch(|scratch| {
        let (outs, ins) = (window.outs.len(), window.ins.len());
        let tile = scratch.take(outs * ins);
        let (rows, cols) = (window.outs.clone(), window.ins.clone());
        window.weight.read_tile(rows, cols, tile);
        let tile = Mat::new(tile, outs, ins);
        f(if is_transposed { tile.t() } else { tile })
    })
}

fn matmul_by_crate(dst: &mut MatMut<'_>, into: Into, lhs: Mat<'_>, rhs: Mat<'_>, factor: f32) {
    // SAFETY: the views were checked against their data when they were made, and the caller checked that they fit.
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
struct Scratch(Vec<f32>);

impl Scratch {
    /// The first `len` values, which are whatever was left there.
    fn take(&mut self, len: usize) -> &mut [f32] {
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
fn with_scratch<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    let mut scratch = SCRATCH.take();
    let result = f(&mut scratch);
    SCRATCH.set(scratch);
    result
}

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
    // Of three units, the last of which may not be whole.
    let smallest = if beside < 4 { 0 } else { units / 3 };
    let wanted = 2 * rayon::current_num_threads();
    let shares = wanted.min(smallest).max(len.div_ceil(most));
    let start = move |share| len.min(UNIT * (units * share / shares));
    let shares = (0..shares).into_par_iter();
    shares.map(move |share| start(share)..start(share + 1))
}

/// Gives `f` tiles of the row-major `dst: [rows, cols]`, all of its rows and up to `widest` columns, in parallel.
pub(super) fn for_each_column_tile(
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
pub(super) fn for_each_row_tile(
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
pub(super) fn matmul_by_rows(
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
