//! The device side: logits of a chunk in f32 by one product, then one kernel for the loss and for `dz` in their place.

use candle_core::{DType, Tensor};

use super::{OP, TokenLoss};
use crate::Result;
use crate::device::{self, Gemm, Matrix};
use crate::ops::embedding::{gather, scatter};
use crate::ops::launcher::{Factor, Grid, Launcher, Operand};
use crate::ops::weight::Weight;

/// Bytes of one chunk's logits, at most: enough rows for the products to fill a GPU.
const CHUNK_BYTES: usize = 256 << 20;
const THREADS: u32 = 1024;

/// Rows whose logits are there at a time.
pub(super) fn chunk_rows(vocab: usize) -> usize {
    (CHUNK_BYTES / (4 * vocab)).max(1)
}

/// Losses of rows that carry one, as kernels left them: all `[rows]`.
#[derive(Debug)]
pub(super) struct DeviceLosses {
    loss: Tensor,
    confidence: Tensor,
    prediction: Tensor,
}

impl DeviceLosses {
    /// Waits for the kernels.
    pub(super) fn read(&self, rows: &[(usize, u32)]) -> Result<Vec<TokenLoss>> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let loss = self.loss.to_vec1::<f32>()?;
        let confidence = self.confidence.to_vec1::<f32>()?;
        let prediction = self.prediction.to_vec1::<u32>()?;
        let token = |(i, &(row, label)): (usize, &(usize, u32))| TokenLoss {
            row,
            label,
            loss: loss[i],
            confidence: confidence[i],
            prediction: prediction[i],
        };
        Ok(rows.iter().enumerate().map(token).collect())
    }
}

/// The logits of every row of `x: [N, D]` in f32, `[N, V]`.
pub(super) fn logits(launcher: &Launcher, x: &Tensor, head: &Weight) -> Result<Tensor> {
    let logits = launcher.empty((x.dim(0)?, head.out_features()), DType::F32)?;
    let weight = head.dense(launcher)?;
    let factors = (Factor::new(x), Factor::transposed(&weight));
    launcher.gemm(OP, factors, &logits, 1.0, 0.0)?;
    Ok(logits)
}

/// The losses, and the gradient of `x` for the gradient `d_loss` of each where that is wanted.
pub(super) fn losses(
    launcher: &Launcher,
    x: &Tensor,
    head: &Weight,
    rows: &[(usize, u32)],
    d_loss: Option<f32>,
) -> Result<(DeviceLosses, Option<Tensor>)> {
    let device = x.device();
    let column = |values: Vec<u32>| Tensor::from_vec(values, rows.len(), device);
    let ids = column(rows.iter().map(|(row, _)| *row as u32).collect())?;
    let labels = column(rows.iter().map(|(_, label)| *label).collect())?;
    let results = DeviceLosses {
        loss: launcher.empty(rows.len(), DType::F32)?,
        confidence: launcher.empty(rows.len(), DType::F32)?,
        prediction: Tensor::zeros(rows.len(), DType::U32, device)?,
    };
    let dx = d_loss
        .map(|_| Tensor::zeros(x.shape(), DType::BF16, device))
        .transpose()?;
    let chunk_rows = chunk_rows(head.out_features());
    for start in (0..rows.len()).step_by(chunk_rows) {
        let len = chunk_rows.min(rows.len() - start);
        let part = |t: &Tensor| t.narrow(0, start, len);
        let chunk = Chunk {
            ids: part(&ids)?,
            labels: part(&labels)?,
            loss: part(&results.loss)?,
            confidence: part(&results.confidence)?,
            prediction: part(&results.prediction)?,
        };
        let x = gather(launcher, x, &chunk.ids)?;
        let logits = logits(launcher, &x, head)?;
        match (d_loss, &dx) {
            (Some(d_loss), Some(dx)) => {
                chunk.backward(launcher, &logits, d_loss)?;
                let d_chunk = hidden_backward(launcher, &logits, head)?;
                scatter(launcher, &d_chunk, &chunk.ids, dx)?;
            }
            _ => chunk.forward(launcher, &logits)?,
        }
    }
    Ok((results, dx))
}

/// A range of the rows that carry loss: where they lie in `x`, and where their results go.
struct Chunk {
    ids: Tensor,
    labels: Tensor,
    loss: Tensor,
    confidence: Tensor,
    prediction: Tensor,
}

impl Chunk {
    fn forward(&self, launcher: &Launcher, logits: &Tensor) -> Result<()> {
        let (rows, vocab) = logits.dims2()?;
        let operands = [
            Operand::Read(logits),
            Operand::Read(&self.labels),
            Operand::U32(rows),
            Operand::U32(vocab),
            Operand::Write(&self.loss),
            Operand::Write(&self.confidence),
            Operand::Write(&self.prediction),
        ];
        let grid = Grid::blocks(rows, 1).with_threads(THREADS);
        // SAFETY: a label below vocab and a place for each result in every row.
        unsafe { launcher.launch("linear_cross_entropy_forward_f32", grid, &operands) }
    }

    /// Leaves `dz` in bf16 in the first half of each row of `logits`.
    fn backward(&self, launcher: &Launcher, logits: &Tensor, d_loss: f32) -> Result<()> {
        let (rows, vocab) = logits.dims2()?;
        let operands = [
            Operand::Write(logits),
            Operand::Read(&self.labels),
            Operand::U32(rows),
            Operand::U32(vocab),
            Operand::F32(d_loss),
            Operand::Write(&self.loss),
            Operand::Write(&self.confidence),
            Operand::Write(&self.prediction),
        ];
        let grid = Grid::blocks(rows, 1).with_threads(THREADS);
        // SAFETY: a label below vocab and a place for each result in every row.
        unsafe { launcher.launch("linear_cross_entropy_backward_f32", grid, &operands) }
    }
}

/// `dx = dz W`, where `dz` lies in the first half of each row of `logits`.
fn hidden_backward(launcher: &Launcher, logits: &Tensor, head: &Weight) -> Result<Tensor> {
    let (rows, vocab) = logits.dims2()?;
    let d = head.in_features();
    let dx = launcher.empty((rows, d), DType::BF16)?;
    let weight = head.dense(launcher)?;
    let matrix = |t: &Tensor, row_stride| -> Result<Matrix> {
        Ok(Matrix {
            address: device::address(t)?,
            row_stride,
            is_transposed: false,
        })
    };
    let gemm = Gemm {
        m: rows,
        n: d,
        k: vocab,
        a: matrix(logits, 2 * vocab)?,
        b: matrix(&weight, d)?,
        c_address: device::address_mut(&dx)?,
        c_row_stride: d,
        c_dtype: DType::BF16,
        alpha: 1.0,
        beta: 0.0,
    };
    // SAFETY: a row of f32 has room for two rows of bf16, and the other two matrices are whole tensors.
    unsafe { launcher.raw_gemm(&gemm)? };
    Ok(dx)
}
