//! Causal attention over packed sequences, with grouped-query heads and an optional sliding window.
//!
//! `P = softmax(scale Q K^T + mask)`, `O = P V`, head by head and sequence by sequence. A tile of query rows meets all
//! keys it may see, so memory is linear in length; forward keeps only the log-sum-exp of each row.
//! Backward, with `P = exp(scale Q K^T - lse)` and `delta = rowsum(dO O)`: `dV = P^T dO`,
//! `dS = P (dO V^T - delta)`, `dQ = scale dS K`, `dK = scale dS^T Q`.
//!
//! Source: arXiv:2205.14135, backward as in arXiv:2307.08691.

mod kernels;

use std::ops::{Deref, Range};

use candle_core::{D, Device, Tensor};
use rayon::prelude::*;

use super::cpu::{expect_dims, read};
use super::gemm::{Into, Mat, MatMut, Shared, matmul};
use super::launcher::Launcher;
use super::simd::{exp, max, sum, vectorized};
use crate::device::ComputeDtype;
use crate::{Error, Result};

const OP: &str = "attention";

/// Query rows that meet their keys at a time.
const QUERY_TILE: usize = 64;

/// One sequence: its rows among the queries, and among the keys and values.
///
/// The last query is at the position of the last key; there may be more keys than queries (a cache).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub queries: Range<usize>,
    pub keys: Range<usize>,
}

/// The sequences of a batch, in order and apart.
#[derive(Debug, Clone)]
pub struct Segments {
    list: Vec<Segment>,
    on_device: Option<kernels::Tiles>,
}

impl From<Vec<Segment>> for Segments {
    fn from(list: Vec<Segment>) -> Self {
        Self {
            list,
            on_device: None,
        }
    }
}

impl Segments {
    /// The segments with what the kernels of `device` need to know of them, for heads of `head_dim` columns.
    pub fn on(mut self, device: &Device, head_dim: usize) -> Result<Self> {
        self.on_device = Some(kernels::Tiles::new(&self.list, head_dim, device)?);
        Ok(self)
    }

    fn tiles(&self, heads: &Heads) -> Result<&kernels::Tiles> {
        let tiles = self.on_device.as_ref();
        let tiles = tiles.filter(|tiles| tiles.head_dim == heads.head_dim);
        tiles.ok_or_else(|| Error::Shape {
            op: OP,
            expected: format!(
                "segments on the device for heads of {} columns",
                heads.head_dim
            ),
            found: match &self.on_device {
                Some(tiles) => format!("them for heads of {}", tiles.head_dim),
                None => "them on the CPU alone".into(),
            },
        })
    }
}

impl Deref for Segments {
    type Target = [Segment];

    fn deref(&self) -> &[Segment] {
        &self.list
    }
}

/// The heads and what a query sees.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// How many positions a query sees, its own included; `None` = all before it.
    pub window: Option<usize>,
    /// What scores are multiplied by before the softmax.
    pub scale: f32,
    /// Of products on the CPU.
    pub compute_dtype: ComputeDtype,
}

/// What most models multiply scores by: `1 / sqrt(head_dim)`.
pub fn default_scale(head_dim: usize) -> f32 {
    (1.0 / (head_dim as f64).sqrt()) as f32
}

impl Heads {
    fn query_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    fn key_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// The keys, counted within the segment, that the query at `position` of it sees.
    fn visible(&self, position: usize) -> Range<usize> {
        let start = self
            .window
            .map_or(0, |window| (position + 1).saturating_sub(window));
        start..position + 1
    }

    /// The query heads that share a key/value head.
    fn group(&self, kv_head: usize) -> Range<usize> {
        let size = self.num_heads / self.num_kv_heads;
        kv_head * size..(kv_head + 1) * size
    }
}

/// What backward needs from forward besides q, k and v.
#[derive(Debug, Clone)]
pub struct Saved {
    /// `[N, H * E]`
    pub out: Tensor,
    /// Log-sum-exp of each row's scores, `[N, H]`.
    pub lse: Tensor,
}

