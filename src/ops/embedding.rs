//! The token embedding: a row of the table for each token. Backward, where the table is trained: the sum of the gradients
//! of a token's rows, in their order.

use candle_core::{DType, Device, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::cpu::{self, expect_dims};
use super::host_memory::HostMemory;
use super::launcher::{Grid, Launcher, Operand};
use super::table::Table;
use super::weight::Weight;
use crate::{Error, Result};

const OP: &str = "embedding";

/// Gathers rows of `table: [V, D]`.
///
/// # Shapes
/// `ids: [N]` -> `[N, D]`.
///
/// # Errors
/// [`Error::Shape`] for an id that is not below V.
pub fn forward<'a>(ids: &[u32], table: impl Into<Table<'a>>) -> Result<Tensor> {
    let _span = tracing::trace_span!("elementwise").entered();
    let table = table.into();
    let (words, d) = table.dims()?;
    expect_known(ids, words)?;
    if let Some(device) = table.device() {
        let launcher = Launcher::on(OP, device)?;
        let ids = launcher.upload(ids, ids.len())?;
        return gather(&launcher, &table.dense(&launcher)?, &ids);
    }
    let table = table.on_cpu(OP)?;
    cpu::build((ids.len(), d), |rows| {
        for (row, &id) in rows.chunks_exact_mut(d).zip(ids) {
            table.read_row(id as usize, row);
        }
    })
}

/// Adds to `d_table` the gradient of each row of the output, but for tokens `padding_id`: to those torch gives none.
///
/// # Shapes
/// `dy: [N, D]`, `ids: [N]`, `d_table: [V, D]` in f32.
///
/// # Errors
/// [`Error::Shape`] for an id that is not below V.
pub fn backward(dy: &Tensor, ids: &[u32], padding_id: Option<u32>, d_table: &Tensor) -> Result<()> {
    let _span = tracing::trace_span!("elementwise").entered();
    let (words, d) = d_table.dims2()?;
    expect_dims(OP, "dy", dy, &[ids.len(), d])?;
    expect_known(ids, words)?;
    let rows = (0..ids.len()).filter(|&row| Some(ids[row]) != padding_id);
    if let Some(launcher) = Launcher::of(OP, dy)? {
        return add_rows(&launcher, dy, TokenRows::new(rows, ids), d_table);
    }
    let dy = cpu::read(OP, dy)?;
    cpu::write(OP, d_table, |d_table| {
        for row in rows {
            let sum = &mut d_table[ids[row] as usize * d..][..d];
            for (sum, dy) in sum.iter_mut().zip(&dy[row * d..][..d]) {
                *sum += dy;
            }
        }
    })
}

/// The rows of each token, by token.
struct TokenRows {
    /// Every token once.
    ids: Vec<u32>,
    /// Where its rows begin in `rows`, and where those of the last end.
    starts: Vec<u32>,
    /// Those of a token in their order.
    rows: Vec<u32>,
}

impl TokenRows {
    fn new(rows: impl Iterator<Item = usize>, ids: &[u32]) -> Self {
        let mut rows: Vec<u32> = rows.map(|row| row as u32).collect();
        let id = |row: &u32| ids[*row as usize];
        rows.sort_by_key(id);
        let (mut ids, mut starts) = (Vec::new(), vec![0]);
        for of_token in rows.chunk_by(|a, b| id(a) == id(b)) {
            ids.push(id(&of_token[0]));
            starts.push(starts[starts.len() - 1] + of_token.len() as u32);
        }
        Self { ids, starts, rows }
    }
}

/// Adds the rows of each token to its row of `sums: [V, D]`, by the kernel.
fn add_rows(launcher: &Launcher, dy: &Tensor, tokens: TokenRows, sums: &Tensor) -> Result<()> {
    let upload = |values: Vec<u32>| launcher.upload(&values, values.len());
    let count = tokens.ids.len();
    let (ids, starts, rows) = (
        upload(tokens.ids)?,
        upload(tokens.starts)?,
        upload(tokens.rows)?,
    );
    let operands = [
        Operand::Read(dy),
        Operand::Read(&ids),
        Operand::Read(&starts),
        Operand::Read(&rows),
        Operand::U32(count),
        Operand::U32(dy.dim(1)?),
        Operand::Write(sums),
    ];
    // SAFETY: `sums` has a row for every id and `dy` every row, as the caller checks; both have d columns.
    unsafe { launcher.launch("embedding_backward_bf16", Grid::blocks(count, 1), &operands) }
}

/// The same in bf16 on `device`, from a table that is on the host alone.
///
/// # Errors
/// As [`forward`], and what the device's driver reports.
pub fn forward_from_host(
    ids: &[u32],
    table: &Weight,
    host: &HostMemory,
    device: &Device,
) -> Result<Tensor> {
    let d = table.in_features();
    expect_known(ids, table.out_features())?;
    host.bring((ids.len(), d), DType::BF16, device, |bytes| {
        let rows = bytes.par_chunks_exact_mut(2 * d).zip(ids);
        rows.for_each_init(
            || vec![0f32; d],
            |values, (row, &id)| {
                table.read_tile(id as usize..id as usize + 1, 0..d, values);
                for (bytes, value) in row.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                    *bytes = bf16::from_f32(*value).to_ne_bytes();
                }
            },
        );
    })
}

fn expect_known(ids: &[u32], vocab: usize) -> Result<()> {
    match ids.iter().find(|&&id| id as usize >= vocab) {
        None => Ok(()),
        Some(id) => Err(Error::Shape {
            op: OP,
            expected: format!("token ids below {vocab}"),
            found: id.to_string(),
        }),
    }
}

/// The rows `ids` of `table: [V, D]`, by the kernel.
pub(super) fn gather(launcher: &Launcher, table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (rows, d) = (ids.elem_count(), table.dim(1)?);
    let out = launcher.empty((rows, d), DType::BF16)?;
    let operands = [
        Operand::Read(table),
        Operand::Read(ids),
        Operand::U32(rows),
        Operand::U32(d),
        Operand::Write(&out),
    ];
    // SAFETY: the table has d columns and, as callers check, a row for every id.
    unsafe { launcher.launch("embedding_gather_bf16", Grid::blocks(rows, 1), &operands)? };
    Ok(out)
}

/// Writes the rows `values` to the rows `ids` of `out: [N, D]`, by the kernel.
pub(super) fn scatter(
    launcher: &Launcher,
    values: &Tensor,
    ids: &Tensor,
    out: &Tensor,
) -> Result<()> {
    let (rows, d) = values.dims2()?;
    let operands = [
        Operand::Read(values),
        Operand::Read(ids),
        Operand::U32(rows),
        Operand::U32(d),
        Operand::Write(out),
    ];
    // SAFETY: both have d columns, and `out` has, as callers check, a row for every id.
    unsafe { launcher.launch("embedding_scatter_bf16", Grid::blocks(rows, 1), &operands) }
}

/// The same from differentiable primitives, with the table as a tensor.
pub fn reference(ids: &Tensor, table: &Tensor) -> Result<Tensor> {
    Ok(table.index_select(ids, 0)?)
}
