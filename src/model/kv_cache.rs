//! Keys and values of the tokens a sequence has so far, for generation.

use std::borrow::Cow;

use candle_core::Tensor;

use super::block::Block;
use super::config::RopeConfig;
use super::decoder::Decoder;
use crate::ops::matrix_dropout::MatrixDropout;
use crate::{Error, Result};

/// Tokens that there is memory for at first.
const FIRST_TOKENS: usize = 256;

/// The cache of one sequence, whose memory grows with it. It borrows the decoder, which is not trained and keeps its adapters
/// for as long.
#[derive(Debug)]
pub struct KvCache<'m> {
    pub(super) layers: Vec<LayerCache<'m>>,
    /// Those of the model of an ensemble whose cache this is.
    pub(super) masks: Option<MatrixDropout>,
    /// The tokens held.
    ids: Vec<u32>,
    capacity: usize,
}

/// One layer's part.
#[derive(Debug)]
pub(super) struct LayerCache<'m> {
    /// The layer, with what it need not compute for each token.
    pub(super) block: Cow<'m, Block>,
    pub(super) rows: CachedRows,
}

/// Keys and values of a layer, `k`, `v: [N, K * E]`, of which `len` rows are in use; N grows up to `capacity`.
#[derive(Debug)]
pub(super) struct CachedRows {
    k: Tensor,
    v: Tensor,
    len: usize,
    capacity: usize,
}

impl<'m> KvCache<'m> {
    /// An empty cache for up to `capacity` tokens.
    pub fn new(decoder: &'m Decoder, capacity: usize) -> Result<Self> {
        let config = decoder.config();
        let width = config.num_kv_heads * config.head_dim;
        let placement = decoder.placement();
        let rows = capacity.min(FIRST_TOKENS);
        let empty = || Tensor::zeros((rows, width), placement.dtype, &placement.device);
        let layers = decoder.blocks().iter().map(|block| {
            let (k, v) = (empty()?, empty()?);
            Ok(LayerCache {
                block: block.lasting(),
                rows: CachedRows {
                    k,
                    v,
                    len: 0,
                    capacity,
                },
            })
        });
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            masks: None,
            ids: Vec::new(),
            capacity,
        })
    }

    /// The cache of a model whose adapters have these masks on their matrices.
    pub fn masked(self, masks: MatrixDropout) -> Self {
        Self {
            masks: Some(masks),
            ..self
        }
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.ids.truncate(len);
        for layer in &mut self.layers {
            layer.rows.len = layer.rows.len.min(len);
        }
    }

    /// Adds `ids` to the tokens held; their rows are appended layer by layer.
    pub(super) fn advance(&mut self, ids: &[u32]) -> Result<std::ops::Range<usize>> {
        let start = self.len();
        if start + ids.len() > self.capacity {
            return Err(Error::Shape {
                op: "kv_cache",
                expected: format!("at most {} tokens", self.capacity),
                found: (start + ids.len()).to_string(),
            });
        }
        self.ids.extend(ids);
        Ok(start..self.len())
    }

    /// Where a text of this length has other rotary frequencies than the keys that are held, forgets these and gives all of
    /// its tokens, the last of which are `ids`.
    pub(super) fn ids_to_read_again(&mut self, ids: &[u32], rope: &RopeConfig) -> Option<Vec<u32>> {
        let held = self.len();
        if held == 0 || rope.is_long(held) == rope.is_long(held + ids.len()) {
            return None;
        }
        let all = [&self.ids, ids].concat();
        self.truncate(0);
        Some(all)
    }
}

impl CachedRows {
    /// Adds the rows and gives all keys and values so far.
    pub(super) fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let len = self.len + k.dim(0)?;
        for (rows, new) in [(&mut self.k, k), (&mut self.v, v)] {
            if len > rows.dim(0)? {
                // Twice as many, so that each is copied once or so.
                let grown = len.max(2 * self.len).min(self.capacity);
                *rows = with_room_for(grown, &rows.narrow(0, 0, self.len)?)?;
            }
            rows.slice_set(new, 0, self.len)?;
        }
        self.len = len;
        Ok((
            self.k.narrow(0, 0, self.len)?,
            self.v.narrow(0, 0, self.len)?,
        ))
    }
}

/// The same rows at the beginning of `count`.
fn with_room_for(count: usize, rows: &Tensor) -> Result<Tensor> {
    let larger = Tensor::zeros((count, rows.dim(1)?), rows.dtype(), rows.device())?;
    larger.slice_set(&rows.contiguous()?, 0, 0)?;
    Ok(larger)
}