/// # Shapes
/// `q: [N, H * E]`, `k`, `v: [M, K * E]` -> `out: [N, H * E]`, `lse: [N, H]`.
///
/// # Errors
/// [`Error::Shape`] if tensors, heads or segments do not fit together.
pub fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    segments: &Segments,
    heads: Heads,
) -> Result<Saved> {
    let _span = tracing::trace_span!("attention").entered();
    check(q, k, v, segments, &heads)?;
    if let Some(launcher) = Launcher::of(OP, q)? {
        return kernels::forward(&launcher, (q, k, v), segments.tiles(&heads)?, &heads);
    }
    let n = q.dim(0)?;
    let (width, num_heads) = (heads.query_width(), heads.num_heads);
    let mut out = vec![0f32; n * width];
    let mut lse = vec![0f32; n * num_heads];
    {
        let operands = Operands::read(q, k, v, heads)?;
        let (out, lse) = (Shared::new(&mut out), Shared::new(&mut lse));
        let tasks: Vec<_> = segments
            .iter()
            .flat_map(|s| (0..num_heads).map(move |h| (s, h)))
            .collect();
        tasks
            .into_par_iter()
            .for_each_init(Vec::new, |scratch, (segment, head)| {
                for tile in tiles(segment, &heads) {
                    let (rows, start) = (tile.queries.len(), tile.queries.start);
                    // SAFETY: a task alone has this head's columns of its segment's rows.
                    let (mut out, mut lse) = unsafe {
                        (
                            out.mat(
                                start * width + head * heads.head_dim,
                                rows,
                                heads.head_dim,
                                width,
                            ),
                            lse.mat(start * num_heads + head, rows, 1, num_heads),
                        )
                    };
                    forward_tile(&operands, &tile, head, &mut out, &mut lse, scratch);
                }
            });
    }
    Ok(Saved {
        out: Tensor::from_vec(out, (n, width), &Device::Cpu)?,
        lse: Tensor::from_vec(lse, (n, num_heads), &Device::Cpu)?,
    })
}

