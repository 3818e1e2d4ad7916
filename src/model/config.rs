//! What a decoder is made of: `config.json` to [`DecoderConfig`], the only place that knows a model's family.
//!
//! A family is one function here. A field that changes the mathematics and is not understood is an error, so that a
//! model is either computed as transformers computes it or refused.
//!
//! Source: `transformers/models/*/configuration_*.py` 5.23, and the `config.json` of 4.x (`rope_theta`, `rope_scaling`).

mod fields;
mod rope;

use std::path::Path;

use serde_json::Value;

use crate::Result;
use fields::Fields;

/// No model has a tenth of it; a hostile count must not become an allocation.
const MAX_LAYERS: usize = 10_000;

/// The activation between the gate and the product with `up`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Silu,
}

/// How the rotary frequencies are stretched for longer contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
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
}

/// Rotary position embedding over the whole `head_dim`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeConfig {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// A decoder-only transformer with grouped-query attention, RMSNorm, RoPE and a gated MLP.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub rms_norm_eps: f64,
    pub rope: RopeConfig,
    pub max_position_embeddings: usize,
    /// The output head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// `q_proj`, `k_proj` and `v_proj` have a bias.
    pub qkv_bias: bool,
    /// `o_proj` has a bias.
    pub o_bias: bool,
    /// `gate_proj`, `up_proj` and `down_proj` have a bias.
    pub mlp_bias: bool,
    /// RMSNorm over `head_dim` on queries and keys, before RoPE.
    pub qk_norm: bool,
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
        let mut fields = Fields::new(config, path)?;
        let model_type: String = fields.required("model_type")?;
        let decoder = match model_type.as_str() {
            "llama" => llama(&mut fields)?,
            "mistral" => mistral(&mut fields)?,
            "qwen2" => qwen2(&mut fields)?,
            "qwen3" => qwen3(&mut fields)?,
            _ => {
                return Err(fields.unsupported("model_type", "use llama, mistral, qwen2 or qwen3"));
            }
        };
        fields.finish()?;
        decoder.check_numbers(&fields)?;
        Ok(decoder)
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
        if !self.head_dim.is_multiple_of(2) {
            return Err(fields.malformed(
                "head_dim",
                format!("{} is odd, rotary embedding needs pairs", self.head_dim),
            ));
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

fn llama(fields: &mut Fields) -> Result<DecoderConfig> {
    let mut decoder = decoder(fields, Defaults::new(2048))?;
    decoder.qkv_bias = fields.optional("attention_bias")?.unwrap_or(false);
    decoder.o_bias = decoder.qkv_bias;
    decoder.mlp_bias = fields.optional("mlp_bias")?.unwrap_or(false);
    Ok(decoder)
}

fn mistral(fields: &mut Fields) -> Result<DecoderConfig> {
    let mut defaults = Defaults::new(4096 * 32);
    defaults.num_kv_heads = Some(8);
    let mut decoder = decoder(fields, defaults)?;
    // An absent window is 4096 (the class's default); `null` is none.
    let window = match fields.is_null("sliding_window") {
        true => None,
        false => Some(fields.optional_size("sliding_window")?.unwrap_or(4096)),
    };
    decoder.sliding_window = vec![window; decoder.num_layers];
    Ok(decoder)
}

fn qwen2(fields: &mut Fields) -> Result<DecoderConfig> {
    let mut defaults = Defaults::new(32768);
    defaults.num_kv_heads = Some(32);
    let mut decoder = decoder(fields, defaults)?;
    decoder.qkv_bias = true;
    decoder.sliding_window = qwen_windows(fields, decoder.num_layers)?;
    Ok(decoder)
}

fn qwen3(fields: &mut Fields) -> Result<DecoderConfig> {
    let mut defaults = Defaults::new(32768);
    defaults.num_kv_heads = Some(32);
    defaults.head_dim = Some(128);
    let mut decoder = decoder(fields, defaults)?;
    decoder.qkv_bias = fields.optional("attention_bias")?.unwrap_or(false);
    decoder.o_bias = decoder.qkv_bias;
    decoder.qk_norm = true;
    decoder.sliding_window = qwen_windows(fields, decoder.num_layers)?;
    Ok(decoder)
}

/// What a family's configuration class assumes when `config.json` is silent.
struct Defaults {
    max_position_embeddings: usize,
    /// `None` = as many as heads.
    num_kv_heads: Option<usize>,
    /// `None` = hidden size / heads.
    head_dim: Option<usize>,
}

impl Defaults {
    fn new(max_position_embeddings: usize) -> Self {
        Self {
            max_position_embeddings,
            num_kv_heads: None,
            head_dim: None,
        }
    }
}

/// The fields all families share, with no bias, no window and no norm on queries and keys.
fn decoder(fields: &mut Fields, defaults: Defaults) -> Result<DecoderConfig> {
    let hidden_size = fields.size("hidden_size")?;
    let num_layers = fields.size("num_hidden_layers")?;
    if num_layers > MAX_LAYERS {
        return Err(fields.malformed("num_hidden_layers", format!("{num_layers} is too many")));
    }
    let num_heads = fields.size("num_attention_heads")?;
    let num_kv_heads = match fields.is_null("num_key_value_heads") {
        true => None,
        false => fields
            .optional_size("num_key_value_heads")?
            .or(defaults.num_kv_heads),
    };
    let head_dim = match fields.optional_size("head_dim")?.or(defaults.head_dim) {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            return Err(fields.malformed(
                "num_attention_heads",
                format!("{num_heads} does not divide `hidden_size` = {hidden_size}"),
            ));
        }
    };
    let max_position_embeddings = fields
        .optional_size("max_position_embeddings")?
        .unwrap_or(defaults.max_position_embeddings);
    let activation = match fields.optional::<String>("hidden_act")?.as_deref() {
        None | Some("silu" | "swish") => Activation::Silu,
        Some(_) => return Err(fields.unsupported("hidden_act", "only silu is")),
    };
    let vocab_size = fields.size("vocab_size")?;
    Ok(DecoderConfig {
        hidden_size,
        intermediate_size: fields.size("intermediate_size")?,
        num_layers,
        num_heads,
        num_kv_heads: num_kv_heads.unwrap_or(num_heads),
        head_dim,
        vocab_size,
        rms_norm_eps: fields.optional("rms_norm_eps")?.unwrap_or(1e-6),
        rope: rope::read(fields, max_position_embeddings)?,
        max_position_embeddings,
        tie_word_embeddings: fields.optional("tie_word_embeddings")?.unwrap_or(false),
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        activation,
        padding_id: padding_id(fields, vocab_size)?,
        sliding_window: vec![None; num_layers],
    })
}

