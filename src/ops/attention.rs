//! Causal attention over packed sequences, with grouped-query heads and an optional sliding window.
//!
//! `P = softmax(S + mask)` of `S = scale Q K^T`, which some models cap, and `O = P V`, head by head and sequence by sequence. A
//! tile of query rows meets all keys it may see, so memory is linear in length; forward keeps only the log-sum-exp of each row.
//! Backward, with `P = exp(S - lse)` and `delta = rowsum(dO O)`: `dV = P^T dO`, `dS = P (dO V^T - delta)` times the slope of the
//! cap, `dQ = scale dS K`, `dK = scale dS^T Q`.
//!
//! Source: arXiv:2205.14135, backward as in arXiv:2307.08691.

mod cpu;
mod kernels;

use std::ops::{Deref, Range};

use candle_core::{D, Device, Tensor};

use super::cpu::expect_dims;
use super::launcher::Launcher;
use super::soft_cap::SoftCap;
use crate::device::ComputeDtype;
use crate::{Error, Result};

const OP: &str = "attention";

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
    /// The segments with what the kernels of `device` need to know of them, for such heads, whatever their window.
    pub fn on(mut self, device: &Device, heads: &Heads) -> Result<Self> {
        self.on_device = Some(kernels::Tiles::new(&self.list, heads, device)?);
        Ok(self)
    }

    fn tiles(&self, heads: &Heads) -> Result<&kernels::Tiles> {
        let tiles = self.on_device.as_ref();
        let tiles = tiles.filter(|tiles| tiles.are_for(heads));
        tiles.ok_or_else(|| Error::Shape {
            op: OP,
            expected: format!("segments on the device for {heads:?}"),
            found: match &self.on_device {
                Some(tiles) => format!("them for {:?}", tiles.heads),
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
    /// What they may then be at most.
    pub soft_cap: Option<SoftCap>,
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
    cpu::forward((q, k, v), segments, heads)
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
    cpu::backward(d_out, (q, k, v), saved, segments, heads)
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
        let scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? * scale)?;
        let scores = SoftCap::reference(heads.soft_cap, &scores)?.broadcast_add(&mask)?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
        outs.push(weights.matmul(&v)?.transpose(0, 1)?.contiguous()?);
    }
    Ok(Tensor::cat(&outs, 0)?)
}
