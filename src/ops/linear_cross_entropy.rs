//! The output head and the loss in one: `loss = sum over rows of (logsumexp(z) - z_label)`, `z = x W^T`, which some models cap.
//!
//! Backward: `dz = d_loss (softmax(z) - onehot(label))`, times the slope of the cap, `dx = dz W`, and `dW = dz^T x` where the head
//! is trained. Rows go through in chunks and `dz` takes the place of `z`, so that the `[N, V]` logits never exist; rows without
//! a label are left out before.
//!
//! Source: arXiv:2411.09009.

mod kernels;

use std::cell::Cell;
use std::ops::Range;

use candle_core::{D, Tensor};
use rayon::prelude::*;

use super::cpu::{self, expect_dims, read};
use super::gemm::{Into, Mat, MatMut, Shared, SharedLhs, for_each_column_tile, matmul};
use super::launcher::Launcher;
use super::simd::{exp, max, sum, vectorized};
use super::soft_cap::SoftCap;
use super::table::{CpuTable, Table};
use super::weight::Weight;
use crate::device::ComputeDtype;
use crate::{Error, IGNORE_INDEX, Result};

const OP: &str = "linear_cross_entropy";

/// Bytes of one chunk's logits, at most.
const CHUNK_BYTES: usize = 64 << 20;
const MAX_CHUNK_ROWS: usize = 1024;
/// Words of the vocabulary whose logits lie together: rows of a whole vocabulary would each start on another page.
const VOCAB_TILE: usize = 512;
/// Columns of `dx` made at a time, at most.
const HIDDEN_TILE: usize = 384;

thread_local! {
    /// A chunk's logits, kept from one batch to the next: the pages of new memory have to be zeroed (2 % of a step).
    static LOGITS: Cell<Vec<f32>> = Cell::default();
}

/// What makes logits of the last norm's output.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    pub table: Table<'a>,
    /// What the logits may be at most.
    pub soft_cap: Option<SoftCap>,
}

impl<'a> From<Table<'a>> for Head<'a> {
    fn from(table: Table<'a>) -> Self {
        let soft_cap = None;
        Self { table, soft_cap }
    }
}

impl<'a> From<&'a Weight> for Head<'a> {
    fn from(weight: &'a Weight) -> Self {
        Table::from(weight).into()
    }
}

impl<'a> Head<'a> {
    fn on_cpu(self) -> Result<CpuHead<'a>> {
        Ok(CpuHead {
            table: self.table.on_cpu(OP)?,
            soft_cap: self.soft_cap,
        })
    }
}

/// A head in host memory.
struct CpuHead<'a> {
    table: CpuTable<'a>,
    soft_cap: Option<SoftCap>,
}

/// The loss of one row that has a label.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLoss {
    pub row: usize,
    pub label: u32,
    /// Minus the log-probability of the label.
    pub loss: f32,
    /// The largest probability and its token (the lowest of equals).
    pub confidence: f32,
    pub prediction: u32,
}

/// Rows of a vocabulary of `vocab` whose logits are there at a time, on the CPU.
pub fn chunk_rows(vocab: usize) -> usize {
    (CHUNK_BYTES / (4 * vocab)).clamp(16, MAX_CHUNK_ROWS)
}

/// The same on a device.
pub fn chunk_rows_on_device(vocab: usize) -> usize {
    kernels::chunk_rows(vocab)
}

/// The losses of a batch, in row order; on a device they stay there until they are read.
#[derive(Debug)]
pub struct Losses(Origin);

#[derive(Debug)]
enum Origin {
    Host(Vec<TokenLoss>),
    Device(Vec<(usize, u32)>, kernels::DeviceLosses),
}

impl Losses {
    /// Waits for the device, where they are on one.
    pub fn read(self) -> Result<Vec<TokenLoss>> {
        match self.0 {
            Origin::Host(losses) => Ok(losses),
            Origin::Device(rows, losses) => losses.read(&rows),
        }
    }
}

/// The sum of losses, in row order and f64.
pub fn total(losses: &[TokenLoss]) -> f64 {
    losses.iter().map(|t| f64::from(t.loss)).sum()
}

