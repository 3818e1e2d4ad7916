//! The device side: tiles of the segments, and the launches that work through them.

use candle_core::{DType, Device, Tensor};

use super::{Heads, OP, Saved, Segment};
use crate::ops::launcher::{Grid, Launcher, Operand};
use crate::ops::soft_cap::SoftCap;
use crate::{Error, Result};

/// Kernels for heads of up to `head_dim` columns, as the table at the head of `cuda/attention.cu` has them.
#[derive(Debug)]
struct Kernel {
    head_dim: usize,
    /// Whether they are those of `cuda/attention_hopper.cu`, for heads of `head_dim` columns and no others.
    is_hopper: bool,
    forward: Tiling,
    backward_q: Tiling,
    backward_kv: Tiling,
}

/// Rows of a tile, and dynamic shared memory of a block.
#[derive(Debug, Clone, Copy)]
struct Tiling {
    rows: usize,
    shared_bytes: usize,
}

const fn kernel(
    head_dim: usize,
    forward: (usize, usize),
    backward_q: (usize, usize),
    backward_kv: (usize, usize),
) -> Kernel {
    const fn tiling((rows, shared_bytes): (usize, usize)) -> Tiling {
        Tiling { rows, shared_bytes }
    }
    Kernel {
        head_dim,
        is_hopper: false,
        forward: tiling(forward),
        backward_q: tiling(backward_q),
        backward_kv: tiling(backward_kv),
    }
}

const KERNELS: [Kernel; 5] = [
    kernel(64, (128, 49_152), (128, 65_536), (64, 58_368)),
    kernel(80, (128, 40_960), (128, 61_440), (64, 70_656)),
    kernel(96, (128, 49_152), (128, 73_728), (64, 82_944)),
    kernel(128, (128, 65_536), (128, 98_304), (64, 70_144)),
    kernel(256, (64, 98_304), (64, 98_304), (32, 100_864)),
];

const HOPPER: Kernel = Kernel {
    is_hopper: true,
    ..kernel(128, (128, 164_864), (128, 148_480), (128, 166_400))
};

impl Kernel {
    /// The name of the one for `pass`.
    fn name(&self, pass: &str) -> String {
        let suffix = if self.is_hopper { "_hopper" } else { "" };
        format!("attention_{pass}_bf16_{}{suffix}", self.head_dim)
    }

    fn grid(&self, tiling: Tiling, tiles: &Tensor, heads: usize) -> Result<Grid> {
        let threads = if self.is_hopper { 256 } else { 128 };
        Ok(Grid::blocks(tiles.dim(0)?, heads)
            .with_threads(threads)
            .with_shared_bytes(tiling.shared_bytes))
    }

    /// The scalars that it takes.
    fn scalars(&self, heads: &Heads) -> Vec<Operand<'static>> {
        let mut scalars = vec![
            Operand::U32(heads.num_heads),
            Operand::U32(heads.num_kv_heads),
            Operand::U32(heads.head_dim),
            Operand::F32(heads.scale),
            Operand::U32(heads.window.unwrap_or(0)),
        ];
        if !self.is_hopper {
            scalars.push(SoftCap::operand(heads.soft_cap));
        }
        scalars
    }

    /// The fastest where there are warpgroups and no cap, else the smallest that hold the head.
    fn of(heads: &Heads, launcher: &Launcher) -> Result<&'static Self> {
        let head_dim = heads.head_dim;
        let is_hopper = head_dim == HOPPER.head_dim && heads.soft_cap.is_none();
        if is_hopper && launcher.runtime().has_warpgroup_products() {
            return Ok(&HOPPER);
        }
        let fits = |kernel: &&Self| head_dim <= kernel.head_dim;
        KERNELS.iter().find(fits).ok_or_else(|| Error::Shape {
            op: OP,
            expected: "heads of at most 256 columns".into(),
            found: head_dim.to_string(),
        })
    }
}

/// The tiles of a batch's segments, for the grids of the three kernels: `[tiles, 5]` each.
#[derive(Debug, Clone)]
pub(super) struct Tiles {
    /// What they were made for, whatever the window.
    pub(super) heads: Heads,
    kernel: &'static Kernel,
    forward: Tensor,
    backward_q: Tensor,
    backward_kv: Tensor,
}

impl Tiles {
    pub(super) fn new(segments: &[Segment], heads: &Heads, device: &Device) -> Result<Self> {
        let launcher = Launcher::on(OP, device)?;
        let kernel = Kernel::of(heads, &launcher)?;
        let lists = [
            query_tiles(segments, kernel.forward.rows)?,
            query_tiles(segments, kernel.backward_q.rows)?,
            key_tiles(segments, kernel.backward_kv.rows)?,
        ];
        let [first, second, third] = [0, 1, 2].map(|list| lists[list].len());
        let words = lists.concat().into_flattened();
        let all = (first + second + third, WORDS);
        let all = launcher.upload(&words, all)?;
        Ok(Self {
            heads: *heads,
            kernel,
            forward: all.narrow(0, 0, first)?,
            backward_q: all.narrow(0, first, second)?,
            backward_kv: all.narrow(0, first + second, third)?,
        })
    }

    /// Whether they are for such heads too.
    pub(super) fn are_for(&self, heads: &Heads) -> bool {
        let of_kernel = |heads: &Heads| (heads.head_dim, heads.soft_cap.is_some());
        of_kernel(heads) == of_kernel(&self.heads)
    }
}

