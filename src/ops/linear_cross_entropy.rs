//! The output head and the loss in one: `loss = sum over rows of (logsumexp(z) - z_label)`, `z = x W^T`.
//!
//! Backward: `dz = d_loss (softmax(z) - onehot(label))`, `dx = dz W`; the head is frozen. Rows go through in chunks and
//! `dz` takes the place of `z`, so that the `[N, V]` logits never exist; rows without a label are left out before.
//!
//! Source: arXiv:2411.09009.

use candle_core::{D, Tensor};
use rayon::prelude::*;

use super::cpu::{self, expect_dims, read};
use super::gemm::{Into, Mat, for_each_column_tile, matmul};
use super::simd::{exp, max, sum, vectorized};
use crate::quant::FrozenWeight;
use crate::{Error, IGNORE_INDEX, Result};

const OP: &str = "linear_cross_entropy";

/// Bytes of one chunk's logits, at most.
const CHUNK_BYTES: usize = 64 << 20;
const MAX_CHUNK_ROWS: usize = 1024;
/// Columns of the logits, or of `dx`, made at a time.
const TILE: usize = 256;

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
pub fn forward(x: &Tensor, head: &FrozenWeight, labels: &[i64]) -> Result<Vec<TokenLoss>> {
    let rows = labelled_rows(x, head, labels)?;
    let x = read(OP, x)?;
    let mut losses = Vec::with_capacity(rows.len());
    for_each_chunk(&x, head, &rows, |chunk, logits, _| {
        losses.extend(row_losses(chunk, logits))
    });
    Ok(losses)
}

/// The losses, and `dx` for the gradient `d_loss` of each.
///
/// # Shapes
/// As [`forward`]; `dx: [N, D]`, zero in rows without a label.
pub fn backward(
    x: &Tensor,
    head: &FrozenWeight,
    labels: &[i64],
    d_loss: f32,
) -> Result<(Vec<TokenLoss>, Tensor)> {
    let rows = labelled_rows(x, head, labels)?;
    let x_data = read(OP, x)?;
    let d = head.in_features();
    let mut losses = Vec::with_capacity(rows.len());
    let dx = cpu::build(x.shape(), |dx| {
        for_each_chunk(&x_data, head, &rows, |chunk, logits, dx_chunk| {
            let chunk_losses = row_losses(chunk, logits);
            logits_backward(&chunk_losses, logits, d_loss);
            let vocab = head.out_features();
            dx_chunk.resize(chunk.len() * d, 0.0);
            for_each_column_tile(
                dx_chunk,
                (chunk.len(), d),
                TILE,
                |mut tile, cols, scratch| {
                    head_tiles(head, cols, scratch, |range, weight, into| {
                        let dz = Mat::new(logits, chunk.len(), vocab).cols(range);
                        matmul(&mut tile, into, dz, weight, 1.0);
                    });
                },
            );
            for ((row, _), values) in chunk.iter().zip(dx_chunk.chunks_exact(d)) {
                dx[row * d..(row + 1) * d].copy_from_slice(values);
            }
            losses.extend(chunk_losses);
        });
    })?;
    Ok((losses, dx))
}

/// Rows of the head taken at a time in backward, so that the scratch stays small for any vocabulary.
const HEAD_ROWS: usize = 2048;

fn head_tiles(
    head: &FrozenWeight,
    cols: std::ops::Range<usize>,
    scratch: &mut Vec<f32>,
    mut f: impl FnMut(std::ops::Range<usize>, Mat<'_>, Into),
) {
    let vocab = head.out_features();
    for start in (0..vocab).step_by(HEAD_ROWS) {
        let range = start..vocab.min(start + HEAD_ROWS);
        scratch.resize(range.len() * cols.len(), 0.0);
        head.read_tile(range.clone(), cols.clone(), scratch);
        let into = if start == 0 {
            Into::Overwrite
        } else {
            Into::Add
        };
        f(
            range.clone(),
            Mat::new(scratch, range.len(), cols.len()),
            into,
        );
    }
}

/// The rows that carry loss, with their labels.
fn labelled_rows(x: &Tensor, head: &FrozenWeight, labels: &[i64]) -> Result<Vec<(usize, u32)>> {
    expect_dims(OP, "x", x, &[labels.len(), head.in_features()])?;
    let vocab = head.out_features();
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

/// Gives `f` each chunk of rows with its logits `[rows, V]` and a buffer it may use.
fn for_each_chunk(
    x: &[f32],
    head: &FrozenWeight,
    rows: &[(usize, u32)],
    mut f: impl FnMut(&[(usize, u32)], &mut [f32], &mut Vec<f32>),
) {
    let (vocab, d) = (head.out_features(), head.in_features());
    let chunk_rows = (CHUNK_BYTES / (4 * vocab)).clamp(16, MAX_CHUNK_ROWS);
    let (mut logits, mut gathered, mut buffer) = (Vec::new(), Vec::new(), Vec::new());
    for chunk in rows.chunks(chunk_rows) {
        gathered.clear();
        for (row, _) in chunk {
            gathered.extend_from_slice(&x[row * d..(row + 1) * d]);
        }
        logits.resize(chunk.len() * vocab, 0.0);
        let x = Mat::new(&gathered, chunk.len(), d);
        for_each_column_tile(
            &mut logits,
            (chunk.len(), vocab),
            TILE,
            |mut tile, outs, scratch| {
                scratch.resize(outs.len() * d, 0.0);
                head.read_tile(outs.clone(), 0..d, scratch);
                matmul(
                    &mut tile,
                    Into::Overwrite,
                    x,
                    Mat::new(scratch, outs.len(), d).t(),
                    1.0,
                );
            },
        );
        f(chunk, &mut logits, &mut buffer);
    }
}

/// The loss of each row of a chunk.
fn row_losses(chunk: &[(usize, u32)], logits: &[f32]) -> Vec<TokenLoss> {
    let vocab = logits.len() / chunk.len();
    let rows = chunk.par_iter().zip(logits.par_chunks_exact(vocab));
    rows.map(|(&(row, label), logits)| {
        let (largest, total) = vectorized(
            #[inline(always)]
            || {
                let largest = max(logits);
                (largest, sum(logits.len(), |i| exp(logits[i] - largest)))
            },
        );
        let prediction = logits.iter().position(|&z| z == largest).unwrap_or(0);
        TokenLoss {
            row,
            label,
            loss: largest + total.ln() - logits[label as usize],
            confidence: 1.0 / total,
            prediction: prediction as u32,
        }
    })
    .collect()
}

/// Replaces the logits by their gradient.
fn logits_backward(losses: &[TokenLoss], logits: &mut [f32], d_loss: f32) {
    let vocab = logits.len() / losses.len();
    logits
        .par_chunks_exact_mut(vocab)
        .zip(losses)
        .for_each(|(logits, token)| {
            let label = token.label as usize;
            let lse = token.loss + logits[label];
            vectorized(
                #[inline(always)]
                || {
                    for z in logits.iter_mut() {
                        *z = d_loss * exp(*z - lse);
                    }
                },
            );
            logits[label] -= d_loss;
        });
}

/// The summed loss from differentiable primitives, with the head as a tensor `[V, D]` and every label below V.
pub fn reference(x: &Tensor, head: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let logits = x.matmul(&head.t()?)?;
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
