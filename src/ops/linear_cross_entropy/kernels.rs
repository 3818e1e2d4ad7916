//! The device side: logits of a chunk in f32 by one product, then one kernel for the loss and for `dz` in their place.

use candle_core::{DType, Tensor};

use super::{Head, OP, TokenLoss};
use crate::Result;
use crate::device::{self, Gemm, Matrix};
use crate::ops::embedding::{gather, scatter};
use crate::ops::launcher::{Grid, Launcher, Operand};
use crate::ops::soft_cap::SoftCap;
use crate::ops::table::Table;

/// Bytes of one chunk's logits, at most: enough rows for the products to fill a GPU.
const CHUNK_BYTES: usize = 256 << 20;
const THREADS: u32 = 1024;

/// Rows whose logits are there at a time.
pub(super) fn chunk_rows(vocab: usize) -> usize {
    (CHUNK_BYTES / (4 * vocab)).max(1)
}

/// Losses of rows that carry one, as kernels left them, `[3, rows]`: loss and confidence, both f32, and prediction, as words.
#[derive(Debug)]
pub(super) struct DeviceLosses(Tensor);

impl DeviceLosses {
    /// Waits for the kernels.
    pub(super) fn read(&self, rows: &[(usize, u32)]) -> Result<Vec<TokenLoss>> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let words = Launcher::on(OP, self.0.device())?.read::<u32>(&self.0.flatten_all()?)?;
        let (loss, rest) = words.split_at(rows.len());
        let (confidence, prediction) = rest.split_at(rows.len());
        let token = |(i, &(row, label)): (usize, &(usize, u32))| TokenLoss {
            row,
            label,
            loss: f32::from_bits(loss[i]),
            confidence: f32::from_bits(confidence[i]),
            prediction: prediction[i],
        };
        Ok(rows.iter().enumerate().map(token).collect())
    }
}

/// The logits of every row of `x: [N, D]` in f32, `[N, V]`.
pub(super) fn logits(launcher: &Launcher, x: &Tensor, head: Head<'_>) -> Result<Tensor> {
    let logits = uncapped_logits(launcher, x, head.table)?;
    if head.soft_cap.is_some() {
        let n = logits.elem_count();
        let operands = [
            Operand::Write(&logits),
            Operand::U64(n),
            SoftCap::operand(head.soft_cap),
        ];
        let grid = launcher.grid_stride(n, 1);
        // SAFETY: there are n logits.
        unsafe { launcher.launch("linear_cross_entropy_soft_cap_f32", grid, &operands)? };
    }
    Ok(logits)
}

/// Those, as the kernels for the loss take them.
fn uncapped_logits(launcher: &Launcher, x: &Tensor, head: Table<'_>) -> Result<Tensor> {
    let ((rows, d), (vocab, _)) = (x.dims2()?, head.dims()?);
    let logits = launcher.empty((rows, vocab), DType::F32)?;
    if rows == 0 {
        return Ok(logits);
    }
    head.for_each_part(launcher, |words, part| {
        let gemm = Gemm {
            m: rows,
            n: words.len(),
            k: d,
            a: whole(x)?,
            b: Matrix {
                is_transposed: true,
                ..whole(part)?
            },
            c_address: device::address_mut(&logits)? + (4 * words.start) as u64,
            c_row_stride: vocab,
            c_dtype: DType::F32,
            alpha: 1.0,
            beta: 0.0,
        };
        // SAFETY: `x` and `part` are whole tensors with rows of d, and a row of logits has room for all words.
        unsafe { launcher.raw_gemm(&gemm) }
    })?;
    Ok(logits)
}

/// The losses of the `rows` of `x`.
pub(super) fn forward(
    launcher: &Launcher,
    x: &Tensor,
    Head { table, soft_cap }: Head<'_>,
    rows: &[(usize, u32)],
) -> Result<DeviceLosses> {
    let rows = Rows::new(launcher, rows)?;
    for chunk in rows.chunks(table.dims()?.0)? {
        let x = gather(launcher, x, &chunk.ids)?;
        chunk.forward(launcher, &uncapped_logits(launcher, &x, table)?, soft_cap)?;
    }
    Ok(rows.losses)
}

/// The losses, and the gradient of `x`; adds that of the head to `d_head`, if there is one.
pub(super) fn backward(
    launcher: &Launcher,
    x: &Tensor,
    Head { table, soft_cap }: Head<'_>,
    rows: &[(usize, u32)],
    d_loss: f32,
    d_head: Option<&Tensor>,
) -> Result<(DeviceLosses, Tensor)> {
    let rows = Rows::new(launcher, rows)?;
    let dx = launcher.empty(x.shape(), DType::BF16)?;
    dx.zero_set()?;
    for chunk in rows.chunks(table.dims()?.0)? {
        let x = gather(launcher, x, &chunk.ids)?;
        let logits = uncapped_logits(launcher, &x, table)?;
        chunk.backward(launcher, &logits, soft_cap, d_loss)?;
        let dz = LogitsGrad(&logits);
        if let Some(d_head) = d_head {
            dz.head_backward(launcher, &x, d_head)?;
        }
        let d_chunk = dz.hidden_backward(launcher, table)?;
        scatter(launcher, &d_chunk, &chunk.ids, &dx)?;
    }
    Ok((rows.losses, dx))
}