/// The loss of each row of `x` whose label is not [`IGNORE_INDEX`], in row order.
///
/// # Shapes
/// `x: [N, D]`, `head: [V, D]`, `labels: [N]`.
///
/// # Errors
/// [`Error::Shape`] for a label that is not below V.
pub fn forward<'a>(
    x: &Tensor,
    head: impl std::convert::Into<Head<'a>>,
    labels: &[i64],
) -> Result<Losses> {
    let _span = tracing::trace_span!("loss").entered();
    let head = head.into();
    let rows = labelled_rows(x, head.table, labels)?;
    if let Some(launcher) = Launcher::of(OP, x)? {
        let losses = kernels::forward(&launcher, x, head, &rows)?;
        return Ok(Losses(Origin::Device(rows, losses)));
    }
    let (x, head) = (read(OP, x)?, head.on_cpu()?);
    let mut losses = Vec::with_capacity(rows.len());
    for_each_chunk(&x, &head, &rows, |chunk, _| {
        losses.extend(chunk.losses);
    });
    Ok(Losses(Origin::Host(losses)))
}

/// The losses, and `dx` for the gradient `d_loss` of each; adds the head's gradient to `d_head`, if there is one.
///
/// # Shapes
/// As [`forward`]; `dx: [N, D]`, zero in rows without a label; `d_head: [V, D]` in f32.
pub fn backward<'a>(
    x: &Tensor,
    head: impl std::convert::Into<Head<'a>>,
    labels: &[i64],
    d_loss: f32,
    d_head: Option<&Tensor>,
) -> Result<(Losses, Tensor)> {
    let _span = tracing::trace_span!("loss").entered();
    let head = head.into();
    let rows = labelled_rows(x, head.table, labels)?;
    let (words, d) = head.table.dims()?;
    if let Some(d_head) = d_head {
        expect_dims(OP, "d_head", d_head, &[words, d])?;
    }
    if let Some(launcher) = Launcher::of(OP, x)? {
        let (losses, dx) = kernels::backward(&launcher, x, head, &rows, d_loss, d_head)?;
        return Ok((Losses(Origin::Device(rows, losses)), dx));
    }
    let (x_data, head) = (read(OP, x)?, head.on_cpu()?);
    let dtype = head.table.compute_dtype();
    let mut losses = Vec::with_capacity(rows.len());
    let mut added = Ok(());
    let dx = cpu::build(x.shape(), |dx| {
        let mut dx_chunk = Vec::new();
        for_each_chunk(&x_data, &head, &rows, |chunk, logits| {
            let dz = logits_backward(&chunk.losses, logits, d_loss, (head.soft_cap, dtype));
            dx_chunk.resize(chunk.losses.len() * d, 0.0);
            hidden_backward(&dz, &head.table, &mut dx_chunk);
            drop(dz);
            for (token, values) in chunk.losses.iter().zip(dx_chunk.chunks_exact(d)) {
                dx[token.row * d..(token.row + 1) * d].copy_from_slice(values);
            }
            if let (Ok(()), Some(d_head)) = (&added, d_head) {
                added = cpu::write(OP, d_head, |d_head| {
                    head_backward(logits, chunk.x, d_head, dtype);
                });
            }
            losses.extend(chunk.losses);
        });
    })?;
    added?;
    Ok((Losses(Origin::Host(losses)), dx))
}

/// The logits of every row in f32, `[N, V]`.
pub fn logits<'a>(x: &Tensor, head: impl std::convert::Into<Head<'a>>) -> Result<Tensor> {
    let head = head.into();
    let ((words, d), n) = (head.table.dims()?, x.dim(0)?);
    expect_dims(OP, "x", x, &[n, d])?;
    if let Some(launcher) = Launcher::of(OP, x)? {
        return kernels::logits(&launcher, x, head);
    }
    let (x, head) = (read(OP, x)?, head.on_cpu()?);
    let x = SharedLhs::new(Mat::new(&x, n, d), head.table.compute_dtype());
    cpu::build((n, words), |logits| {
        let logits = Shared::new(logits);
        for_each_column_tile(logits, (n, words), VOCAB_TILE, |mut tile, words| {
            let weight = head.table.transposed(words);
            matmul(&mut tile, Into::Overwrite, x.lhs(), weight, 1.0);
            (0..n).for_each(|row| SoftCap::apply(head.soft_cap, tile.row(row)));
        });
    })
}

