//! Rotary position embedding, the two halves of a head rotated against each other.
//!
//! For position p and i < E/2: `(x_i, x_{i+E/2}) -> (x_i cos - x_{i+E/2} sin, x_{i+E/2} cos + x_i sin)` with the angle
//! `p f_i`. Backward is the rotation by the opposite angle. Some models multiply cosines and sines by a constant, in both,
//! and some the query at each position by a factor. Where there are fewer than E/2 frequencies, the first columns of a head are
//! turned as if they were all, and the others are left alone. Some models turn columns 2i and 2i + 1 together instead.
//!
//! Source: arXiv:2104.09864, in the layout of transformers (`rotate_half`).

use std::ops::Deref;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::cpu::{self, ROWS_PER_TASK};
use super::launcher::{Launcher, Operand};
use crate::{Error, Result};

const OP: &str = "rope";
/// Pairs of elements that a thread of the kernel takes at a time.
const PER_THREAD: usize = 1;

/// The columns of a head that turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// i and i + E/2.
    Halves,
    /// 2i and 2i + 1.
    Neighbours,
}

/// Cosine and sine for each position, `[P, E/2]` each or narrower, in f32 as transformers computes them.
#[derive(Debug, Clone)]
pub struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
    /// Columns of a head.
    head_dim: usize,
    pairs: Pairs,
    /// The same two where kernels read them.
    on_device: Option<[Tensor; 2]>,
    /// What queries are turned by, where that is another.
    of_queries: Option<Box<RopeTable>>,
}

impl RopeTable {
    /// The table for positions `0..positions` at the frequencies `inv_freq: [E/2]`, in radians per position; all of it times
    /// `amplitude`.
    pub fn new(inv_freq: &[f32], amplitude: f32, positions: usize) -> Self {
        let angle = |p: usize, f: f32| f64::from(p as f32 * f);
        let table = |f: fn(f64) -> f64| {
            (0..positions)
                .flat_map(|p| {
                    let of_frequency = move |&freq: &f32| f(angle(p, freq)) as f32 * amplitude;
                    inv_freq.iter().map(of_frequency)
                })
                .collect()
        };
        Self {
            cos: table(f64::cos),
            sin: table(f64::sin),
            half: inv_freq.len(),
            head_dim: 2 * inv_freq.len(),
            pairs: Pairs::Halves,
            on_device: None,
            of_queries: None,
        }
    }

    /// The table for heads of so many columns, of which the others stay as they are.
    pub fn for_heads_of(self, head_dim: usize) -> Self {
        Self { head_dim, ..self }
    }

    /// The table for models that turn these together.
    pub fn turning(self, pairs: Pairs) -> Self {
        Self { pairs, ..self }
    }

    /// The table for models that multiply the query at position p by `factor(p)` as well.
    pub fn with_scaled_queries(mut self, factor: impl Fn(usize) -> f32) -> Self {
        let scaled = |table: &[f32]| {
            let rows = table.chunks(self.half).enumerate();
            rows.flat_map(|(p, row)| {
                let factor = factor(p);
                row.iter().map(move |value| value * factor)
            })
            .collect()
        };
        self.of_queries = Some(Box::new(Self {
            cos: scaled(&self.cos),
            sin: scaled(&self.sin),
            ..self.clone()
        }));
        self
    }

    /// The table with a copy for the kernels of `device`.
    pub fn on(mut self, device: &Device) -> Result<Self> {
        let copy = |values: &[f32]| Tensor::from_slice(values, values.len(), device);
        self.on_device = Some([copy(&self.cos)?, copy(&self.sin)?]);
        let of_queries = self.of_queries.map(|table| table.on(device).map(Box::new));
        self.of_queries = of_queries.transpose()?;
        Ok(self)
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

/// The position of each row of a batch, `[N]`.
#[derive(Debug, Clone)]
pub struct Positions {
    values: Vec<u32>,
    on_device: Option<Tensor>,
}

impl Positions {
    pub fn new(values: &[u32]) -> Self {
        Self {
            values: values.to_vec(),
            on_device: None,
        }
    }

    /// The positions with a copy for the kernels of `device`.
    pub fn on(mut self, device: &Device) -> Result<Self> {
        let launcher = Launcher::on(OP, device)?;
        self.on_device = Some(launcher.upload(&self.values, self.values.len())?);
        Ok(self)
    }
}

impl Deref for Positions {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        &self.values
    }
}

/// Which way to turn.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Forward,
    Backward,
}

impl Direction {
    fn sign(self) -> f32 {
        match self {
            Self::Forward => 1.0,
            Self::Backward => -1.0,
        }
    }
}

/// Rotates every head of the queries and the keys in place.
///
/// # Shapes
/// `q: [N, H * E]`, `k: [N, K * E]`; a position for each row.
pub fn forward(q: &Tensor, k: &Tensor, positions: &Positions, table: &RopeTable) -> Result<()> {
    let _span = tracing::trace_span!("elementwise").entered();
    rotate([q, k], positions, table, Direction::Forward)
}

/// Turns the gradients of the rotated heads into those of the heads before, in place.
///
/// # Shapes
/// As [`forward`].
pub fn backward(dq: &Tensor, dk: &Tensor, positions: &Positions, table: &RopeTable) -> Result<()> {
    let _span = tracing::trace_span!("elementwise").entered();
    rotate([dq, dk], positions, table, Direction::Backward)
}