/// The rows that carry loss, and where their results go.
struct Rows {
    /// `[2, rows]`: their numbers, and their labels.
    columns: Tensor,
    losses: DeviceLosses,
}

impl Rows {
    fn new(launcher: &Launcher, rows: &[(usize, u32)]) -> Result<Self> {
        let ids = rows.iter().map(|(row, _)| *row as u32);
        let columns: Vec<u32> = ids.chain(rows.iter().map(|(_, label)| *label)).collect();
        Ok(Self {
            columns: launcher.upload(&columns, (2, rows.len()))?,
            losses: DeviceLosses(launcher.empty((3, rows.len()), DType::U32)?),
        })
    }

    /// Of so many words in the vocabulary.
    fn chunks(&self, vocab: usize) -> Result<Vec<Chunk>> {
        let (rows, most) = (self.columns.dim(1)?, chunk_rows(vocab));
        let chunk = |start: usize| {
            let part = |t: &Tensor, row| t.get(row)?.narrow(0, start, most.min(rows - start));
            let (columns, losses) = (&self.columns, &self.losses.0);
            Ok(Chunk {
                ids: part(columns, 0)?,
                labels: part(columns, 1)?,
                loss: part(losses, 0)?,
                confidence: part(losses, 1)?,
                prediction: part(losses, 2)?,
            })
        };
        (0..rows).step_by(most).map(chunk).collect()
    }
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
    fn forward(
        &self,
        launcher: &Launcher,
        logits: &Tensor,
        soft_cap: Option<SoftCap>,
    ) -> Result<()> {
        let (rows, vocab) = logits.dims2()?;
        let operands = [
            Operand::Read(logits),
            Operand::Read(&self.labels),
            Operand::U32(rows),
            Operand::U32(vocab),
            SoftCap::operand(soft_cap),
            Operand::Write(&self.loss),
            Operand::Write(&self.confidence),
            Operand::Write(&self.prediction),
        ];
        let grid = Grid::blocks(rows, 1).with_threads(THREADS);
        // SAFETY: a label below vocab and a place for each result in every row.
        unsafe { launcher.launch("linear_cross_entropy_forward_f32", grid, &operands) }
    }

    /// Leaves `dz` in bf16 in the first half of each row of `logits`.
    fn backward(
        &self,
        launcher: &Launcher,
        logits: &Tensor,
        soft_cap: Option<SoftCap>,
        d_loss: f32,
    ) -> Result<()> {
        let (rows, vocab) = logits.dims2()?;
        let operands = [
            Operand::Write(logits),
            Operand::Read(&self.labels),
            Operand::U32(rows),
            Operand::U32(vocab),
            SoftCap::operand(soft_cap),
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

/// `dz` in bf16, in the first half of each row of f32 logits.
struct LogitsGrad<'a>(&'a Tensor);

impl LogitsGrad<'_> {
    /// `dx = dz W`; the sum over the parts of a head is taken in f32, and rounded once.
    fn hidden_backward(&self, launcher: &Launcher, head: Table<'_>) -> Result<Tensor> {
        let (rows, (_, d)) = (self.0.dim(0)?, head.dims()?);
        let c_dtype = match head.is_paged() {
            true => DType::F32,
            false => DType::BF16,
        };
        let dx = launcher.empty((rows, d), c_dtype)?;
        head.for_each_part(launcher, |words, part| {
            let gemm = Gemm {
                m: rows,
                n: d,
                k: words.len(),
                a: self.columns(words.start)?,
                b: whole(part)?,
                c_address: device::address_mut(&dx)?,
                c_row_stride: d,
                c_dtype,
                alpha: 1.0,
                beta: if words.start == 0 { 0.0 } else { 1.0 },
            };
            // SAFETY: a row of f32 has room for two rows of bf16, and the other two matrices are whole tensors.
            unsafe { launcher.raw_gemm(&gemm) }
        })?;
        Ok(dx.to_dtype(DType::BF16)?)
    }

    /// Adds `dW = dz^T x` to `d_head`.
    fn head_backward(&self, launcher: &Launcher, x: &Tensor, d_head: &Tensor) -> Result<()> {
        let (rows, vocab) = self.0.dims2()?;
        let d = x.dim(1)?;
        let gemm = Gemm {
            m: vocab,
            n: d,
            k: rows,
            a: Matrix {
                is_transposed: true,
                ..self.columns(0)?
            },
            b: whole(x)?,
            c_address: device::address_mut(d_head)?,
            c_row_stride: d,
            c_dtype: DType::F32,
            alpha: 1.0,
            beta: 1.0,
        };
        // SAFETY: as above; `d_head` is [V, D] in f32, as the caller checks.
        unsafe { launcher.raw_gemm(&gemm) }
    }

    /// The gradient of the logits from word `first` on.
    fn columns(&self, first: usize) -> Result<Matrix> {
        Ok(Matrix {
            address: device::address(self.0)? + (2 * first) as u64,
            row_stride: 2 * self.0.dim(1)?,
            is_transposed: false,
        })
    }
}

fn whole(t: &Tensor) -> Result<Matrix> {
    Ok(Matrix {
        address: device::address(t)?,
        row_stride: t.dim(1)?,
        is_transposed: false,
    })
}
