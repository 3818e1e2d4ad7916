//! Sums of products in bf16 with sums in f32: `dst = sum of lhs_t rhs_t`, by AMX (`amx`) or AVX512-BF16 (`avx512`).
//!
//! Both multiply pairs of numbers along k, so both sides are packed in steps of 32 along k, each in lines of 32 numbers. A step
//! of the left-hand side has a line for each of 32 rows; a step of the right-hand side has two for each of 16 pairs, which hold
//! that pair of 32 columns. A term has steps of its own: what it lacks in its last one is zero on both sides.
//!
//! The right-hand side is packed in blocks that stay in the L2 cache (weights are dequantized into them); every 32 rows of the
//! left-hand side meet such a block.

mod amx;
mod avx512;

use std::arch::x86_64::*;
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::OnceLock;

use rayon::prelude::*;

use super::kernel::{LANES, mask, transpose};
use super::pieces::{Strips, blocks, for_each_piece, parts};
use super::{Into, Lhs, Mat, MatMut, Scratch, Term};

/// Numbers of a line: the k of a step.
const STEP: usize = 32;
/// Lines of a step, of either side.
const LINES: usize = 32;
/// Rows of a group of the left-hand side, and columns of a panel of the right-hand one.
const GROUP: usize = 32;
/// Columns of a block.
const BLOCK_COLS: usize = 256;
/// Steps of a block, at most: with as many columns, half of the L2 cache of a Zen 4.
const MAX_STEPS: usize = 32;

/// The bits of 32 numbers, a cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u16; STEP]);

impl Line {
    const ZERO: Self = Self([0; STEP]);
}

/// What a processor multiplies by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Instructions {
    Amx,
    Avx512Bf16,
}

/// The fastest that this processor has, and the system lets us use.
pub(super) fn available() -> Option<Instructions> {
    static AVAILABLE: OnceLock<Option<Instructions>> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        let has_avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16");
        let fastest = match amx::is_available() {
            true => Instructions::Amx,
            false => Instructions::Avx512Bf16,
        };
        // Both pack by AVX-512.
        has_avx512.then_some(fastest)
    })
}

/// Whether that is faster than f32, which AVX512-BF16 is on AMD's processors alone.
pub(super) fn is_fast() -> bool {
    /// "AuthenticAMD", as the processor spells it.
    const AMD: [u32; 3] = [0x6874_7541, 0x6974_6e65, 0x444d_4163];
    let id = __cpuid(0);
    match available() {
        Some(Instructions::Amx) => true,
        Some(Instructions::Avx512Bf16) => [id.ebx, id.edx, id.ecx] == AMD,
        None => false,
    }
}

/// A tile of the result in memory, at most 32 x 32.
#[derive(Clone, Copy)]
struct Tile {
    at: *mut f32,
    row_stride: usize,
    rows: usize,
    cols: usize,
    /// Whether the product is added to what is there.
    add: bool,
}

/// A left-hand side that all threads have rounded and packed: groups of rows, each `[steps][LINES]`.
pub(in super::super) struct PackedLhs {
    lines: Vec<Line>,
    rows: usize,
    k: usize,
}

impl PackedLhs {
    /// Where there are instructions that read it.
    pub(super) fn new(mat: Mat<'_>) -> Self {
        assert!(available().is_some(), "nothing reads what is packed");
        let len = mat.cols.div_ceil(STEP) * LINES;
        let n = mat.rows.div_ceil(GROUP) * len;
        let mut lines = Vec::with_capacity(n);
        let groups = lines.spare_capacity_mut()[..n].par_chunks_exact_mut(len.max(1));
        groups.enumerate().for_each(|(group, lines)| {
            let rows = group * GROUP..mat.rows.min((group + 1) * GROUP);
            // SAFETY: the instructions are there, as was checked.
            unsafe { pack_lhs(mat.rows(rows), lines) };
        });
        // SAFETY: every group was written.
        unsafe { lines.set_len(n) };
        let Mat { rows, cols: k, .. } = mat;
        Self { lines, rows, k }
    }

