//! The token embedding: a row of the table for each token. The table is frozen, so there is no backward.

use candle_core::{DType, Tensor};

use super::cpu;
use super::launcher::{Grid, Launcher, Operand};
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
pub fn forward(ids: &[u32], table: &Weight) -> Result<Tensor> {
    let (vocab, d) = (table.out_features(), table.in_features());
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::Shape {
            op: OP,
            expected: format!("token ids below {vocab}"),
            found: id.to_string(),
        });
    }
    if let Some(device) = table.device() {
        let launcher = Launcher::on(OP, device)?;
        let ids = Tensor::from_slice(ids, ids.len(), device)?;
        return gather(&launcher, &table.dense(&launcher)?, &ids);
    }
    cpu::build((ids.len(), d), |rows| {
        for (row, &id) in rows.chunks_exact_mut(d).zip(ids) {
            table.read_tile(id as usize..id as usize + 1, 0..d, row);
        }
    })
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
