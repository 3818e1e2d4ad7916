//! The gated MLP of a block, in tiles of tokens: no tensor of tokens times `intermediate_size` is larger than a tile, unless
//! it is kept.
//!
//! What is computed again in backward is what backward reads: the output of `down_proj` is not, unless a norm follows it.

use std::ops::Range;

use candle_core::Tensor;

use super::{Block, Branch};
use crate::Result;
use crate::model::LoraDropout;
use crate::ops::{gated_act, residual};

/// Tokens of a tile: enough for its products to run at full speed. A constant, so that the gradients of an adapter, which are
/// added up by tiles, have the same bits whatever is kept.
pub const MLP_TILE_ROWS: usize = 4096;

/// What backward reads of a tile, `gate`, `up: [rows, F]`.
#[derive(Debug)]
pub(super) struct Tile {
    gate: Tensor,
    up: Tensor,
    /// Of each layer that they come from.
    us: Vec<Option<Tensor>>,
    u_down: Option<Tensor>,
    /// The output of `down_proj`, where a norm follows it, `[rows, D]`.
    out: Option<Tensor>,
}

/// The tiles of `rows` tokens, and the dropout of each. Instances that do not fit into one tile have tiles of their own.
fn tiles(rows: usize, dropout: LoraDropout) -> Vec<(Range<usize>, LoraDropout)> {
    if rows <= MLP_TILE_ROWS {
        return vec![(0..rows, dropout)];
    }
    let instances = dropout.instances();
    let rows = rows / instances;
    let of_instance = |instance: usize| {
        let (first, dropout) = (instance * rows, dropout.of_instance(instance));
        let starts = (0..rows).step_by(MLP_TILE_ROWS).enumerate();
        starts.map(move |(number, start)| {
            let end = rows.min(start + MLP_TILE_ROWS);
            (first + start..first + end, dropout.of_tile(number))
        })
    };
    (0..instances).flat_map(of_instance).collect()
}

/// The rows of a matrix that are a tile's.
fn part(t: &Tensor, rows: &Range<usize>) -> Result<Tensor> {
    Ok(t.narrow(0, rows.start, rows.len())?)
}

impl Block {
    /// `mid` with the MLP's output for its input `h` added; each tile is given to `keep` before the next is computed.
    ///
    /// # Shapes
    /// `mid`, `h: [N, D]` -> `[N, D]`.
    pub(super) fn mlp(
        &self,
        mid: &Tensor,
        h: &Tensor,
        dropout: LoraDropout,
        mut keep: impl FnMut(Tile),
    ) -> Result<Tensor> {
        let rows = mid.dim(0)?;
        let mut whole = None;
        for (tile_rows, dropout) in tiles(rows, dropout) {
            let (mut tile, act) = self.gated(part(h, &tile_rows)?, dropout)?;
            let (out, u_down) = self.down.forward(&act, dropout)?;
            drop(act);
            tile.u_down = u_down;
            let (branch, out) = self.normed(out, Branch::Mlp)?;
            tile.out = out;
            keep(tile);
            if tile_rows.len() == rows {
                return residual::forward(mid, branch);
            }
            let whole = match &mut whole {
                Some(whole) => whole,
                empty => empty.insert(residual::unwritten(mid)?),
            };
            let sum = part(whole, &tile_rows)?;
            residual::forward_to(&part(mid, &tile_rows)?, &branch, &sum)?;
        }
        Ok(whole.unwrap_or_else(|| mid.clone()))
    }

    /// Adds the gradient through the MLP to `d_mid`, which holds that of the block's output. Without `kept` tiles they are
    /// computed again, one at a time.
    ///
    /// # Shapes
    /// `d_mid`, `mid: [N, D]`.
    pub(super) fn mlp_backward(
        &self,
        d_mid: &Tensor,
        mid: &Tensor,
        kept: Option<Vec<Tile>>,
        dropout: LoraDropout,
    ) -> Result<()> {
        let mut kept = kept.map(Vec::into_iter);
        for (rows, dropout) in tiles(mid.dim(0)?, dropout) {
            let (d_mid, mid) = (part(d_mid, &rows)?, part(mid, &rows)?);
            let (tile, act) = match kept.as_mut().and_then(Iterator::next) {
                Some(tile) => {
                    let act = gated_act::forward(&tile.gate, &tile.up, self.activation)?;
                    (tile, act)
                }
                None => self.tile_again(&mid, dropout)?,
            };
            self.tile_backward(&d_mid, &mid, tile, act, dropout)?;
        }
        Ok(())
    }

    /// A tile of forward, with the input of `down_proj`.
    fn tile_again(&self, mid: &Tensor, dropout: LoraDropout) -> Result<(Tile, Tensor)> {
        let h = self.mlp_norm.forward(mid)?;
        let (mut tile, act) = self.gated(h, dropout)?;
        if self.branch_norms.is_some() {
            let (out, u_down) = self.down.forward(&act, dropout)?;
            tile.out = Some(out);
            tile.u_down = u_down;
        } else {
            tile.u_down = self.down.down_project(&act, dropout)?;
        }
        Ok((tile, act))
    }

    /// Gate and up of a tile, without the `u` of `down_proj`, and the input of that.
    fn gated(&self, h: Tensor, dropout: LoraDropout) -> Result<(Tile, Tensor)> {
        let ([gate, up], us) = self.gate_up.forward(&h, dropout)?;
        drop(h);
        let act = gated_act::forward(&gate, &up, self.activation)?;
        let tile = Tile {
            gate,
            up,
            us,
            u_down: None,
            out: None,
        };
        Ok((tile, act))
    }

    fn tile_backward(
        &self,
        d_mid: &Tensor,
        mid: &Tensor,
        tile: Tile,
        act: Tensor,
        dropout: LoraDropout,
    ) -> Result<()> {
        let u_down = tile.u_down.as_ref();
        let d_out = self.through_norm(d_mid, tile.out.as_ref(), Branch::Mlp)?;
        drop(tile.out);
        let d_act = self.down.backward(&d_out, &act, u_down, dropout, None)?;
        drop((d_out, act));
        gated_act::backward(&d_act, &tile.gate, &tile.up, self.activation)?;
        drop(d_act);
        let d_gate_up = [tile.gate, tile.up];
        let h = self.mlp_norm.forward(mid)?;
        let d_h = self.mlp_norm.gradient(d_mid);
        let d_h = self
            .gate_up
            .backward(d_gate_up, &h, &tile.us, dropout, d_h)?;
        match d_h {
            Some(d_h) => self.mlp_norm.backward(&d_h, mid, d_mid),
            None => Ok(()),
        }
    }
}
