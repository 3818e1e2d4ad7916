//! What a decoder is made of: `config.json` to [`DecoderConfig`], the only place that knows a model's family.
//!
//! A family is one function in `families`. A field that changes the mathematics and is not understood is an error, so that a
//! model is either computed as transformers computes it or refused.
//!
//! Source: `transformers/models/*/configuration_*.py` 5.24, and the `config.json` of 4.x (`rope_theta`, `rope_scaling`).

mod families;
mod fields;
mod rope;
mod shared;

use std::path::Path;

use serde_json::Value;

use crate::Result;
use fields::Fields;
pub(crate) use rope::yarn_amplitude;

pub use crate::ops::gated_act::Activation;

/// How the rotary frequencies are stretched for longer contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// Every frequency divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, those between interpolated (Llama 3.1).
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: usize,
    },
    /// Low frequencies divided by `factor`, high ones kept, those between interpolated by their place; cosines and sines
    /// times `attention_factor` (YaRN, arXiv:2309.00071).
    Yarn {
        factor: f64,
        attention_factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        original_max_position_embeddings: usize,
        /// Whether the places between which frequencies are interpolated are whole numbers.
        truncate: bool,
    },
    /// Each frequency divided by a factor of its own, which is another where a batch has a sequence longer than the original
    /// context; cosines and sines times `attention_factor` (LongRoPE, arXiv:2402.13753).
    LongRope {
        short_factors: Vec<f64>,
        long_factors: Vec<f64>,
        attention_factor: f64,
        original_max_position_embeddings: usize,
    },
}

/// Rotary position embedding over the first `rotary_dim` columns of a head.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    pub theta: f64,
    pub scaling: RopeScaling,
    pub query_scaling: Option<QueryScaling>,
}

/// What the query at position p is multiplied by: `1 + beta ln(1 + floor(p / length))`, which is 1 in the first `length`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueryScaling {
    pub beta: f64,
    pub length: usize,
}

/// Which rotary embedding a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerRope {
    /// [`DecoderConfig::rope`].
    Model,
    /// [`DecoderConfig::local_rope`].
    Local,
    /// None: the layer knows the order of tokens by its mask alone (NoPE, arXiv:2305.19466).
    None,
}

/// What the norm of queries and that of keys are over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head by itself, with one weight `[head_dim]` for all.
    Head,
    /// All heads together.
    Token,
}

/// What the norms beside the attention and the MLP are called where there are [`branch_norms`](DecoderConfig::branch_norms).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormNames {
    /// `pre_feedforward_layernorm` before the MLP, `post_attention_layernorm` and `post_feedforward_layernorm` after both.
    Gemma,
    /// `post_attention_layernorm` before the MLP, `post_self_attn_layernorm` and `post_mlp_layernorm` after both.
    Glm,
    /// `post_attention_layernorm` before the MLP, `post_norm1` and `post_norm2` after both.
    HyperClovaX,
}

/// A decoder-only transformer with grouped-query attention, RMSNorm, RoPE and a gated MLP.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// The path of the decoder within the model, as transformers names it: `model`, or `model.language_model` in one that
    /// also sees images.
    pub decoder_path: &'static str,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// How many columns of a head the rotary embedding turns, the first ones.
    pub rotary_dim: usize,
    /// It turns columns 2i and 2i + 1 of a head together; else columns i and i + rotary_dim / 2.
    pub rotates_neighbours: bool,
    pub vocab_size: usize,
    pub rms_norm_eps: f64,
    pub rope: RopeConfig,
    /// That of the layers which attend to a window, in models where it is another.
    pub local_rope: Option<RopeConfig>,
    /// Of each layer.
    pub layer_rope: Vec<LayerRope>,
    pub max_position_embeddings: usize,
    /// The output head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// `q_proj`, `k_proj` and `v_proj` are one layer, `qkv_proj`.
    pub fused_qkv: bool,
    /// `gate_proj` and `up_proj` are one layer, `gate_up_proj`.
    pub fused_gate_up: bool,
    /// `q_proj`, `k_proj` and `v_proj` have a bias.
    pub qkv_bias: bool,
    /// `o_proj` has a bias.
    pub o_bias: bool,
    /// `gate_proj`, `up_proj` and `down_proj` have a bias.
    pub mlp_bias: bool,
    /// RMSNorm on queries and keys, before RoPE.
    pub qk_norm: Option<QkNorm>,
    /// RMSNorm on the inputs of the attention and of the MLP.
    pub input_norms: bool,
    /// RMSNorm on the outputs of the attention and of the MLP, before they are added to the residual stream.
    pub branch_norms: bool,
    pub norm_names: NormNames,
    /// The norms' weights are stored less 1.
    pub norms_less_one: bool,
    /// What scores are multiplied by before the softmax.
    pub attention_scale: f64,
    /// What scores may then be at most ([`SoftCap`](crate::ops::soft_cap::SoftCap)).
    pub attention_soft_cap: Option<f64>,
    /// What the rows of the embedding are multiplied by where they are looked up.
    pub embedding_scale: f64,
    /// What token embeddings are multiplied by after that.
    pub embedding_multiplier: f64,
    /// What the outputs of the attention and of the MLP are multiplied by before they are added to the residual stream.
    pub residual_multiplier: f64,
    /// What logits are divided by.
    pub logits_scaling: f64,
    /// What logits may then be at most.
    pub logits_soft_cap: Option<f64>,
    pub activation: Activation,
    /// The token whose row of a trained embedding gets no gradient, as in torch.
    pub padding_id: Option<u32>,
    /// Per layer: how many positions a query sees, its own included; `None` = all before it.
    pub sliding_window: Vec<Option<usize>>,
}

