//! The adapter's products with an input that dropout has masked, `x' = keep_scale mask x`:
//! `u = x' A^T`, `dA += du^T x'`, `dx += keep_scale mask (du A)`.
//!
//! On the CPU a block of the input is masked into scratch that stays in the cache and multiplied at once; on a device the
//! kernels of `cuda/lora.cu` mask it in registers. No mask and no masked input is ever whole.

use std::cell::Cell;
use std::ops::Range;

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::super::dropout::Mask;
use super::super::gemm::{Into, Mat, MatMut, Shared, for_each_column_tile, matmul};
use super::super::launcher::{Grid, Launcher, Operand};
use super::tile_width;
use crate::Result;

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
}

impl Masked<'_> {
    /// Writes the kept elements of these rows and columns, row-major and without gaps.
    fn read(&self, rows: Range<usize>, cols: Range<usize>, block: &mut [f32]) {
        for (row, block) in rows.zip(block.chunks_exact_mut(cols.len())) {
            let first = row * self.cols + cols.start;
            let x = &self.x[first..first + cols.len()];
            self.mask.keep(first, x, block);
        }
    }
}

/// `u = x' A^T`.
///
/// # Shapes
/// `x: [N, in]`, `a: [R, in]`, `u: [N, R]`.
pub(super) fn down_project(x: Masked<'_>, a: Mat<'_>, u: &mut [f32]) {
    let r = a.rows;
    let tasks = u.par_chunks_mut((BLOCK * r).max(1)).enumerate();
    tasks.for_each(|(task, u)| {
        let rows = task * BLOCK..task * BLOCK + u.len() / r;
        let mut u = MatMut::new(u, rows.len(), r);
        for ins in blocks(x.cols) {
            with_block(|block| {
                x.read(rows.clone(), ins.clone(), block);
                let into = if ins.start == 0 {
                    Into::Overwrite
                } else {
                    Into::Add
                };
                let block = Mat::new(block, rows.len(), ins.len());
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
    for_each_column_tile(
        Shared::new(d_a),
        dims,
        tile_width(x.cols),
        |mut tile, ins| {
            for rows in blocks(du.rows) {
                with_block(|block| {
                    x.read(rows.clone(), ins.clone(), block);
                    let block = Mat::new(block, rows.len(), ins.len());
                    let du = du.rows(rows).t();
                    matmul(&mut tile, Into::Add, du, block, x.mask.keep_scale());
                });
            }
        },
    );
}

/// `dx += keep_scale mask (du A)` for the columns `ins` of `dx: [N, in]`, at most [`BLOCK`] of them.
///
/// # Shapes
/// `du: [N, R]`, `a: [R, in]`, `dx: [N, ins]`.
pub(super) fn add_up_project(
    du: Mat<'_>,
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
                du.rows(rows.clone()),
                a.cols(ins.clone()),
                mask.keep_scale(),
            );
            for (row, product) in rows.clone().zip(block.chunks_exact(ins.len())) {
                mask.add_kept(row * a.cols + ins.start, product, dx.row(row));
            }
        });
    }
}

/// Ranks that a block of the kernels takes.
const RANKS: usize = 64;
/// Rows of a block of the kernel for `u`, and columns of `x` that it takes at a time.
const DOWN: (usize, usize) = (64, 128);
/// Columns of a block of the kernel for `dA`, and rows of `x` that it takes at a time.
const GRAD_A: (usize, usize) = (128, 32);

/// The last arguments of the kernels.
pub(super) fn mask_operands(mask: &Mask) -> [Operand<'static>; 6] {
    let words = [mask.key, mask.stream].concat();
    let [k0, k1, s0, s1] = std::array::from_fn(|i| Operand::U32(words[i] as usize));
    let threshold = Operand::U32(mask.threshold as usize);
    [k0, k1, s0, s1, threshold, Operand::F32(mask.keep_scale())]
}

/// In how many parts the sum for `u` is taken.
fn down_splits(n: usize, d: usize, r: usize) -> usize {
    splits(n.div_ceil(DOWN.0) * r.div_ceil(RANKS), d.div_ceil(DOWN.1))
}

/// In how many parts the sum for `dA` is taken.
fn grad_a_splits(n: usize, d: usize, r: usize) -> usize {
    splits(
        d.div_ceil(GRAD_A.0) * r.div_ceil(RANKS),
        n.div_ceil(GRAD_A.1),
    )
}

/// In how many parts a sum along `steps` is taken where `blocks` blocks would leave processors idle.
pub(super) fn splits(blocks: usize, steps: usize) -> usize {
    /// Blocks that fill a large GPU: a constant, so that no result depends on the one at hand.
    const BLOCKS: usize = 128;
    (BLOCKS / blocks.max(1)).clamp(1, steps.max(1))
}

/// Room for the parts of a result of `count` elements.
fn partial(launcher: &Launcher, splits: usize, count: usize) -> Result<Option<Tensor>> {
    (splits > 1)
        .then(|| launcher.empty(splits * count, DType::F32))
        .transpose()
}

/// Bytes of those parts, for `u` and for `dA`.
pub(super) fn partial_bytes(n: usize, d: usize, r: usize) -> [u64; 2] {
    let bytes = |splits: usize, count: usize| match splits {
        1 => 0,
        _ => (4 * splits * count) as u64,
    };
    [
        bytes(down_splits(n, d, r), n * r),
        bytes(grad_a_splits(n, d, r), r * d),
    ]
}

/// Adds up the parts.
fn sum_splits(
    launcher: &Launcher,
    kernel: &str,
    (splits, partial): (usize, Option<Tensor>),
    result: &Tensor,
) -> Result<()> {
    let Some(partial) = partial else {
        return Ok(());
    };
    let count = result.elem_count();
    let operands = [
        Operand::Read(&partial),
        Operand::U32(splits),
        Operand::U64(count),
        Operand::Write(result),
    ];
    // SAFETY: `partial` has `count` elements for each part.
    unsafe { launcher.launch(kernel, launcher.grid_stride(count, 1), &operands) }
}

/// `u = x' A^T` on a device.
///
/// # Shapes
/// `x: [N, in]`, `a: [R, in]` -> `u: [N, R]`, all in bf16.
pub(super) fn down_project_on_device(
    launcher: &Launcher,
    x: &Tensor,
    a: &Tensor,
    mask: &Mask,
) -> Result<Tensor> {
    const THREADS: u32 = 512;
    let ((n, d), r) = (x.dims2()?, a.dim(0)?);
    let u = launcher.empty((n, r), DType::BF16)?;
    let blocks = n.div_ceil(DOWN.0) * r.div_ceil(RANKS);
    let splits = down_splits(n, d, r);
    let partial = partial(launcher, splits, n * r)?;
    let mut operands = vec![Operand::Read(x), Operand::Read(a)];
    operands.extend([n, d, r].map(Operand::U32));
    operands.push(Operand::Write(&u));
    operands.push(partial.as_ref().map_or(Operand::Null, Operand::Write));
    operands.extend(mask_operands(mask));
    let grid = Grid::blocks(blocks, splits).with_threads(THREADS);
    // SAFETY: the tensors have these sizes, and there is room for the parts of each split.
    unsafe { launcher.launch("lora_down_bf16", grid, &operands)? };
    sum_splits(launcher, "lora_down_sum_bf16", (splits, partial), &u)?;
    Ok(u)
}

/// `dA += du^T x'` on a device.
///
/// # Shapes
/// `x: [N, in]`, `du: [N, R]` in bf16, `d_a: [R, in]` in f32.
pub(super) fn add_grad_a_on_device(
    launcher: &Launcher,
    x: &Tensor,
    du: &Tensor,
    mask: &Mask,
    d_a: &Tensor,
) -> Result<()> {
    let ((n, d), r) = (x.dims2()?, du.dim(1)?);
    let blocks = d.div_ceil(GRAD_A.0) * r.div_ceil(RANKS);
    let splits = grad_a_splits(n, d, r);
    let partial = partial(launcher, splits, r * d)?;
    let mut operands = vec![Operand::Read(x), Operand::Read(du)];
    operands.extend([n, d, r].map(Operand::U32));
    operands.push(Operand::Write(d_a));
    operands.push(partial.as_ref().map_or(Operand::Null, Operand::Write));
    operands.extend(mask_operands(mask));
    // SAFETY: as in `down_project_on_device`.
    unsafe { launcher.launch("lora_grad_a_bf16", Grid::blocks(blocks, splits), &operands)? };
    sum_splits(launcher, "lora_grad_a_sum_f32", (splits, partial), d_a)
}

/// `dx += keep_scale mask (du A)` on a device.
///
/// # Shapes
/// `du: [N, R]`, `a: [R, in]`, `dx: [N, in]`, all in bf16.
pub(super) fn add_up_project_on_device(
    launcher: &Launcher,
    du: &Tensor,
    a: &Tensor,
    mask: &Mask,
    dx: &Tensor,
) -> Result<()> {
    const ROWS: usize = 64;
    const COLS: usize = 128;
    let ((n, r), d) = (du.dims2()?, a.dim(1)?);
    let mut operands = vec![Operand::Read(du), Operand::Read(a)];
    operands.extend([n, d, r].map(Operand::U32));
    operands.push(Operand::Write(dx));
    operands.extend(mask_operands(mask));
    let grid = Grid::blocks(d.div_ceil(COLS), n.div_ceil(ROWS));
    // SAFETY: the tensors have these sizes.
    unsafe { launcher.launch("lora_up_bf16", grid, &operands) }
}
