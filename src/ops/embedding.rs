//! The token embedding: a row of the table for each token. The table is frozen, so there is no backward.

use candle_core::Tensor;

use super::cpu;
use crate::quant::FrozenWeight;
use crate::{Error, Result};

const OP: &str = "embedding";

/// Gathers rows of `table: [V, D]`.
///
/// # Shapes
/// `ids: [N]` -> `[N, D]`.
///
/// # Errors
/// [`Error::Shape`] for an id that is not below V.
pub fn forward(ids: &[u32], table: &FrozenWeight) -> Result<Tensor> {
    let (vocab, d) = (table.out_features(), table.in_features());
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::Shape {
            op: OP,
            expected: format!("token ids below {vocab}"),
            found: id.to_string(),
        });
    }
    cpu::build((ids.len(), d), |rows| {
        for (row, &id) in rows.chunks_exact_mut(d).zip(ids) {
            table.read_tile(id as usize..id as usize + 1, 0..d, row);
        }
    })
}

/// The same from differentiable primitives, with the table as a tensor.
pub fn reference(ids: &Tensor, table: &Tensor) -> Result<Tensor> {
    Ok(table.index_select(ids, 0)?)
}