/// The gradients of `q`, `k` and `v`, shaped as they are.
///
/// # Shapes
/// `d_out: [N, H * E]`; the others as in [`forward`].
///
/// # Errors
/// [`Error::Shape`] as in [`forward`], and on a device for segments with more keys than queries.
pub fn backward(
    d_out: &Tensor,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    saved: &Saved,
    segments: &Segments,
    heads: Heads,
) -> Result<(Tensor, Tensor, Tensor)> {
    let _span = tracing::trace_span!("attention").entered();
    check(q, k, v, segments, &heads)?;
    expect_dims(OP, "d_out", d_out, q.dims())?;
    if let Some(launcher) = Launcher::of(OP, q)? {
        if let Some(cached) = segments.iter().find(|s| s.queries.len() != s.keys.len()) {
            return Err(Error::Shape {
                op: OP,
                expected: "as many queries as keys in backward on a device".into(),
                found: format!("{cached:?}"),
            });
        }
        let tiles = segments.tiles(&heads)?;
        return kernels::backward(&launcher, d_out, (q, k, v), saved, tiles, &heads);
    }
    let (width, key_width) = (heads.query_width(), heads.key_width());
    let mut dq = vec![0f32; q.elem_count()];
    let mut dk = vec![0f32; k.elem_count()];
    let mut dv = vec![0f32; v.elem_count()];
    {
        let operands = Operands::read(q, k, v, heads)?;
        let outputs = (
            read(OP, d_out)?,
            read(OP, &saved.out)?,
            read(OP, &saved.lse)?,
        );
        let (dq, dk, dv) = (
            Shared::new(&mut dq),
            Shared::new(&mut dk),
            Shared::new(&mut dv),
        );
        let tasks: Vec<_> = segments
            .iter()
            .flat_map(|s| (0..heads.num_kv_heads).map(move |h| (s, h)))
            .collect();
        tasks
            .into_par_iter()
            .for_each_init(Scratch::default, |scratch, (segment, kv_head)| {
                for head in heads.group(kv_head) {
                    for tile in tiles(segment, &heads) {
                        let e = heads.head_dim;
                        let key_start = tile.keys.start * key_width + kv_head * e;
                        // SAFETY: a task alone has this key/value head, with its group of query heads, of its segment.
                        let mut grads = unsafe {
                            Grads {
                                dq: dq.mat(
                                    tile.queries.start * width + head * e,
                                    tile.queries.len(),
                                    e,
                                    width,
                                ),
                                dk: dk.mat(key_start, tile.keys.len(), e, key_width),
                                dv: dv.mat(key_start, tile.keys.len(), e, key_width),
                            }
                        };
                        let outputs = (&*outputs.0, &*outputs.1, &*outputs.2);
                        backward_tile(&operands, &tile, head, outputs, &mut grads, scratch);
                    }
                }
            });
    }
    Ok((
        Tensor::from_vec(dq, q.shape(), &Device::Cpu)?,
        Tensor::from_vec(dk, k.shape(), &Device::Cpu)?,
        Tensor::from_vec(dv, v.shape(), &Device::Cpu)?,
    ))
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, segments: &[Segment], heads: &Heads) -> Result<()> {
    let (n, m) = (q.dim(0)?, k.dim(0)?);
    expect_dims(OP, "q", q, &[n, heads.query_width()])?;
    expect_dims(OP, "k", k, &[m, heads.key_width()])?;
    expect_dims(OP, "v", v, &[m, heads.key_width()])?;
    let (mut next_query, mut next_key) = (0, 0);
    for Segment { queries, keys } in segments {
        if queries.start < next_query || keys.start < next_key || queries.len() > keys.len() {
            return Err(Error::Shape {
                op: OP,
                expected: "segments in order, apart, with a key for each query".into(),
                found: format!("queries {queries:?} with keys {keys:?}"),
            });
        }
        (next_query, next_key) = (queries.end, keys.end);
    }
    if next_query > n || next_key > m || !heads.num_heads.is_multiple_of(heads.num_kv_heads) {
        return Err(Error::Shape {
            op: OP,
            expected: format!("segments within {n} queries and {m} keys, heads in equal groups"),
            found: format!("{next_query} queries, {next_key} keys, {heads:?}"),
        });
    }
    Ok(())
}

/// Query rows with the keys that any of them sees, both as rows of the tensors.
struct Tile {
    queries: Range<usize>,
    keys: Range<usize>,
    /// The position of the first query and of the first key, counted within the segment.
    first_position: usize,
    first_key: usize,
}

impl Tile {
    /// The columns of the tile's scores that row `row` sees.
    fn visible(&self, row: usize, heads: &Heads) -> Range<usize> {
        let seen = heads.visible(self.first_position + row);
        seen.start.max(self.first_key) - self.first_key..seen.end - self.first_key
    }
}

fn tiles<'a>(segment: &'a Segment, heads: &'a Heads) -> impl Iterator<Item = Tile> + 'a {
    let cached = segment.keys.len() - segment.queries.len();
    (0..segment.queries.len())
        .step_by(QUERY_TILE)
        .map(move |start| {
            let end = segment.queries.len().min(start + QUERY_TILE);
            let first_key = heads.visible(cached + start).start;
            Tile {
                queries: segment.queries.start + start..segment.queries.start + end,
                keys: segment.keys.start + first_key..segment.keys.start + cached + end,
                first_position: cached + start,
                first_key,
            }
        })
}

struct Operands<'a> {
    q: super::cpu::Read<'a>,
    k: super::cpu::Read<'a>,
    v: super::cpu::Read<'a>,
    heads: Heads,
}

impl<'a> Operands<'a> {
    fn read(q: &'a Tensor, k: &'a Tensor, v: &'a Tensor, heads: Heads) -> Result<Self> {
        Ok(Self {
            q: read(OP, q)?,
            k: read(OP, k)?,
            v: read(OP, v)?,
            heads,
        })
    }

