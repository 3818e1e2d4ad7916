//! Attention on the CPU: a task for each head of each sequence, in tiles of query rows.

use std::ops::Range;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::{Heads, OP, Saved, Segment};
use crate::Result;
use crate::ops::cpu::{Read, read};
use crate::ops::gemm::{Into, Mat, MatMut, Shared, matmul};
use crate::ops::simd::{exp, max, sum, vectorized};
use crate::ops::soft_cap::SoftCap;

/// Query rows that meet their keys at a time.
const QUERY_TILE: usize = 64;

/// # Shapes
/// As [`super::forward`].
pub(super) fn forward(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    segments: &[Segment],
    heads: Heads,
) -> Result<Saved> {
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

/// # Shapes
/// As [`super::backward`].
pub(super) fn backward(
    d_out: &Tensor,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    saved: &Saved,
    segments: &[Segment],
    heads: Heads,
) -> Result<(Tensor, Tensor, Tensor)> {
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
    q: Read<'a>,
    k: Read<'a>,
    v: Read<'a>,
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
            || {
                SoftCap::apply(operands.heads.soft_cap, &mut scores[visible.clone()]);
                softmax_row(scores, visible)
            },
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
                SoftCap::apply(heads.soft_cap, &mut p[visible.clone()]);
                match heads.soft_cap {
                    None => softmax_row_backward(p, ds, visible, lse, delta, |_| 1.0),
                    Some(cap) => {
                        softmax_row_backward(p, ds, visible, lse, delta, |s| cap.slope(s));
                    }
                }
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

/// Turns scores into probabilities and `dP` into `dS = P (dP - delta)`, times the slope at a score; both 0 where nothing is
/// seen.
#[inline(always)]
fn softmax_row_backward(
    p: &mut [f32],
    ds: &mut [f32],
    visible: Range<usize>,
    lse: f32,
    delta: f32,
    slope: impl Fn(f32) -> f32,
) {
    for row in [&mut *p, &mut *ds] {
        row[..visible.start].fill(0.0);
        row[visible.end..].fill(0.0);
    }
    for (p, ds) in p[visible.clone()].iter_mut().zip(&mut ds[visible]) {
        let slope = slope(*p);
        *p = exp(*p - lse);
        *ds = *p * (*ds - delta) * slope;
    }
}