    /// The size of one.
    pub(super) fn bytes(rows: usize, k: usize) -> u64 {
        let lines = rows.div_ceil(GROUP) * k.div_ceil(STEP) * LINES;
        (lines * size_of::<Line>()) as u64
    }

    pub(super) fn dims(&self) -> (usize, usize) {
        (self.rows, self.k)
    }

    /// Some steps of a group.
    fn steps(&self, group: usize, steps: Range<usize>) -> &[Line] {
        let first = group * self.k.div_ceil(STEP);
        &self.lines[(first + steps.start) * LINES..(first + steps.end) * LINES]
    }
}

/// What a thread packs into.
#[derive(Default)]
struct Buffers {
    lhs: Vec<Line>,
    rhs: Vec<Line>,
    /// Dequantized weights before they are packed.
    weight: Scratch,
}

thread_local! {
    static BUFFERS: Cell<Buffers> = Cell::default();
}

/// `dst = sum of the terms`, or the same added, by instructions that are [`available`]; the terms fit `dst`.
pub(super) fn product(
    instructions: Instructions,
    dst: &mut MatMut<'_>,
    into: Into,
    terms: &[Term<'_>],
) {
    let _tiles = (instructions == Instructions::Amx).then(amx::Tiles::new);
    let all: usize = terms.iter().map(steps_of).sum();
    // Equal blocks.
    let block_steps = all.div_ceil(all.div_ceil(MAX_STEPS).max(1)).max(1);
    let mut buffers = BUFFERS.take();
    for (cols, steps) in blocks(dst.cols, BLOCK_COLS, all, block_steps) {
        let block = Block {
            terms,
            cols,
            add: into == Into::Add || steps.start > 0,
            steps,
        };
        // SAFETY: the instructions are there, and the tiles configured.
        unsafe { block.multiply(instructions, dst, &mut buffers) };
    }
    BUFFERS.set(buffers);
}

fn steps_of(term: &Term<'_>) -> usize {
    term.k().div_ceil(STEP)
}

/// Some columns of a sum of products, over some steps of the terms' joined k.
struct Block<'a> {
    terms: &'a [Term<'a>],
    cols: Range<usize>,
    steps: Range<usize>,
    add: bool,
}

