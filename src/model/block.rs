//! A decoder block, forward and backward in plain sight.
//!
//! ```text
//! mid = x + o_proj(attention(rope(q_proj(h)), rope(k_proj(h)), v_proj(h)))    h  = rms_norm(x)
//! y   = mid + down_proj(act(gate_proj(h2)) up_proj(h2))                       h2 = rms_norm(mid)
//! ```
//!
//! Some models have a norm after `o_proj` and `down_proj` too, or instead, on `q` and `k`, or no `rope` in some blocks.

mod input_norm;
mod mlp;
mod order;

use std::borrow::Cow;
use std::sync::OnceLock;

use candle_core::Tensor;

pub(super) use input_norm::InputNorm;
pub use mlp::MLP_TILE_ROWS;

use super::branches::{Branches, InputGradient};
use super::config::{Activation, LayerRope};
use super::kv_cache::CachedRows;
use super::lora_dropout::LoraDropout;
use super::lora_linear::LoraLinear;
use super::names::Module;
use super::rope_tables::RopeTables;
use crate::Result;
use crate::ops::attention::{self, Heads, Segments};
use crate::ops::host_memory::Parked;
use crate::ops::matrix_dropout::MatrixDropout;
use crate::ops::rms_norm;
use crate::ops::rope::{self, Positions};

/// What a block keeps from forward for backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationPolicy {
    /// All that backward reads.
    Keep,
    /// The block's input; forward runs again in backward.
    Recompute,
    /// The same, with the input in pinned memory of the host until then. As `Recompute` where the device is the host.
    Offload,
}

/// Whether anything below a block is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputGrad {
    Needed,
    /// No adapter lies below: the gradient of the block's input would be thrown away.
    Skip,
}

/// What a block needs to know of the rows of a batch: where they stand, and what of them the adapters do not see.
#[derive(Debug, Clone, Copy)]
pub struct Layout<'a> {
    /// Position of each row in its sequence, `[N]`.
    pub positions: &'a Positions,
    pub segments: &'a Segments,
    pub rope: &'a RopeTables,
    /// Nothing is dropped but in training and by the models of an ensemble.
    pub dropout: LoraDropout,
}

impl Layout<'_> {
    /// The same for adapters with these masks on their matrices.
    pub(super) fn masked(self, matrices: Option<MatrixDropout>) -> Self {
        let inputs = self.dropout.inputs;
        Self {
            dropout: LoraDropout { inputs, matrices },
            ..self
        }
    }
}

/// What forward leaves for backward, by [`ActivationPolicy`].
#[derive(Debug)]
pub enum Saved {
    Kept(Box<Activations>),
    /// The block's input, `[N, D]`.
    Input(Tensor),
    /// That on the host.
    Parked(Box<Parked>),
}

impl Saved {
    /// Begins to bring back what is on the host.
    pub(super) fn fetch(&mut self) -> Result<()> {
        match self {
            Self::Parked(input) => input.fetch(),
            Self::Kept(_) | Self::Input(_) => Ok(()),
        }
    }
}

/// Everything that backward reads.
#[derive(Debug)]
pub struct Activations {
    x: Tensor,
    qkv: Qkv,
    attention: attention::Saved,
    /// The output of `o_proj`, where a norm follows it.
    attended: Option<Tensor>,
    mid: Tensor,
    /// `None` where it is computed again in backward, by tiles.
    mlp: Option<Vec<mlp::Tile>>,
    u_o: Option<Tensor>,
}

/// Queries, keys and values as attention takes them: `q: [N, H * E]`, `k`, `v: [N, K * E]`.
#[derive(Debug)]
struct Qkv {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// `q` and `k` before their norm, in models that have one.
    raw: Option<(Tensor, Tensor)>,
    /// Of each layer.
    us: Vec<Option<Tensor>>,
}

/// What adds to the residual stream.
#[derive(Debug, Clone, Copy)]
enum Branch {
    Attention,
    Mlp,
}

/// One layer of the decoder.
#[derive(Debug, Clone)]
pub struct Block {
    pub(super) input_norm: InputNorm,
    pub(super) qkv: Branches<3>,
    pub(super) o: LoraLinear,
    /// Weights of the norms on queries and keys: `[E]` each, or `[H * E]` and `[K * E]`.
    pub(super) qk_norm: Option<(Tensor, Tensor)>,
    pub(super) mlp_norm: InputNorm,
    /// Weights `[D]` of the norms on what the attention and the MLP add to the residual stream.
    pub(super) branch_norms: Option<[Tensor; 2]>,
    pub(super) gate_up: Branches<2>,
    pub(super) down: LoraLinear,
    pub(super) heads: Heads,
    pub(super) rope: LayerRope,
    pub(super) activation: Activation,
    /// Of the norms on branches, queries and keys.
    pub(super) eps: f64,
}

