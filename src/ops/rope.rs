//! Rotary position embedding, the two halves of a head rotated against each other.
//!
//! For position p and i < E/2: `(x_i, x_{i+E/2}) -> (x_i cos - x_{i+E/2} sin, x_{i+E/2} cos + x_i sin)` with the angle
//! `p f_i`. Backward is the rotation by the opposite angle.
//!
//! Source: arXiv:2104.09864, in the layout of transformers (`rotate_half`).

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::cpu::{self, ROWS_PER_TASK};
use crate::{Error, Result};

const OP: &str = "rope";

/// Cosine and sine for each position, `[P, E/2]` each, in f32 as transformers computes them.
#[derive(Debug, Clone)]
pub struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl RopeTable {
    /// The table for positions `0..positions` at the frequencies `inv_freq: [E/2]`, in radians per position.
    pub fn new(inv_freq: &[f32], positions: usize) -> Self {
        let angle = |p: usize, f: f32| f64::from(p as f32 * f);
        let table = |f: fn(f64) -> f64| {
            (0..positions)
                .flat_map(|p| inv_freq.iter().map(move |&freq| f(angle(p, freq)) as f32))
                .collect()
        };
        Self {
            cos: table(f64::cos),
            sin: table(f64::sin),
            half: inv_freq.len(),
        }
    }

    /// Positions the table holds.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    /// Cosine and sine of each row of a batch as tensors `[N, 1, E/2]`, for [`reference()`].
    pub fn gather(&self, positions: &[u32]) -> Result<(Tensor, Tensor)> {
        let rows = |table: &[f32]| {
            let data = positions
                .iter()
                .flat_map(|&p| self.row(table, p).to_vec())
                .collect();
            Tensor::from_vec(data, (positions.len(), 1, self.half), &Device::Cpu)
        };
        Ok((rows(&self.cos)?, rows(&self.sin)?))
    }

    fn row<'a>(&self, table: &'a [f32], position: u32) -> &'a [f32] {
        &table[position as usize * self.half..][..self.half]
    }
}

/// Which way to turn.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Forward,
    Backward,
}

/// Rotates every head of `x` in place.
///
/// # Shapes
/// `x: [N, heads * E]`, `positions: [N]`.
pub fn forward(x: &Tensor, positions: &[u32], table: &RopeTable) -> Result<()> {
    rotate(x, positions, table, Direction::Forward)
}

/// Turns the gradient of the rotated heads into that of the heads before, in place.
///
/// # Shapes
/// As [`forward`].
pub fn backward(dx: &Tensor, positions: &[u32], table: &RopeTable) -> Result<()> {
    rotate(dx, positions, table, Direction::Backward)
}

fn rotate(x: &Tensor, positions: &[u32], table: &RopeTable, direction: Direction) -> Result<()> {
    let (n, width) = x.dims2()?;
    let past_end = positions.iter().find(|&&p| p as usize >= table.positions());
    if n != positions.len() || width % (2 * table.half) != 0 || past_end.is_some() {
        return Err(Error::Shape {
            op: OP,
            expected: format!(
                "[{n}, heads * {}] at positions below {}",
                2 * table.half,
                table.positions()
            ),
            found: format!(
                "{:?} at {} positions, {past_end:?} past the table",
                x.dims(),
                positions.len()
            ),
        });
    }
    let sign = if direction == Direction::Forward {
        1.0
    } else {
        -1.0
    };
    cpu::write(OP, x, |x| {
        let tasks = x
            .par_chunks_mut(ROWS_PER_TASK * width)
            .zip(positions.par_chunks(ROWS_PER_TASK));
        tasks.for_each(|(rows, positions)| {
            for (row, &position) in rows.chunks_exact_mut(width).zip(positions) {
                let (cos, sin) = (
                    table.row(&table.cos, position),
                    table.row(&table.sin, position),
                );
                for head in row.chunks_exact_mut(2 * table.half) {
                    let (low, high) = head.split_at_mut(table.half);
                    for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                        let (x, y, sin) = (*a, *b, sign * sin);
                        *a = x * cos - y * sin;
                        *b = y * cos + x * sin;
                    }
                }
            }
        });
    })
}

/// The same from differentiable primitives: `x: [N, heads, E]`, `cos`, `sin: [N, 1, E/2]`.
pub fn reference(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.dim(2)? / 2;
    let (low, high) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let rotated_low = (low.broadcast_mul(cos)? - high.broadcast_mul(sin)?)?;
    let rotated_high = (high.broadcast_mul(cos)? + low.broadcast_mul(sin)?)?;
    Ok(Tensor::cat(&[rotated_low, rotated_high], 2)?)
}
