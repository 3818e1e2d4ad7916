//! Matrix products on the CPU: checked views (`mat`), sums of products, and tiles of a result handed to threads (`tiles`).
//!
//! In f32 our own kernel makes them where there is AVX-512 (`kernel`, `packed`), elsewhere the crate `gemm`. In bf16, with sums
//! in f32, they are made by AMX or AVX512-BF16 (`bf16`), elsewhere in f32 of rounded numbers.

#[cfg(target_arch = "x86_64")]
mod bf16;
#[cfg(target_arch = "x86_64")]
mod kernel;
mod mat;
#[cfg(target_arch = "x86_64")]
mod packed;
#[cfg(target_arch = "x86_64")]
mod pieces;
#[cfg(test)]
mod tests;
mod tiles;

use std::cell::Cell;
use std::ops::Range;

use gemm::Parallelism;

use crate::device::ComputeDtype;
use crate::quant::FrozenWeight;

pub(super) use mat::{Mat, MatMut, Shared};
pub(super) use tiles::{for_each_column_tile, for_each_row_tile, matmul_by_rows};

/// The left-hand side of a product, which decides in what numbers the product is made.
#[derive(Clone, Copy)]
pub(super) enum Lhs<'a> {
    F32(Mat<'a>),
    /// Both sides are rounded to bf16 as they are read; sums are in f32.
    Bf16(Mat<'a>),
    /// The same, of a side that was rounded before: where instructions for bf16 are missing ...
    Rounded(Mat<'a>),
    /// ... and where they are there.
    #[cfg(target_arch = "x86_64")]
    Packed(&'a bf16::PackedLhs),
}

impl<'a> Mat<'a> {
    /// As the left-hand side of a product in `dtype`.
    pub(super) fn to(self, dtype: ComputeDtype) -> Lhs<'a> {
        match dtype {
            ComputeDtype::F32 => Lhs::F32(self),
            ComputeDtype::Bf16 => Lhs::Bf16(self),
        }
    }

    /// Writes its values, each multiplied by `factor` and then rounded to bf16, row-major.
    fn round_to(self, factor: f32, rounded: &mut [f32]) {
        let at = |row, col| self.data[row * self.row_stride + col * self.col_stride];
        for (row, rounded) in rounded.chunks_exact_mut(self.cols.max(1)).enumerate() {
            for (col, rounded) in rounded.iter_mut().enumerate() {
                *rounded = round(factor * at(row, col));
            }
        }
    }

    /// Those values.
    fn rounded(self, factor: f32) -> Vec<f32> {
        let mut rounded = vec![0.0; self.rows * self.cols];
        self.round_to(factor, &mut rounded);
        rounded
    }
}

fn round(value: f32) -> f32 {
    half::bf16::from_f32(value).to_f32()
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
            Self::F32(mat) | Self::Bf16(mat) | Self::Rounded(mat) => mat,
            #[cfg(target_arch = "x86_64")]
            Self::Packed(_) => unreachable!("it is packed"),
        }
    }

    fn dims(&self) -> (usize, usize) {
        match self {
            Self::F32(mat) | Self::Bf16(mat) | Self::Rounded(mat) => (mat.rows, mat.cols),
            #[cfg(target_arch = "x86_64")]
            Self::Packed(packed) => packed.dims(),
        }
    }
}

/// A matrix that is the left-hand side of many products: for those in bf16 it is packed or rounded once, unless it has few
/// rows.
pub(super) struct SharedLhs<'a> {
    mat: Mat<'a>,
    dtype: ComputeDtype,
    rounded: Option<Vec<f32>>,
    #[cfg(target_arch = "x86_64")]
    packed: Option<bf16::PackedLhs>,
}

impl<'a> SharedLhs<'a> {
    pub(super) fn new(mat: Mat<'a>, dtype: ComputeDtype) -> Self {
        Self {
            mat,
            dtype,
            rounded: is_rounded(mat.rows, dtype).then(|| mat.rounded(1.0)),
            #[cfg(target_arch = "x86_64")]
            packed: is_packed(mat.rows, dtype).then(|| bf16::PackedLhs::new(mat)),
        }
    }

    pub(super) fn lhs(&self) -> Lhs<'_> {
        #[cfg(target_arch = "x86_64")]
        if let Some(packed) = &self.packed {
            return Lhs::Packed(packed);
        }
        match &self.rounded {
            Some(rounded) => Lhs::Rounded(Mat::new(rounded, self.mat.rows, self.mat.cols)),
            None => self.mat.to(self.dtype),
        }
    }
}