impl Block {
    /// One of the model's [`modules`](super::DecoderConfig::modules).
    pub(super) fn linear(&self, module: Module) -> &LoraLinear {
        match module {
            Module::Q | Module::Qkv => &self.qkv.layers()[0],
            Module::K => &self.qkv.layers()[1],
            Module::V => &self.qkv.layers()[2],
            Module::O => &self.o,
            Module::Gate | Module::GateUp => &self.gate_up.layers()[0],
            Module::Up => &self.gate_up.layers()[1],
            Module::Down => &self.down,
        }
    }

    pub(super) fn linear_mut(&mut self, module: Module) -> &mut LoraLinear {
        match module {
            Module::Q | Module::Qkv => &mut self.qkv.layers_mut()[0],
            Module::K => &mut self.qkv.layers_mut()[1],
            Module::V => &mut self.qkv.layers_mut()[2],
            Module::O => &mut self.o,
            Module::Gate | Module::GateUp => &mut self.gate_up.layers_mut()[0],
            Module::Up => &mut self.gate_up.layers_mut()[1],
            Module::Down => &mut self.down,
        }
    }

    /// All linear layers, in the order of the forward pass.
    fn linears(&self) -> impl Iterator<Item = &LoraLinear> {
        self.attention_linears().chain(self.mlp_linears())
    }

    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut LoraLinear> {
        let of_attention = self.qkv.layers_mut().iter_mut().chain([&mut self.o]);
        let of_mlp = self.gate_up.layers_mut().iter_mut().chain([&mut self.down]);
        of_attention.chain(of_mlp)
    }

    pub(super) fn has_lora(&self) -> bool {
        self.linears().any(|linear| linear.lora.is_some())
    }