/// `dx = dz W` for a chunk, of whose `dz` each tile is given.
fn hidden_backward(dz: &[SharedLhs<'_>], head: &CpuTable<'_>, dx: &mut [f32]) {
    let shape = (dx.len() / head.width(), head.width());
    for_each_column_tile(Shared::new(dx), shape, HIDDEN_TILE, |mut tile, cols| {
        for (i, dz) in dz.iter().enumerate() {
            let words = i * VOCAB_TILE..head.words().min((i + 1) * VOCAB_TILE);
            let into = if i == 0 { Into::Overwrite } else { Into::Add };
            let weight = head.part(words, cols.clone());
            matmul(&mut tile, into, dz.lhs(), weight, 1.0);
        }
    });
}

/// Adds `dW = dz^T x` of a chunk.
fn head_backward(dz: &Logits, x: Mat<'_>, d_head: &mut [f32], dtype: ComputeDtype) {
    let tiles = d_head.par_chunks_mut(VOCAB_TILE * x.cols);
    tiles.zip(dz.par_tiles()).for_each(|(d_head, dz)| {
        let words = d_head.len() / x.cols;
        let dz = Mat::new(dz, dz.len() / words, words).t().to(dtype);
        matmul(
            &mut MatMut::new(d_head, words, x.cols),
            Into::Add,
            dz,
            x,
            1.0,
        );
    });
}

/// The logits of a chunk of rows, [`VOCAB_TILE`] words at a time: tile after tile, each row-major.
struct Logits {
    data: Vec<f32>,
    rows: usize,
    vocab: usize,
}

impl Logits {
    fn words(&self, tile: usize) -> Range<usize> {
        tile * VOCAB_TILE..self.vocab.min((tile + 1) * VOCAB_TILE)
    }

    /// The data of each tile.
    fn par_tiles(&self) -> impl IndexedParallelIterator<Item = &[f32]> {
        self.data.par_chunks(self.rows * VOCAB_TILE)
    }

    fn at(&self, row: usize, word: usize) -> f32 {
        self.data[self.index(row, word)]
    }

    fn row_of_tile(&self, row: usize, tile: usize) -> &[f32] {
        let start = self.index(row, tile * VOCAB_TILE);
        &self.data[start..start + self.words(tile).len()]
    }

    fn index(&self, row: usize, word: usize) -> usize {
        let words = self.words(word / VOCAB_TILE);
        words.start * self.rows + row * words.len() + word - words.start
    }
}

/// The rows that carry loss, with their labels.
fn labelled_rows(x: &Tensor, head: Table<'_>, labels: &[i64]) -> Result<Vec<(usize, u32)>> {
    let (vocab, d) = head.dims()?;
    expect_dims(OP, "x", x, &[labels.len(), d])?;
    let rows = labels
        .iter()
        .enumerate()
        .filter(|&(_, &label)| label != IGNORE_INDEX);
    rows.map(|(row, &label)| match u32::try_from(label) {
        Ok(label) if (label as usize) < vocab => Ok((row, label)),
        _ => Err(Error::Shape {
            op: OP,
            expected: format!("labels below {vocab}, or {IGNORE_INDEX}"),
            found: label.to_string(),
        }),
    })
    .collect()
}

/// Rows that go through at a time.
struct Chunk<'a> {
    losses: Vec<TokenLoss>,
    /// `[rows, D]`.
    x: Mat<'a>,
}