/// `pad_token_id`, which torch counts from the end where it is negative.
fn padding_id(fields: &mut Fields, vocab_size: usize) -> Result<Option<u32>> {
    let id = fields.optional::<i64>("pad_token_id")?;
    let id = id.map(|id| if id < 0 { id + vocab_size as i64 } else { id });
    let known = id.filter(|id| (0..vocab_size as i64).contains(id));
    Ok(known.map(|id| id as u32))
}

/// A window on the layers that `layer_types` names, or on those from `max_window_layers` on.
fn qwen_windows(fields: &mut Fields, num_layers: usize) -> Result<Vec<Option<usize>>> {
    let enabled = fields.optional("use_sliding_window")?.unwrap_or(false);
    let size = match fields.is_null("sliding_window") {
        true => None,
        false => Some(fields.optional_size("sliding_window")?.unwrap_or(4096)),
    };
    let window = size.filter(|_| enabled);
    let first = fields.optional::<usize>("max_window_layers")?.unwrap_or(28);
    let Some(types) = fields.optional::<Vec<String>>("layer_types")? else {
        return Ok((0..num_layers)
            .map(|layer| window.filter(|_| layer >= first))
            .collect());
    };
    if types.len() != num_layers {
        return Err(fields.malformed(
            "layer_types",
            format!("has {} entries for {num_layers} layers", types.len()),
        ));
    }
    types
        .iter()
        .map(|layer_type| match (layer_type.as_str(), window) {
            ("full_attention", _) => Ok(None),
            ("sliding_attention", Some(window)) => Ok(Some(window)),
            ("sliding_attention", None) => Err(fields.malformed(
                "layer_types",
                "has sliding_attention, but `use_sliding_window` and `sliding_window` give no window",
            )),
            _ => Err(fields.unsupported("layer_types", "use full_attention or sliding_attention")),
        })
        .collect()
}