/// Whether a left-hand side that products share is packed for them.
fn is_packed(rows: usize, dtype: ComputeDtype) -> bool {
    is_prepared(rows, dtype) && has_bf16()
}

/// Whether it is rounded, for want of instructions that read it packed.
fn is_rounded(rows: usize, dtype: ComputeDtype) -> bool {
    is_prepared(rows, dtype) && !has_bf16()
}

fn is_prepared(rows: usize, dtype: ComputeDtype) -> bool {
    dtype == ComputeDtype::Bf16 && rows >= MIN_PACKED_ROWS
}

/// Whether there are instructions that multiply in bf16.
fn has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return bf16::available().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Bytes that the CPU packs or rounds of a left-hand side `[rows, k]` for all of its products in `dtype`, while they last.
pub fn packed_lhs_bytes(rows: usize, k: usize, dtype: ComputeDtype) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_packed(rows, dtype) {
        return bf16::PackedLhs::bytes(rows, k);
    }
    match is_rounded(rows, dtype) {
        true => (4 * rows * k) as u64,
        false => 0,
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

/// Steps of a product that are rounded at a time where instructions for bf16 are missing.
const ROUNDED_STEPS: usize = 256;

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
fn sum_of_rounded(dst: &mut MatMut<'_>, mut into: Into, terms: &[Term<'_>]) {
    for Term { lhs, rhs, factor } in terms {
        let k = rhs.dims().0;
        // A part of a matrix is rounded at a time, of a weight all that is dequantized.
        let steps = match rhs {
            Rhs::Mat(_) => ROUNDED_STEPS,
            Rhs::Weight(_) | Rhs::Transposed(_) => k.max(1),
        };
        for start in (0..k.max(1)).step_by(steps) {
            let part = start..k.min(start + steps);
            let rhs = match rhs {
                Rhs::Mat(mat) => Rhs::Mat(mat.rows(part.clone())),
                weight => weight.clone(),
            };
            let columns = lhs.unpacked().t().rows(part).t();
            let values;
            let lhs = match lhs {
                Lhs::Rounded(_) => columns,
                _ => {
                    values = columns.rounded(1.0);
                    Mat::new(&values, columns.rows, columns.cols)
                }
            };
            with_rounded(&rhs, *factor, |rhs| {
                let rhs = rhs.into();
                let factor = 1.0;
                f32_sum(dst, into, &[F32Term { lhs, rhs, factor }]);
            });
            into = Into::Add;
        }
    }
}

/// Lends `f` the values of `rhs`, all of them dequantized.
fn with_values<R>(rhs: &Rhs<'_>, f: impl FnOnce(Mat<'_>) -> R) -> R {
    match rhs {
        Rhs::Mat(mat) => f(*mat),
        Rhs::Weight(window) | Rhs::Transposed(window) => with_scratch(|scratch| {
            let tile = dequantize(window, scratch);
            f(oriented(rhs, tile))
        }),
    }
}

/// The same of the values multiplied by `factor` and then rounded to bf16.
fn with_rounded<R>(rhs: &Rhs<'_>, factor: f32, f: impl FnOnce(Mat<'_>) -> R) -> R {
    with_scratch(|scratch| match rhs {
        Rhs::Mat(mat) => {
            let rounded = scratch.take(mat.rows * mat.cols);
            mat.round_to(factor, rounded);
            f(Mat::new(rounded, mat.rows, mat.cols))
        }
        Rhs::Weight(window) | Rhs::Transposed(window) => {
            let tile = dequantize(window, scratch);
            tile.iter_mut()
                .for_each(|value| *value = round(factor * *value));
            f(oriented(rhs, tile))
        }
    })
}

/// The values of a window, `[outs, ins]`.
fn dequantize<'s>(window: &Window<'_>, scratch: &'s mut Scratch) -> &'s mut [f32] {
    let tile = scratch.take(window.outs.len() * window.ins.len());
    let (rows, cols) = (window.outs.clone(), window.ins.clone());
    window.weight.read_tile(rows, cols, tile);
    tile
}

/// The values of a window as `rhs` has them.
fn oriented<'s>(rhs: &Rhs<'_>, tile: &'s [f32]) -> Mat<'s> {
    let (k, cols) = rhs.dims();
    match rhs {
        Rhs::Transposed(_) => Mat::new(tile, cols, k).t(),
        _ => Mat::new(tile, k, cols),
    }
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
