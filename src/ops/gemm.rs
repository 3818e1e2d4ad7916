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
    /// The same, of a side that was rounded before.
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