/// Gives `f` each chunk of rows, with its logits.
fn for_each_chunk(
    x: &[f32],
    head: &CpuHead<'_>,
    rows: &[(usize, u32)],
    mut f: impl FnMut(Chunk<'_>, &mut Logits),
) {
    let (vocab, d) = (head.table.words(), head.table.width());
    let mut gathered = Vec::new();
    let mut logits = Logits {
        data: LOGITS.take(),
        rows: 0,
        vocab,
    };
    for chunk in rows.chunks(chunk_rows(vocab)) {
        gathered.clear();
        for (row, _) in chunk {
            gathered.extend_from_slice(&x[row * d..(row + 1) * d]);
        }
        logits.rows = chunk.len();
        logits.data.resize(chunk.len() * vocab, 0.0);
        let x = Mat::new(&gathered, chunk.len(), d);
        let peaks = logits_forward(x, head, &mut logits);
        let losses = row_losses(chunk, &logits, &peaks);
        f(Chunk { losses, x }, &mut logits);
    }
    LOGITS.set(logits.data);
}

/// What the softmax of a row needs to know of one tile of its logits.
#[derive(Clone, Copy)]
struct Peak {
    largest: f32,
    /// Sum of `e^(z - largest)`.
    sum: f32,
}

/// `z = x W^T` for a chunk, and the peaks of each tile, `[tiles][rows]`, taken while the tile is in the cache.
fn logits_forward(x: Mat<'_>, head: &CpuHead<'_>, logits: &mut Logits) -> Vec<Vec<Peak>> {
    let rows = logits.rows;
    let x = SharedLhs::new(x, head.table.compute_dtype());
    let tiles = logits.data.par_chunks_mut(rows * VOCAB_TILE).enumerate();
    let peaks = tiles.map(|(tile, z)| {
        let start = tile * VOCAB_TILE;
        let words = z.len() / rows;
        let weight = head.table.transposed(start..start + words);
        matmul(
            &mut MatMut::new(z, rows, words),
            Into::Overwrite,
            x.lhs(),
            weight,
            1.0,
        );
        let peak = |z: &mut [f32]| {
            vectorized(
                #[inline(always)]
                || {
                    SoftCap::apply(head.soft_cap, z);
                    let z = &*z;
                    let largest = max(z);
                    let sum = sum([z], |[z]| exp(z - largest));
                    Peak { largest, sum }
                },
            )
        };
        z.chunks_exact_mut(words).map(peak).collect()
    });
    peaks.collect()
}

/// The loss of each row of a chunk.
fn row_losses(chunk: &[(usize, u32)], logits: &Logits, peaks: &[Vec<Peak>]) -> Vec<TokenLoss> {
    let loss = |(i, &(row, label)): (usize, &(usize, u32))| {
        let of_row = || peaks.iter().map(|tile| tile[i]);
        let largest = of_row()
            .map(|peak| peak.largest)
            .fold(f32::NEG_INFINITY, f32::max);
        let total: f32 = of_row()
            .map(|peak| peak.sum * exp(peak.largest - largest))
            .sum();
        let tile = of_row()
            .position(|peak| peak.largest == largest)
            .unwrap_or(0);
        let place = logits
            .row_of_tile(i, tile)
            .iter()
            .position(|&z| z == largest);
        TokenLoss {
            row,
            label,
            loss: largest + total.ln() - logits.at(i, label as usize),
            confidence: 1.0 / total,
            prediction: (tile * VOCAB_TILE + place.unwrap_or(0)) as u32,
        }
    };
    chunk.iter().enumerate().map(loss).collect()
}

/// Replaces the logits by their gradient; gives each tile of it for products in `dtype`.
fn logits_backward<'a>(
    losses: &[TokenLoss],
    logits: &'a mut Logits,
    d_loss: f32,
    (soft_cap, dtype): (Option<SoftCap>, ComputeDtype),
) -> Vec<SharedLhs<'a>> {
    let slope = |z| soft_cap.map_or(1.0, |cap| cap.slope(z));
    let labels: Vec<usize> = losses.iter().map(|token| token.label as usize).collect();
    let lse: Vec<f32> = losses
        .iter()
        .zip(&labels)
        .enumerate()
        .map(|(i, (token, &label))| token.loss + logits.at(i, label))
        .collect();
    let rows = logits.rows;
    let tiles = logits.data.par_chunks_mut(rows * VOCAB_TILE).enumerate();
    let gradients = tiles.map(|(tile, data)| {
        let (first, width) = (tile * VOCAB_TILE, data.len() / rows);
        for ((z, &lse), &label) in data.chunks_exact_mut(width).zip(&lse).zip(&labels) {
            let label = label.checked_sub(first).filter(|&word| word < width);
            let d_label = label.map(|word| d_loss * slope(z[word]));
            let row = &mut *z;
            vectorized(
                #[inline(always)]
                move || match soft_cap {
                    None => row.iter_mut().for_each(|z| *z = d_loss * exp(*z - lse)),
                    Some(cap) => row
                        .iter_mut()
                        .for_each(|z| *z = d_loss * exp(*z - lse) * cap.slope(*z)),
                },
            );
            if let (Some(word), Some(d_label)) = (label, d_label) {
                z[word] -= d_label;
            }
        }
        SharedLhs::new(Mat::new(data, rows, width), dtype)
    });
    gradients.collect()
}

/// The summed loss from differentiable primitives, with the head as a tensor `[V, D]` and every label below V.
pub fn reference(
    x: &Tensor,
    head: &Tensor,
    soft_cap: Option<SoftCap>,
    labels: &Tensor,
) -> Result<Tensor> {
    let logits = SoftCap::reference(soft_cap, &x.matmul(&head.t()?)?)?;
    let largest = logits.max_keepdim(D::Minus1)?.detach();
    let lse = (logits
        .broadcast_sub(&largest)?
        .exp()?
        .sum_keepdim(D::Minus1)?
        .log()?
        + largest)?;
    let at_label = logits.gather(&labels.unsqueeze(1)?, 1)?;
    Ok((lse - at_label)?.sum_all()?)
}