impl Block<'_> {
    /// # Safety
    /// The processor has the instructions; for AMX, its tiles are configured.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn multiply(
        &self,
        instructions: Instructions,
        dst: &mut MatMut<'_>,
        buffers: &mut Buffers,
    ) {
        let Buffers { lhs, rhs, weight } = buffers;
        let panel_lines = self.steps.len() * LINES;
        grow(rhs, self.cols.len().div_ceil(GROUP) * panel_lines);
        grow(lhs, panel_lines);
        let mut at = 0;
        for (term, steps) in self.parts() {
            self.pack_rhs(term, steps.clone(), &mut rhs[at * LINES..], weight);
            at += steps.len();
        }
        for (group, row) in (0..dst.rows).step_by(GROUP).enumerate() {
            let rows = row..dst.rows.min(row + GROUP);
            let mut parts: Vec<&[Line]> = Vec::with_capacity(self.terms.len());
            let mut free = &mut lhs[..];
            for (term, steps) in self.parts() {
                parts.push(match term.lhs {
                    Lhs::Packed(packed) => packed.steps(group, steps),
                    Lhs::Bf16(lhs) | Lhs::Rounded(lhs) | Lhs::F32(lhs) => {
                        let (lines, rest) = free.split_at_mut(steps.len() * LINES);
                        free = rest;
                        let k = within(&steps, lhs.cols);
                        pack_lhs(lhs.rows(rows.clone()).cols(k), as_uninit(lines));
                        lines
                    }
                });
            }
            for (panel, col) in self.cols.clone().step_by(GROUP).enumerate() {
                let tile = Tile {
                    at: dst.data.wrapping_add(row * dst.row_stride + col),
                    row_stride: dst.row_stride,
                    rows: rows.len(),
                    cols: GROUP.min(self.cols.end - col),
                    add: self.add,
                };
                let rhs = &rhs[panel * panel_lines..][..panel_lines];
                // SAFETY: as the caller promises; the tile lies in `dst`, and both sides hold the same steps.
                unsafe {
                    match instructions {
                        Instructions::Amx => amx::multiply(&parts, rhs, tile),
                        Instructions::Avx512Bf16 => avx512::multiply(&parts, rhs, tile),
                    }
                }
            }
        }
    }

    /// The terms that have a part in these steps, each with its own steps.
    fn parts(&self) -> impl Iterator<Item = (&Term<'_>, Range<usize>)> {
        parts(self.terms, steps_of, &self.steps)
    }

    /// Packs the part `steps` of a term; the panels' own parts begin with the first of `lines`.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn pack_rhs(
        &self,
        term: &Term<'_>,
        steps: Range<usize>,
        lines: &mut [Line],
        scratch: &mut Scratch,
    ) {
        // A strip of 32 KiB, at most, stays in the L1 cache.
        let strips = Strips {
            mat: STEP,
            weight: STEP,
            transposed: 8 * STEP,
        };
        let panel_lines = self.steps.len() * LINES;
        let k = within(&steps, term.k());
        for_each_piece(
            &term.rhs,
            (&k, &self.cols),
            GROUP,
            strips,
            scratch,
            |k, panel, piece| {
                let first = panel * panel_lines + k / STEP * LINES;
                pack_panel(piece.t(), term.factor, &mut lines[first..]);
            },
        );
    }
}

/// The k of some steps, of `k` in all.
fn within(steps: &Range<usize>, k: usize) -> Range<usize> {
    steps.start * STEP..k.min(steps.end * STEP)
}

fn grow(lines: &mut Vec<Line>, len: usize) {
    if lines.len() < len {
        lines.resize(len, Line::ZERO);
    }
}

fn as_uninit(lines: &mut [Line]) -> &mut [MaybeUninit<Line>] {
    // SAFETY: the same memory; `pack_lhs` only writes whole lines to it.
    unsafe { &mut *(std::ptr::from_mut(lines) as *mut [MaybeUninit<Line>]) }
}

/// Packs up to 32 rows; writes all lines of their steps.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pack_lhs(rows: Mat<'_>, lines: &mut [MaybeUninit<Line>]) {
    let steps = lines.chunks_exact_mut(LINES).zip(halves(rows));
    for (lines, halves) in steps {
        for (lines, half) in lines.chunks_exact_mut(LANES).zip(halves) {
            for (line, values) in lines.iter_mut().zip(by_lane(half, 1.0)) {
                line.write(as_line(values));
            }
        }
    }
}

/// Packs up to 32 columns, `lanes: [cols, k]`, each number multiplied by `factor` before it is rounded.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pack_panel(lanes: Mat<'_>, factor: f32, lines: &mut [Line]) {
    for (lines, halves) in lines.chunks_exact_mut(LINES).zip(halves(lanes)) {
        for (half, block) in halves.into_iter().enumerate() {
            for (pair, values) in by_pair(block, factor).into_iter().enumerate() {
                lines[2 * pair + half] = as_line(values);
            }
        }
    }
}

/// Each step of up to 32 lanes, as two halves of 16 lanes.
fn halves(lanes: Mat<'_>) -> impl Iterator<Item = [Mat<'_>; 2]> {
    (0..lanes.cols).step_by(STEP).map(move |k| {
        let step = lanes.cols(k..lanes.cols.min(k + STEP));
        let middle = step.rows.min(LANES);
        [step.rows(0..middle), step.rows(middle..step.rows)]
    })
}

fn as_line(values: __m512i) -> Line {
    // SAFETY: both are 64 bytes of plain data.
    unsafe { std::mem::transmute::<__m512i, Line>(values) }
}