fn rotate(
    heads: [&Tensor; 2],
    positions: &Positions,
    table: &RopeTable,
    direction: Direction,
) -> Result<()> {
    for x in heads {
        check(x, positions, table)?;
    }
    let [q, k] = heads;
    let of_queries = table.of_queries.as_deref();
    let Some(launcher) = Launcher::of(OP, q)? else {
        rotate_on_cpu(q, positions, of_queries.unwrap_or(table), direction)?;
        return rotate_on_cpu(k, positions, table, direction);
    };
    let rotate = |x, y, table| rotate_on_device(&launcher, (x, y), positions, table, direction);
    match of_queries {
        None => rotate(q, Some(k), table),
        Some(of_queries) => {
            rotate(q, None, of_queries)?;
            rotate(k, None, table)
        }
    }
}

fn check(x: &Tensor, positions: &[u32], table: &RopeTable) -> Result<()> {
    let (n, width) = x.dims2()?;
    let past_end = positions.iter().find(|&&p| p as usize >= table.positions());
    if n == positions.len() && width.is_multiple_of(table.head_dim) && past_end.is_none() {
        return Ok(());
    }
    Err(Error::Shape {
        op: OP,
        expected: format!(
            "[{n}, heads * {}] at positions below {}",
            table.head_dim,
            table.positions()
        ),
        found: format!(
            "{:?} at {} positions, {past_end:?} past the table",
            x.dims(),
            positions.len()
        ),
    })
}

fn rotate_on_device(
    launcher: &Launcher,
    (x, y): (&Tensor, Option<&Tensor>),
    positions: &Positions,
    table: &RopeTable,
    direction: Direction,
) -> Result<()> {
    let (Some(rows), Some([cos, sin])) = (&positions.on_device, &table.on_device) else {
        return Err(Error::Shape {
            op: OP,
            expected: "positions and a table on the device".into(),
            found: "them on the CPU alone".into(),
        });
    };
    let n = positions.len();
    let heads = |x: &Tensor| x.elem_count() / (n * table.head_dim).max(1);
    let (q_heads, k_heads) = (heads(x), y.map_or(0, heads));
    let operands = [
        Operand::Write(x),
        y.map_or(Operand::Null, Operand::Write),
        Operand::Read(rows),
        Operand::Read(cos),
        Operand::Read(sin),
        Operand::U32(n),
        Operand::U32(q_heads),
        Operand::U32(k_heads),
        Operand::U32(table.half),
        Operand::U32(table.head_dim),
        Operand::U32((table.pairs == Pairs::Neighbours).into()),
        Operand::F32(direction.sign()),
    ];
    let pairs = n * (q_heads + k_heads) * table.half;
    let grid = launcher.grid_stride(pairs, PER_THREAD);
    // SAFETY: a row for each position, whole heads in each, and every position is in the table.
    unsafe { launcher.launch("rope_rotate_bf16", grid, &operands) }
}

fn rotate_on_cpu(
    x: &Tensor,
    positions: &[u32],
    table: &RopeTable,
    direction: Direction,
) -> Result<()> {
    let width = x.dim(1)?;
    let sign = direction.sign();
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
                let angles = || cos.iter().zip(sin).map(|(cos, sin)| (cos, sign * sin));
                let turn = |a: &mut f32, b: &mut f32, (cos, sin): (&f32, f32)| {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                };
                for head in row.chunks_exact_mut(table.head_dim) {
                    match table.pairs {
                        Pairs::Halves => {
                            let (low, high) = head.split_at_mut(table.half);
                            let pairs = low.iter_mut().zip(high).zip(angles());
                            pairs.for_each(|((a, b), angle)| turn(a, b, angle));
                        }
                        Pairs::Neighbours => {
                            let pairs = head.as_chunks_mut::<2>().0.iter_mut().zip(angles());
                            pairs.for_each(|([a, b], angle)| turn(a, b, angle));
                        }
                    }
                }
            }
        });
    })
}

/// The same from differentiable primitives: `x: [N, heads, E]`, `cos`, `sin: [N, 1, E/2]` or narrower.
pub fn reference(x: &Tensor, cos: &Tensor, sin: &Tensor, pairs: Pairs) -> Result<Tensor> {
    let (n, heads, head_dim) = x.dims3()?;
    let half = cos.dim(2)?;
    let turned = x.narrow(2, 0, 2 * half)?;
    let rest = x.narrow(2, 2 * half, head_dim - 2 * half)?;
    // The two of a pair side by side in the last dimension.
    let turned = match pairs {
        Pairs::Halves => turned.reshape((n, heads, 2, half))?.transpose(2, 3)?,
        Pairs::Neighbours => turned.reshape((n, heads, half, 2))?,
    };
    let part = |i: usize| turned.narrow(3, i, 1)?.squeeze(3);
    let (a, b) = (part(0)?, part(1)?);
    let rotated = [
        (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?,
        (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?,
    ];
    let rotated = match pairs {
        Pairs::Halves => Tensor::stack(&rotated, 2)?,
        Pairs::Neighbours => Tensor::stack(&rotated, 3)?,
    };
    let rotated = rotated.reshape((n, heads, 2 * half))?;
    Ok(Tensor::cat(&[rotated, rest], 2)?)
}