/// `AttentionTile` of `cuda/attention.cu`: query row, queries, key row, keys, position.
type TileWords = [u32; WORDS];
const WORDS: usize = 5;

fn words(values: [usize; WORDS]) -> Result<TileWords> {
    let word = |value: usize| {
        u32::try_from(value).map_err(|_| Error::Shape {
            op: OP,
            expected: "fewer than 2^32 rows".into(),
            found: value.to_string(),
        })
    };
    let mut words = [0; WORDS];
    for (to, value) in words.iter_mut().zip(values) {
        *to = word(value)?;
    }
    Ok(words)
}

/// Up to `rows` queries with all keys of their segment; those that see most keys first, so that no long block is last.
fn query_tiles(segments: &[Segment], rows: usize) -> Result<Vec<TileWords>> {
    let mut tiles = Vec::new();
    for Segment { queries, keys } in segments {
        let cached = keys.len() - queries.len();
        for start in (0..queries.len()).step_by(rows) {
            let count = rows.min(queries.len() - start);
            let position = cached + start;
            tiles.push(words([
                queries.start + start,
                count,
                keys.start,
                keys.len(),
                position,
            ])?);
        }
    }
    tiles.sort_by_key(|&[.., position]| std::cmp::Reverse(position));
    Ok(tiles)
}

/// Up to `rows` keys with all queries of their segment, of which there are as many as keys; those that are seen by most queries
/// first.
fn key_tiles(segments: &[Segment], rows: usize) -> Result<Vec<TileWords>> {
    let mut tiles = Vec::new();
    for Segment { queries, keys } in segments {
        for start in (0..keys.len()).step_by(rows) {
            let count = rows.min(keys.len() - start);
            tiles.push(words([
                queries.start,
                queries.len(),
                keys.start + start,
                count,
                start,
            ])?);
        }
    }
    tiles.sort_by_key(|&[_, queries, _, _, position]| {
        std::cmp::Reverse(queries - position.min(queries))
    });
    Ok(tiles)
}

pub(super) fn forward(
    launcher: &Launcher,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    tiles: &Tiles,
    heads: &Heads,
) -> Result<Saved> {
    let kernel = tiles.kernel;
    let saved = Saved {
        out: launcher.empty(q.shape(), DType::BF16)?,
        lse: launcher.empty((q.dim(0)?, heads.num_heads), DType::F32)?,
    };
    let mut operands = vec![
        Operand::Read(q),
        Operand::Read(k),
        Operand::Read(v),
        Operand::Read(&tiles.forward),
    ];
    operands.extend(kernel.scalars(heads));
    operands.extend([Operand::Write(&saved.out), Operand::Write(&saved.lse)]);
    let grid = kernel.grid(kernel.forward, &tiles.forward, heads.num_heads)?;
    let name = kernel.name("forward");
    // SAFETY: the tiles are of segments that were checked against the rows of q, k and v.
    unsafe { launcher.launch(&name, grid, &operands)? };
    Ok(saved)
}

pub(super) fn backward(
    launcher: &Launcher,
    d_out: &Tensor,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    saved: &Saved,
    tiles: &Tiles,
    heads: &Heads,
) -> Result<(Tensor, Tensor, Tensor)> {
    let kernel = tiles.kernel;
    let delta = delta(launcher, d_out, &saved.out, heads)?;
    let gradient = |of: &Tensor| launcher.empty(of.shape(), DType::BF16);
    let (dq, dk, dv) = (gradient(q)?, gradient(k)?, gradient(v)?);
    let launch = |name: &str, tiling: Tiling, tiles: &Tensor, y: usize, gradients: &[&Tensor]| {
        let mut operands: Vec<Operand<'_>> = [q, k, v, d_out, &saved.lse, &delta, tiles]
            .map(Operand::Read)
            .into();
        operands.extend(kernel.scalars(heads));
        operands.extend(gradients.iter().map(|&t| Operand::Write(t)));
        let name = kernel.name(name);
        // SAFETY: the tiles are of segments that were checked against the rows of q, k and v.
        unsafe { launcher.launch(&name, kernel.grid(tiling, tiles, y)?, &operands) }
    };
    let (queries, keys) = (&tiles.backward_q, &tiles.backward_kv);
    launch(
        "backward_q",
        kernel.backward_q,
        queries,
        heads.num_heads,
        &[&dq],
    )?;
    launch(
        "backward_kv",
        kernel.backward_kv,
        keys,
        heads.num_kv_heads,
        &[&dk, &dv],
    )?;
    Ok((dq, dk, dv))
}

/// `rowsum(dO O)` of each head, `[N, H]`.
fn delta(launcher: &Launcher, d_out: &Tensor, out: &Tensor, heads: &Heads) -> Result<Tensor> {
    const WARPS: usize = 8;
    let rows = d_out.dim(0)?;
    let delta = launcher.empty((rows, heads.num_heads), DType::F32)?;
    let operands = [
        Operand::Read(d_out),
        Operand::Read(out),
        Operand::U32(rows),
        Operand::U32(heads.num_heads),
        Operand::U32(heads.head_dim),
        Operand::Write(&delta),
    ];
    let grid = Grid::blocks((rows * heads.num_heads).div_ceil(WARPS), 1);
    // SAFETY: both have rows of num_heads heads of head_dim columns.
    unsafe { launcher.launch("attention_backward_delta_bf16", grid, &operands)? };
    Ok(delta)
}