/// A block of up to 16 lanes (rows of a left-hand side, columns of a right-hand one) and up to 32 of k, `[lanes, k]`, times
/// `factor` and in bf16: a vector for each lane, with zeros for what the block lacks.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn by_lane(block: Mat<'_>, factor: f32) -> [__m512i; LANES] {
    match block.col_stride {
        1 => read_lanes(block, factor),
        _ => turned(read_pairs(block, factor)),
    }
}

/// The same with a vector for each pair along k.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn by_pair(block: Mat<'_>, factor: f32) -> [__m512i; LANES] {
    match block.col_stride {
        1 => turned(read_lanes(block, factor)),
        _ => read_pairs(block, factor),
    }
}

/// A block whose lanes are in one piece.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn read_lanes(block: Mat<'_>, factor: f32) -> [__m512i; LANES] {
    assert!(block.rows <= LANES && block.cols <= STEP);
    let factor = _mm512_set1_ps(factor);
    let (low, high) = (mask(block.cols), mask(block.cols.saturating_sub(LANES)));
    let mut lanes = [_mm512_setzero_si512(); LANES];
    for (lane, vector) in lanes.iter_mut().enumerate().take(block.rows) {
        let at = block.data.as_ptr().wrapping_add(lane * block.row_stride);
        // SAFETY: the masks leave elements of the block.
        unsafe {
            let low = _mm512_maskz_loadu_ps(low, at);
            let high = _mm512_maskz_loadu_ps(high, at.wrapping_add(LANES));
            *vector = round_pair(_mm512_mul_ps(low, factor), _mm512_mul_ps(high, factor));
        }
    }
    lanes
}

/// A block that has each k of its lanes in one piece.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn read_pairs(block: Mat<'_>, factor: f32) -> [__m512i; LANES] {
    assert!(block.rows <= LANES && block.cols <= STEP);
    assert_eq!(
        block.row_stride, 1,
        "a matrix with gaps in its rows and columns"
    );
    let (factor, interleave) = (_mm512_set1_ps(factor), interleave());
    let all = mask(block.rows);
    let mut pairs = [_mm512_setzero_si512(); LANES];
    for (pair, vector) in pairs.iter_mut().enumerate().take(block.cols.div_ceil(2)) {
        let even = block
            .data
            .as_ptr()
            .wrapping_add(2 * pair * block.col_stride);
        let odd = even.wrapping_add(block.col_stride);
        let of_odd = if 2 * pair + 1 < block.cols { all } else { 0 };
        // SAFETY: the masks leave elements of the block.
        unsafe {
            let even = _mm512_mul_ps(_mm512_maskz_loadu_ps(all, even), factor);
            let odd = _mm512_mul_ps(_mm512_maskz_loadu_ps(of_odd, odd), factor);
            *vector = _mm512_permutexvar_epi16(interleave, round_pair(even, odd));
        }
    }
    pairs
}

/// Transposes 16 x 16 pairs.
#[inline]
#[target_feature(enable = "avx512f")]
fn turned(vectors: [__m512i; LANES]) -> [__m512i; LANES] {
    // SAFETY: vectors of the same bits.
    unsafe {
        let vectors = std::mem::transmute::<[__m512i; LANES], [__m512; LANES]>(vectors);
        std::mem::transmute::<[__m512; LANES], [__m512i; LANES]>(transpose(vectors))
    }
}

/// 32 numbers in bf16, to the nearest, to even between two.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn round_pair(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both are 64 bytes of plain data.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// Where the lanes 0, 16, 1, 17, ... come from.
#[inline]
#[target_feature(enable = "avx512f")]
fn interleave() -> __m512i {
    let indices: [u16; STEP] = std::array::from_fn(|i| (i / 2 + i % 2 * LANES) as u16);
    // SAFETY: 64 bytes are read of as many.
    unsafe { _mm512_loadu_si512(indices.as_ptr().cast()) }
}
