//! What families share: the fields that all of them have, and windows.

use super::fields::Fields;
use super::{Activation, DecoderConfig, LayerRope, NormNames, rope};
use crate::Result;

/// The path of the decoder in a language model.
const ALONE: &str = "model";

/// No model has a tenth of it; a hostile count must not become an allocation.
const MAX_LAYERS: usize = 10_000;

/// What a family's configuration class assumes when `config.json` is silent.
pub(super) struct Defaults {
    pub(super) max_position_embeddings: usize,
    /// `None` = it has to be there.
    pub(super) vocab_size: Option<usize>,
    /// `None` = it has to be there.
    pub(super) num_heads: Option<usize>,
    /// `None` = as many as heads.
    pub(super) num_kv_heads: Option<usize>,
    /// `None` = hidden size / heads.
    pub(super) head_dim: Option<usize>,
    pub(super) rms_norm_eps: f64,
    pub(super) pad_token_id: Option<i64>,
    pub(super) tie_word_embeddings: bool,
    pub(super) rope_theta: f64,
    pub(super) rotary: Rotary,
    pub(super) activation: Activation,
}

/// What the rotary parameters of a family are of.
#[derive(Clone, Copy)]
pub(super) enum Rotary {
    /// One embedding.
    One,
    /// Two: layers with a window have one of their own, of this theta unless they say which.
    Two { local_theta: f64 },
    /// One, and how queries are scaled by their positions.
    ScaledQueries,
    /// One, and how the axes of an image share its frequencies. On all axes a token of text is at its position.
    Axes,
    /// One, which turns this part of each head unless they say which. In Phi the context before it was extended is of the given
    /// length, unless they say so.
    Part {
        part: f64,
        original_length: Option<usize>,
    },
}

impl Defaults {
    pub(super) fn new(max_position_embeddings: usize) -> Self {
        Self {
            max_position_embeddings,
            vocab_size: None,
            num_heads: None,
            num_kv_heads: None,
            head_dim: None,
            rms_norm_eps: 1e-6,
            pad_token_id: None,
            tie_word_embeddings: false,
            rope_theta: 10_000.0,
            rotary: Rotary::One,
            activation: Activation::Silu,
        }
    }
}

/// The fields all families share, with no bias, no window and no norm on queries and keys.
pub(super) fn decoder(fields: &mut Fields, defaults: Defaults) -> Result<DecoderConfig> {
    let hidden_size = fields.size("hidden_size")?;
    let num_layers = fields.size("num_hidden_layers")?;
    if num_layers > MAX_LAYERS {
        return Err(fields.malformed("num_hidden_layers", format!("{num_layers} is too many")));
    }
    let num_heads = fields.size_or("num_attention_heads", defaults.num_heads)?;
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
    let activation = activation(fields, "hidden_act", defaults.activation)?;
    let (positions, theta) = (max_position_embeddings, defaults.rope_theta);
    let mut rotary_dim = head_dim;
    let (rope, local_rope) = match defaults.rotary {
        Rotary::One => (rope::read(fields, positions, theta)?, None),
        Rotary::Axes => (rope::read_with_axes(fields, positions, theta)?, None),
        Rotary::ScaledQueries => (
            rope::read_with_query_scaling(fields, positions, theta)?,
            None,
        ),
        Rotary::Part {
            part,
            original_length,
        } => {
            let original_length = match original_length {
                None => None,
                default => fields
                    .optional_size("original_max_position_embeddings")?
                    .or(default),
            };
            let lengths = (positions, original_length);
            let (rope, part) = rope::read_with_part(fields, lengths, (theta, part))?;
            rotary_dim = (head_dim as f64 * part) as usize;
            (rope, None)
        }
        Rotary::Two { local_theta } => {
            let (rope, local) = rope::read_both(fields, positions, [theta, local_theta])?;
            (rope, Some(local))
        }
    };
    let vocab_size = fields.size_or("vocab_size", defaults.vocab_size)?;
    Ok(DecoderConfig {
        decoder_path: ALONE,
        hidden_size,
        intermediate_size: fields.size("intermediate_size")?,
        num_layers,
        num_heads,
        num_kv_heads: num_kv_heads.unwrap_or(num_heads),
        head_dim,
        rotary_dim,
        rotates_neighbours: false,
        vocab_size,
        rms_norm_eps: fields
            .optional("rms_norm_eps")?
            .unwrap_or(defaults.rms_norm_eps),
        rope,
        local_rope,
        layer_rope: vec![LayerRope::Model; num_layers],
        max_position_embeddings,
        tie_word_embeddings: fields
            .optional("tie_word_embeddings")?
            .unwrap_or(defaults.tie_word_embeddings),
        fused_qkv: false,
        fused_gate_up: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: None,
        input_norms: true,
        branch_norms: false,
        norm_names: NormNames::Gemma,
        norms_less_one: false,
        attention_scale: 1.0 / (head_dim as f64).sqrt(),
        attention_soft_cap: None,
        embedding_scale: 1.0,
        embedding_multiplier: 1.0,
        residual_multiplier: 1.0,
        logits_scaling: 1.0,
        logits_soft_cap: None,
        activation,
        padding_id: padding_id(fields, defaults.pad_token_id, vocab_size)?,
        sliding_window: vec![None; num_layers],
    })
}

/// `pad_token_id`, which torch counts from the end where it is negative.
fn padding_id(fields: &mut Fields, default: Option<i64>, vocab_size: usize) -> Result<Option<u32>> {
    let id = match fields.is_null("pad_token_id") {
        true => None,
        false => fields.optional::<i64>("pad_token_id")?.or(default),
    };
    let id = id.map(|id| if id < 0 { id + vocab_size as i64 } else { id });
    let known = id.filter(|id| (0..vocab_size as i64).contains(id));
    Ok(known.map(|id| id as u32))
}

/// The function before the product with `up`, which is `default` where the field is not there.
pub(super) fn activation(
    fields: &mut Fields,
    field: &'static str,
    default: Activation,
) -> Result<Activation> {
    match fields.optional::<String>(field)?.as_deref() {
        None => Ok(default),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
        // So Gemma's first models call it.
        Some("gelu") if field == "hidden_act" && default == Activation::GeluTanh => Ok(default),
        Some(_) => Err(fields.unsupported(field, "use silu or gelu_pytorch_tanh")),
    }
}

/// `sliding_window`: an absent one is 4096, `null` is none.
pub(super) fn window(fields: &mut Fields) -> Result<Option<usize>> {
    match fields.is_null("sliding_window") {
        true => Ok(None),
        false => Ok(Some(
            fields.optional_size("sliding_window")?.unwrap_or(4096),
        )),
    }
}

/// `sliding_window` where `use_sliding_window` says so.
pub(super) fn window_in_use(fields: &mut Fields) -> Result<Option<usize>> {
    let enabled = fields.optional("use_sliding_window")?.unwrap_or(false);
    Ok(window(fields)?.filter(|_| enabled))
}

/// `window` on the layers that `layer_types` names, or else on those that have one `by_default`.
pub(super) fn windows(
    fields: &mut Fields,
    num_layers: usize,
    window: Option<usize>,
    by_default: impl Fn(usize) -> bool,
) -> Result<Vec<Option<usize>>> {
    let Some(types) = fields.optional::<Vec<String>>("layer_types")? else {
        return Ok((0..num_layers)
            .map(|layer| window.filter(|_| by_default(layer)))
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
                "has sliding_attention, but the config gives no window",
            )),
            _ => Err(fields.unsupported("layer_types", "use full_attention or sliding_attention")),
        })
        .collect()
}
