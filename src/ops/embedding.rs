//! The token embedding: a row of the table for each token. The table is frozen, so there is no backward.

use candle_core::{DType, Device, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::cpu;
use super::host_memory::HostMemory;
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
    let _span = tracing::trace_span!("elementwise").entered();
    let d = table.in_features();
    expect_known(ids, table)?;
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
    expect_known(ids, table)?;
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

fn expect_known(ids: &[u32], table: &Weight) -> Result<()> {
    let vocab = table.out_features();
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