    /// This head's columns of a tile's rows of a tensor shaped like `q`.
    fn query_rows<'b>(&self, data: &'b [f32], tile: &Tile, head: usize) -> Mat<'b> {
        let (e, width) = (self.heads.head_dim, self.heads.query_width());
        Mat::strided(
            &data[tile.queries.start * width + head * e..],
            tile.queries.len(),
            e,
            width,
        )
    }

    fn key_rows<'b>(&self, data: &'b [f32], tile: &Tile, head: usize) -> Mat<'b> {
        let (e, width) = (self.heads.head_dim, self.heads.key_width());
        let kv_head = head / (self.heads.num_heads / self.heads.num_kv_heads);
        Mat::strided(
            &data[tile.keys.start * width + kv_head * e..],
            tile.keys.len(),
            e,
            width,
        )
    }

    /// `scale Q K^T` of a tile into `scores`.
    fn scores(&self, tile: &Tile, head: usize, scores: &mut Vec<f32>) {
        let (rows, cols) = (tile.queries.len(), tile.keys.len());
        scores.resize(rows * cols, 0.0);
        let (q, k) = (
            self.query_rows(&self.q, tile, head),
            self.key_rows(&self.k, tile, head),
        );
        matmul(
            &mut MatMut::new(scores, rows, cols),
            Into::Overwrite,
            q.to(self.heads.compute_dtype),
            k.t(),
            self.heads.scale,
        );
    }
}

fn forward_tile(
    operands: &Operands<'_>,
    tile: &Tile,
    head: usize,
    out: &mut MatMut<'_>,
    lse: &mut MatMut<'_>,
    scores: &mut Vec<f32>,
) {
    operands.scores(tile, head, scores);
    let (rows, cols) = (tile.queries.len(), tile.keys.len());
    for (row, scores) in scores.chunks_exact_mut(cols).enumerate() {
        let visible = tile.visible(row, &operands.heads);
        lse.row(row)[0] = vectorized(
            #[inline(always)]
            || softmax_row(scores, visible),
        );
    }
    let v = operands.key_rows(&operands.v, tile, head);
    let p = Mat::new(scores, rows, cols).to(operands.heads.compute_dtype);
    matmul(out, Into::Overwrite, p, v, 1.0);
}

/// Replaces the visible scores by their softmax and the others by 0; gives their log-sum-exp.
#[inline(always)]
fn softmax_row(scores: &mut [f32], visible: Range<usize>) -> f32 {
    scores[..visible.start].fill(0.0);
    scores[visible.end..].fill(0.0);
    let seen = &mut scores[visible];
    let largest = max(seen);
    for s in seen.iter_mut() {
        *s = exp(*s - largest);
    }
    let total = sum([&*seen], |[p]| p);
    let inverse = 1.0 / total;
    for s in seen.iter_mut() {
        *s *= inverse;
    }
    largest + total.ln()
}

#[derive(Default)]
struct Scratch {
    p: Vec<f32>,
    ds: Vec<f32>,
}

struct Grads<'a> {
    dq: MatMut<'a>,
    dk: MatMut<'a>,
    dv: MatMut<'a>,
}