impl DecoderConfig {
    /// Reads the parsed `config.json` found at `path`.
    ///
    /// # Errors
    /// [`Error::UnsupportedModel`](crate::Error::UnsupportedModel) for a model type or field that is not understood,
    /// [`Error::Malformed`](crate::Error::Malformed) for a number that cannot be.
    pub fn from_json(config: &Value, path: &Path) -> Result<Self> {
        families::read(Fields::new(config, path)?)
    }

    /// The unit that the residual stream is held in: to the norms that read it, it makes no difference but by their eps.
    ///
    /// Where there are norms on branches `embedding_scale` is in it, so that the stream begins with embeddings as they are stored;
    /// those norms divide their weights by it. `residual_multiplier` is in it, so that branches are added as they are; the
    /// embeddings are divided by it.
    pub(super) fn stream_unit(&self) -> f64 {
        let of_embedding = match self.branch_norms {
            true => self.embedding_scale,
            false => 1.0,
        };
        of_embedding * self.residual_multiplier
    }

    /// `eps` of the norms that read the residual stream.
    pub(super) fn stream_eps(&self) -> f64 {
        self.rms_norm_eps / (self.stream_unit() * self.stream_unit())
    }

    /// What the embeddings are multiplied by to be in that unit, once they are looked up.
    pub(super) fn embedding_factor(&self) -> f64 {
        self.embedding_scale * self.embedding_multiplier / self.stream_unit()
    }

    fn check_numbers(&self, fields: &Fields) -> Result<()> {
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return Err(fields.malformed(
                "num_key_value_heads",
                format!(
                    "{} does not divide the {} heads",
                    self.num_kv_heads, self.num_heads
                ),
            ));
        }
        let is_whole = self.rotary_dim == self.head_dim;
        let is_part =
            self.rotary_dim.is_multiple_of(2) && (2..self.head_dim).contains(&self.rotary_dim);
        if !is_whole && !is_part {
            let (rotary, all) = (self.rotary_dim, self.head_dim);
            let reason = format!("makes {rotary} columns of {all}, rotary embedding needs pairs");
            return Err(fields.malformed("partial_rotary_factor", reason));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(fields.malformed(
                "head_dim",
                format!("{} is odd, rotary embedding needs pairs", self.head_dim),
            ));
        }
        if let RopeScaling::LongRope {
            short_factors,
            long_factors,
            ..
        } = &self.rope.scaling
        {
            for (name, factors) in [
                ("short_factor", short_factors),
                ("long_factor", long_factors),
            ] {
                let (found, expected) = (factors.len(), self.rotary_dim / 2);
                if found != expected {
                    let reason = format!("has {found} numbers for {expected} frequencies");
                    return Err(fields.malformed(name, reason));
                }
            }
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            return Err(fields.malformed(
                "rms_norm_eps",
                format!("{} is not a positive number", self.rms_norm_eps),
            ));
        }
        Ok(())
    }
}