    /// The block for as long as it is not trained: what DoRA's adapters scale their rows by is made once.
    pub fn lasting(&self) -> Cow<'_, Self> {
        if !self.linears().any(LoraLinear::has_magnitude) {
            return Cow::Borrowed(self);
        }
        let mut block = self.clone();
        let adapters = block
            .linears_mut()
            .filter_map(|linear| linear.lora.as_mut());
        for magnitude in adapters.filter_map(|lora| lora.magnitude.as_mut()) {
            magnitude.lasting_scales = Some(OnceLock::new());
        }
        Cow::Owned(block)
    }

    /// # Shapes
    /// `x: [N, D]` -> `y: [N, D]`.
    pub fn forward(
        &self,
        x: &Tensor,
        layout: &Layout<'_>,
        policy: ActivationPolicy,
    ) -> Result<(Tensor, Saved)> {
        let _order = self.announce_forward();
        let (mut activations, h) = self.attend(x, layout)?;
        let dropout = layout.dropout;
        match policy {
            ActivationPolicy::Keep => {
                let mut tiles = Vec::new();
                let y = self.mlp(&activations.mid, &h, dropout, |tile| tiles.push(tile))?;
                activations.mlp = Some(tiles);
                Ok((y, Saved::Kept(Box::new(activations))))
            }
            ActivationPolicy::Recompute | ActivationPolicy::Offload => {
                let Activations {
                    x,
                    mid,
                    qkv,
                    attention,
                    attended,
                    u_o,
                    ..
                } = activations;
                drop((qkv, attention, attended, u_o));
                let y = self.mlp(&mid, &h, dropout, drop)?;
                Ok((y, Saved::Input(x)))
            }
        }
    }

    /// The first half of forward, up to the input of the MLP.
    fn attend(&self, x: &Tensor, layout: &Layout<'_>) -> Result<(Activations, Tensor)> {
        let qkv = self.attention_inputs(x, layout)?;
        let attention = attention::forward(&qkv.q, &qkv.k, &qkv.v, layout.segments, self.heads)?;
        let (attended, u_o) = self.o.forward(&attention.out, layout.dropout)?;
        let (branch, attended) = self.normed(attended, Branch::Attention)?;
        let (mid, h) = self.mlp_norm.forward_residual(x, branch)?;
        let activations = Activations {
            x: x.clone(),
            qkv,
            attention,
            attended,
            mid,
            mlp: None,
            u_o,
        };
        Ok((activations, h))
    }

    /// The next tokens of one sequence: attends to what the cache holds and adds these tokens to it.
    pub(super) fn decode(
        &self,
        x: &Tensor,
        layout: &Layout<'_>,
        cache: &mut CachedRows,
    ) -> Result<Tensor> {
        let _order = self.announce_forward();
        let qkv = self.attention_inputs(x, layout)?;
        let (k, v) = cache.append(&qkv.k, &qkv.v)?;
        let attention = attention::forward(&qkv.q, &k, &v, layout.segments, self.heads)?;
        let attended = self.o.forward(&attention.out, layout.dropout)?.0;
        let (branch, _) = self.normed(attended, Branch::Attention)?;
        let (mid, h) = self.mlp_norm.forward_residual(x, branch)?;
        self.mlp(&mid, &h, layout.dropout, drop)
    }

    /// What a branch adds to the residual stream, and its output where that is something else.
    fn normed(&self, out: Tensor, branch: Branch) -> Result<(Tensor, Option<Tensor>)> {
        let Some(norms) = &self.branch_norms else {
            return Ok((out, None));
        };
        let normed = rms_norm::forward(&out, &norms[branch as usize], self.eps)?;
        Ok((normed, Some(out)))
    }

    /// The gradient of a branch's output `out`, which a norm may follow.
    fn through_norm(&self, dy: &Tensor, out: Option<&Tensor>, branch: Branch) -> Result<Tensor> {
        match (&self.branch_norms, out) {
            (Some(norms), Some(out)) => {
                rms_norm::gradient(dy, out, &norms[branch as usize], self.eps)
            }
            _ => Ok(dy.clone()),
        }
    }

    fn attention_inputs(&self, x: &Tensor, layout: &Layout<'_>) -> Result<Qkv> {
        let h = self.input_norm.forward(x)?;
        let ([q, k, v], us) = self.qkv.forward(&h, layout.dropout)?;
        let (q, k, raw) = match &self.qk_norm {
            None => (q, k, None),
            Some((q_norm, k_norm)) => {
                let (raw_q, raw_k) = (by_norm(&q, q_norm)?, by_norm(&k, k_norm)?);
                let normed_q = rms_norm::forward(&raw_q, q_norm, self.eps)?.reshape(q.shape())?;
                let normed_k = rms_norm::forward(&raw_k, k_norm, self.eps)?.reshape(k.shape())?;
                (normed_q, normed_k, Some((raw_q, raw_k)))
            }
        };
        if let Some(table) = layout.rope.of(self.rope) {
            rope::forward(&q, &k, layout.positions, table)?;
        }
        Ok(Qkv { q, k, v, raw, us })
    }

    /// Adds to the adapters' gradients; gives the gradient of the block's input if it is needed.
    ///
    /// # Shapes
    /// `dy: [N, D]`, whose memory is reused -> `dx: [N, D]`.
    pub fn backward(
        &self,
        dy: Tensor,
        saved: Saved,
        layout: &Layout<'_>,
        input: InputGrad,
    ) -> Result<Option<Tensor>> {
        let _order = self.announce_backward(&saved, input);
        let activations = match saved {
            Saved::Kept(activations) => *activations,
            Saved::Input(x) => self.attend(&x, layout)?.0,
            Saved::Parked(x) => self.attend(&x.take()?, layout)?.0,
        };
        let Activations {
            x,
            qkv,
            attention,
            attended,
            mid,
            mlp,
            u_o,
        } = activations;
        // The residual connections hand the gradient through: one buffer holds that of y, then of mid, then of x.
        let d_residual = dy;
        let dropout = layout.dropout;
        self.mlp_backward(&d_residual, &mid, mlp, dropout)?;
        drop(mid);
        let d_attended = self.through_norm(&d_residual, attended.as_ref(), Branch::Attention)?;
        drop(attended);
        let d_out = self
            .o
            .backward(&d_attended, &attention.out, u_o.as_ref(), dropout, None)?;
        drop(d_attended);
        let operands = (&qkv.q, &qkv.k, &qkv.v);
        let d_qkv = attention::backward(&d_out, operands, &attention, layout.segments, self.heads)?;
        drop((d_out, attention));
        let h = self.input_norm.forward(&x)?;
        let d_qkv = self.rotary_backward(d_qkv, &qkv, layout)?;
        let d_h = match input {
            InputGrad::Needed => self.input_norm.gradient(&d_residual),
            InputGrad::Skip => InputGradient::Skip,
        };
        let Some(d_h) = self.qkv.backward(d_qkv, &h, &qkv.us, dropout, d_h)? else {
            return Ok(None);
        };
        self.input_norm.backward(&d_h, &x, &d_residual)?;
        Ok(Some(d_residual))
    }

    /// The gradients of `q_proj`, `k_proj` and `v_proj`'s outputs from those that attention gives.
    fn rotary_backward(
        &self,
        (dq, dk, dv): (Tensor, Tensor, Tensor),
        qkv: &Qkv,
        layout: &Layout<'_>,
    ) -> Result<[Tensor; 3]> {
        if let Some(table) = layout.rope.of(self.rope) {
            rope::backward(&dq, &dk, layout.positions, table)?;
        }
        let (Some((q_norm, k_norm)), Some((raw_q, raw_k))) = (&self.qk_norm, &qkv.raw) else {
            return Ok([dq, dk, dv]);
        };
        let through_norm = |dy: &Tensor, raw: &Tensor, weight: &Tensor| -> Result<Tensor> {
            let d_raw = rms_norm::gradient(&by_norm(dy, weight)?, raw, weight, self.eps)?;
            Ok(d_raw.reshape(dy.shape())?)
        };
        Ok([
            through_norm(&dq, raw_q, q_norm)?,
            through_norm(&dk, raw_k, k_norm)?,
            dv,
        ])
    }
}

/// `[N, heads * E]` in rows of the norm with this weight.
fn by_norm(t: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(t.reshape(((), weight.dims1()?))?)
}