fn backward_tile(
    operands: &Operands<'_>,
    tile: &Tile,
    head: usize,
    (d_out, out, lse): (&[f32], &[f32], &[f32]),
    grads: &mut Grads<'_>,
    Scratch { p, ds }: &mut Scratch,
) {
    let heads = &operands.heads;
    let (rows, cols, e) = (tile.queries.len(), tile.keys.len(), heads.head_dim);
    let dtype = heads.compute_dtype;
    operands.scores(tile, head, p);
    ds.resize(rows * cols, 0.0);
    let d_out_rows = operands.query_rows(d_out, tile, head);
    let v = operands.key_rows(&operands.v, tile, head);
    matmul(
        &mut MatMut::new(ds, rows, cols),
        Into::Overwrite,
        d_out_rows.to(dtype),
        v.t(),
        1.0,
    );
    for (row, (p, ds)) in p
        .chunks_exact_mut(cols)
        .zip(ds.chunks_exact_mut(cols))
        .enumerate()
    {
        let query = tile.queries.start + row;
        let start = query * heads.query_width() + head * e;
        let (d_out, out) = (&d_out[start..start + e], &out[start..start + e]);
        let lse = lse[query * heads.num_heads + head];
        let visible = tile.visible(row, heads);
        vectorized(
            #[inline(always)]
            || {
                let delta = sum([d_out, out], |[d, o]| d * o);
                softmax_row_backward(p, ds, visible, lse, delta);
            },
        );
    }
    let (p, ds) = (Mat::new(p, rows, cols), Mat::new(ds, rows, cols));
    let (q, k) = (
        operands.query_rows(&operands.q, tile, head),
        operands.key_rows(&operands.k, tile, head),
    );
    matmul(&mut grads.dv, Into::Add, p.t().to(dtype), d_out_rows, 1.0);
    matmul(&mut grads.dq, Into::Overwrite, ds.to(dtype), k, heads.scale);
    matmul(&mut grads.dk, Into::Add, ds.t().to(dtype), q, heads.scale);
}

/// Turns scores into probabilities and `dP` into `dS = P (dP - delta)`; both 0 where nothing is seen.
#[inline(always)]
fn softmax_row_backward(
    p: &mut [f32],
    ds: &mut [f32],
    visible: Range<usize>,
    lse: f32,
    delta: f32,
) {
    for row in [&mut *p, &mut *ds] {
        row[..visible.start].fill(0.0);
        row[visible.end..].fill(0.0);
    }
    for (p, ds) in p[visible.clone()].iter_mut().zip(&mut ds[visible]) {
        *p = exp(*p - lse);
        *ds = *p * (*ds - delta);
    }
}

/// The same from differentiable primitives, one segment at a time with a full score matrix.
///
/// # Shapes
/// `q: [N, H, E]`, `k`, `v: [M, K, E]` -> `[N, H, E]`.
pub fn reference(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    segments: &[Segment],
    heads: Heads,
) -> Result<Tensor> {
    let scale = f64::from(heads.scale);
    let group = heads.num_heads / heads.num_kv_heads;
    let mut outs = Vec::with_capacity(segments.len());
    for Segment { queries, keys } in segments {
        let rows = |t: &Tensor, range: &Range<usize>| t.narrow(0, range.start, range.len());
        let expand = |t: Tensor| -> Result<Tensor> {
            let (m, kv, e) = t.dims3()?;
            Ok(t.unsqueeze(2)?
                .broadcast_as((m, kv, group, e))?
                .reshape((m, kv * group, e))?)
        };
        let q = rows(q, queries)?.transpose(0, 1)?.contiguous()?; // [H, N, E]
        let k = expand(rows(k, keys)?)?.transpose(0, 1)?.contiguous()?; // [H, M, E]
        let v = expand(rows(v, keys)?)?.transpose(0, 1)?.contiguous()?;
        let cached = keys.len() - queries.len();
        let mask: Vec<f64> = (0..queries.len())
            .flat_map(|row| {
                let visible = heads.visible(cached + row);
                (0..keys.len()).map(move |key| if visible.contains(&key) { 0.0 } else { -1e30 })
            })
            .collect();
        let mask = Tensor::from_vec(mask, (1, queries.len(), keys.len()), &Device::Cpu)?
            .to_dtype(q.dtype())?;
        let scores =
            (q.matmul(&k.transpose(1, 2)?.contiguous()?)? * scale)?.broadcast_add(&mask)?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
        outs.push(weights.matmul(&v)?.transpose(0, 1)?.contiguous()?);
    }
    Ok(Tensor::cat(&outs, 0)?)
}
