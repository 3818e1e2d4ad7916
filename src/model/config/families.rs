//! The families of models: of each what its `config.json` says, and what its configuration class assumes otherwise.

use serde_json::Value;

use super::fields::Fields;
use super::shared::{Defaults, Rotary, activation, decoder, window, window_in_use, windows};
use super::{Activation, DecoderConfig, LayerRope, NormNames, QkNorm, RopeScaling};
use crate::Result;
use crate::store::TEXT_CONFIG;

/// The values of `model_type`.
const FAMILIES: &str = "use llama, mistral, mistral3, ministral3, qwen2, qwen3, qwen3_vl, smollm3, gemma, gemma2, gemma3, \
                        gemma3_text, phi3, glm, glm4, granite, hyperclovax, olmo2, olmo3, seed_oss, exaone4, cwm or iquestcoder";

/// The path of the decoder in a model that it is one part of.
const WITHIN: &str = "model.language_model";

/// A model of the family that its config names.
pub(super) fn read(mut fields: Fields) -> Result<DecoderConfig> {
    let model_type: String = fields.required("model_type")?;
    match model_type.as_str() {
        "gemma3" => within(fields, &["gemma3_text"], true),
        "mistral3" => within(fields, &["mistral", "ministral3"], true),
        "qwen3_vl" => within(fields, &["qwen3_vl_text"], false),
        _ => language_model(fields, &model_type),
    }
}

/// A language model of one of these families, the first unless it says which, in a model that also sees images. What it sees
/// with is not computed. Where the model's config does not say whether its head is tied, that is `ties`.
fn within(mut fields: Fields, families: &[&str], ties: bool) -> Result<DecoderConfig> {
    let mut text = fields.model(TEXT_CONFIG)?;
    let model_type = text.optional::<String>("model_type")?;
    let model_type = model_type.as_deref().unwrap_or(families[0]);
    if !families.contains(&model_type) {
        let hint = format!("use {}", families.join(" or "));
        return Err(text.unsupported("model_type", hint));
    }
    let decoder = language_model(text, model_type)?;
    // transformers 5 goes by the whole model's, 4 by the text's; where files have a head of its own, both say no.
    let of_whole = fields.optional("tie_word_embeddings")?.unwrap_or(ties);
    let is_tied = of_whole || decoder.tie_word_embeddings;
    fields.ignore(&[
        "vision_config",
        "vision_feature_layer",
        "image_token_index",
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
        "boi_token_index",
        "eoi_token_index",
        "mm_tokens_per_image",
        "multimodal_projector_bias",
        "projector_hidden_act",
        "spatial_merge_size",
        // The language model has its own.
        "pad_token_id",
    ]);
    fields.check_architectures("ForConditionalGeneration")?;
    fields.finish()?;
    Ok(DecoderConfig {
        decoder_path: WITHIN,
        tie_word_embeddings: is_tied,
        ..decoder
    })
}

fn language_model(mut fields: Fields, model_type: &str) -> Result<DecoderConfig> {
    let decoder = match model_type {
        "llama" => llama(&mut fields)?,
        "mistral" => mistral(&mut fields)?,
        "ministral3" => ministral3(&mut fields)?,
        "qwen2" => qwen2(&mut fields)?,
        "qwen3" => qwen3(&mut fields)?,
        "qwen3_vl_text" => qwen3_vl(&mut fields)?,
        "smollm3" => smollm3(&mut fields)?,
        "gemma" => gemma(&mut fields)?,
        "gemma2" => gemma2(&mut fields)?,
        "gemma3_text" => gemma3(&mut fields)?,
        "phi3" => phi3(&mut fields)?,
        "glm" => glm(&mut fields)?,
        "glm4" => glm4(&mut fields)?,
        "granite" => granite(&mut fields)?,
        "hyperclovax" => hyperclovax(&mut fields)?,
        "olmo2" => olmo2(&mut fields)?,
        "olmo3" => olmo3(&mut fields)?,
        "seed_oss" => seed_oss(&mut fields)?,
        "exaone4" => exaone4(&mut fields)?,
        "cwm" => cwm(&mut fields)?,
        "iquestcoder" => iquestcoder(&mut fields)?,
        _ => return Err(fields.unsupported("model_type", FAMILIES)),
    };
    fields.check_architectures("ForCausalLM")?;
    fields.finish()?;
    decoder.check_numbers(&fields)?;
    Ok(decoder)
}

/// Biases on all four of the attention's products, or on none.
fn attention_bias(fields: &mut Fields, decoder: &mut DecoderConfig) -> Result<()> {
    decoder.qkv_bias = fields.optional("attention_bias")?.unwrap_or(false);
    decoder.o_bias = decoder.qkv_bias;
    Ok(())
}

fn mlp_bias(fields: &mut Fields, decoder: &mut DecoderConfig) -> Result<()> {
    decoder.mlp_bias = fields.optional("mlp_bias")?.unwrap_or(false);
    Ok(())
}

fn llama(fields: &mut Fields) -> Result<DecoderConfig> {
    with_biases(fields, Defaults::new(2048))
}

/// Llama with other defaults, and fields for what no model of it has asked for.
fn iquestcoder(fields: &mut Fields) -> Result<DecoderConfig> {
    let mut defaults = Defaults::new(131_072);
    defaults.vocab_size = Some(76_800);
    defaults.num_heads = Some(40);
    defaults.num_kv_heads = Some(8);
    defaults.head_dim = (!fields.is_null("head_dim")).then_some(128);
    defaults.rms_norm_eps = 1e-5;
    // It says where windows begin, and there are none.
    fields.ignore(&["max_window_layers"]);
    with_biases(fields, defaults)
}

/// Biases on all products of the attention, and on all of the MLP.
fn with_biases(fields: &mut Fields, defaults: Defaults) -> Result<DecoderConfig> {
    let mut decoder = decoder(fields, defaults)?;
    attention_bias(fields, &mut decoder)?;
    mlp_bias(fields, &mut decoder)?;
    Ok(decoder)
}

fn mistral(fields: &mut Fields) -> Result<DecoderConfig> {
    let mut defaults = Defaults::new(4096 * 32);
    defaults.num_kv_heads = Some(8);
    let mut decoder = decoder(fields, defaults)?;
    let window = window(fields)?;
    decoder.sliding_window = vec![window; decoder.num_layers];
    Ok(decoder)
}

fn ministral3(fields: &mut Fields) -> Result<DecoderConfig> {
    let mut defaults = Defaults::new(262_144);
    defaults.num_kv_heads = Some(8);
    // An explicit `null` is hidden size / heads.
    defaults.head_dim = (!fields.is_null("head_dim")).then_some(128);
    defaults.rms_norm_eps = 1e-5;
    defaults.pad_token_id = Some(11);
    defaults.rotary = Rotary::ScaledQueries;
    let mut decoder = decoder(fields, defaults)?;
    let window = fields.optional_size("sliding_window")?;
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
    let decoder = with_head_norms(fields, Defaults::new(32768))?;
    Ok(DecoderConfig {
        sliding_window: qwen_windows(fields, decoder.num_layers)?,
        ..decoder
    })
}

/// Qwen 3 without windows.
fn qwen3_vl(fields: &mut Fields) -> Result<DecoderConfig> {
    let mut defaults = Defaults::new(128_000);
    defaults.vocab_size = Some(151_936);
    defaults.rope_theta = 500_000.0;
    defaults.rotary = Rotary::Axes;
    with_head_norms(fields, defaults)
}

fn with_head_norms(fields: &mut Fields, mut defaults: Defaults) -> Result<DecoderConfig> {
    defaults.num_kv_heads = Some(32);
    defaults.head_dim = Some(128);
    let mut decoder = decoder(fields, defaults)?;
    attention_bias(fields, &mut decoder)?;
    decoder.qk_norm = Some(QkNorm::Head);
    Ok(decoder)
}

fn qwen_windows(fields: &mut Fields, num_layers: usize) -> Result<Vec<Option<usize>>> {
    let window = window_in_use(fields)?;
    let first = fields.optional::<usize>("max_window_layers")?.unwrap_or(28);
    windows(fields, num_layers, window, |layer| layer >= first)
}

fn smollm3(fields: &mut Fields) -> Result<DecoderConfig> {
    let mut defaults = Defaults::new(32768);
    defaults.num_kv_heads = Some(4);
    defaults.pad_token_id = Some(128_004);
    defaults.tie_word_embeddings = true;
    defaults.rope_theta = 2_000_000.0;
    let mut decoder = with_biases(fields, defaults)?;
    // The family's configs have it, its models do not ask for it.
    fields.ignore(&["max_window_layers"]);
    let interval = fields.optional_size("no_rope_layer_interval")?;
    let interval = interval.unwrap_or(4);
    let rotated = match fields.optional::<Vec<u8>>("no_rope_layers")? {
        None => (1..=decoder.num_layers)
            .map(|layer| !layer.is_multiple_of(interval))
            .collect(),
        Some(layers) if layers.len() < decoder.num_layers => {
            let reason = format!(
                "has {} entries for {} layers",
                layers.len(),
                decoder.num_layers
            );
            return Err(fields.malformed("no_rope_layers", reason));
        }
        // A 1 is for a layer that has one.
        Some(layers) => layers.iter().map(|layer| *layer != 0).collect::<Vec<_>>(),
    };
    let window = window_in_use(fields)?;
    decoder.sliding_window = windows(fields, decoder.num_layers, window, |layer| !rotated[layer])?;
    let ropes = rotated.into_iter().take(decoder.num_layers);
    decoder.layer_rope = ropes
        .map(|rotated| {
            if rotated {
                LayerRope::Model
            } else {
                LayerRope::None
            }
        })
        .collect();
    Ok(decoder)
}

/// Norms whose weights are stored less 1, and embeddings times the root of their width.
fn gemma_with(fields: &mut Fields, mut defaults: Defaults) -> Result<DecoderConfig> {
    defaults.head_dim = Some(256);
    defaults.pad_token_id = Some(0);
    defaults.tie_word_embeddings = true;
    defaults.activation = Activation::GeluTanh;
    let mut decoder = decoder(fields, defaults)?;
    attention_bias(fields, &mut decoder)?;
    decoder.norms_less_one = true;
    decoder.embedding_scale = (decoder.hidden_size as f64).sqrt();
    Ok(decoder)
}

fn gemma(fields: &mut Fields) -> Result<DecoderConfig> {
    let mut defaults = Defaults::new(8192);
    defaults.vocab_size = Some(256_000);
    defaults.num_heads = Some(16);
    defaults.num_kv_heads = Some(16);
    // `hidden_act` is what counts.
    fields.ignore(&["hidden_activation"]);
    gemma_with(fields, defaults)
}

/// Gemma 2 and 3: norms on branches too, and scores by a scale of their own; caps on scores and logits, which are these where
/// the config does not say.
fn later_gemma(
    fields: &mut Fields,
    mut defaults: Defaults,
    soft_caps: [Option<f64>; 2],
) -> Result<DecoderConfig> {
    defaults.num_heads = Some(8);
    defaults.num_kv_heads = Some(4);
    let mut decoder = gemma_with(fields, defaults)?;
    decoder.activation = activation(fields, "hidden_activation", Activation::GeluTanh)?;
    decoder.branch_norms = true;
    let scalar = fields.optional_positive("query_pre_attn_scalar")?;
    decoder.attention_scale = scalar.unwrap_or(256.0).powf(-0.5);
    let [of_scores, of_logits] = soft_caps;
    let mut soft_cap = |field, default: Option<f64>| -> Result<Option<f64>> {
        match fields.is_null(field) {
            true => Ok(None),
            false => Ok(fields.optional_positive(field)?.or(default)),
        }
    };
    decoder.attention_soft_cap = soft_cap("attn_logit_softcapping", of_scores)?;
    decoder.logits_soft_cap = soft_cap("final_logit_softcapping", of_logits)?;
    Ok(decoder)
}

fn gemma2(fields: &mut Fields) -> Result<DecoderConfig> {
    let mut defaults = Defaults::new(8192);
    defaults.vocab_size = Some(256_000);
    let mut decoder = later_gemma(fields, defaults, [Some(50.0), Some(30.0)])?;
    let window = window(fields)?;
    // The window once more, where transformers does not read it.
    fields.ignore(&["sliding_window_size"]);
    decoder.sliding_window = windows(fields, decoder.num_layers, window, |layer| {
        layer.is_multiple_of(2)
    })?;
    Ok(decoder)
}

fn gemma3(fields: &mut Fields) -> Result<DecoderConfig> {
    let mut defaults = Defaults::new(131_072);
    defaults.vocab_size = Some(262_208);
    defaults.rope_theta = 1_000_000.0;
    let local_theta = 10_000.0;
    defaults.rotary = Rotary::Two { local_theta };
    let mut decoder = later_gemma(fields, defaults, [None; 2])?;
    decoder.qk_norm = Some(QkNorm::Head);
    let window = fields.optional_size("sliding_window")?.unwrap_or(4096);
    let pattern = match fields.optional_size("sliding_window_pattern")? {
        Some(pattern) => pattern,
        None => fields
            .optional_size("_sliding_window_pattern")?
            .unwrap_or(6),
    };
    decoder.sliding_window = windows(fields, decoder.num_layers, Some(window), |layer| {
        !(layer + 1).is_multiple_of(pattern)
    })?;
    decoder.layer_rope = local_where_windows(&decoder.sliding_window);
    Ok(decoder)
}

/// A rotary embedding of their own for layers with a window.
fn local_where_windows(windows: &[Option<usize>]) -> Vec<LayerRope> {
    let rope = |window: &Option<usize>| match window {
        Some(_) => LayerRope::Local,
        None => LayerRope::Model,
    };
    windows.iter().map(rope).collect()
}

/// Phi 3 and 4.
fn phi3(fields: &mut Fields) -> Result<DecoderConfig> {
    let mut defaults = Defaults::new(4096);
    defaults.vocab_size = Some(32_064);
    defaults.num_heads = Some(32);
    defaults.rms_norm_eps = 1e-5;
    defaults.pad_token_id = Some(32_000);
    defaults.rotary = Rotary::Part {
        part: 1.0,
        original_length: Some(4096),
    };
    let mut decoder = decoder(fields, defaults)?;
    decoder.fused_qkv = true;
    decoder.fused_gate_up = true;
    let window = fields.optional_size("sliding_window")?;
    decoder.sliding_window = vec![window; decoder.num_layers];
    // Dropout in pretraining, and what transformers does not read.
    fields.ignore(&[
        "embd_pdrop",
        "resid_pdrop",
        "full_attn_mod",
        "interpolate_factor",
    ]);
    Ok(decoder)
}

/// GLM-4 before it had norms on its branches.
fn glm(fields: &mut Fields) -> Result<DecoderConfig> {
    let mut defaults = Defaults::new(131_072);
    defaults.vocab_size = Some(151_552);
    defaults.num_heads = Some(32);
    defaults.num_kv_heads = Some(2);
    defaults.head_dim = Some(128);
    defaults.rms_norm_eps = 1.5625e-7;
    defaults.pad_token_id = Some(151_329);
    defaults.rotary = Rotary::Part {
        part: 0.5,
        original_length: None,
    };
    let decoder = decoder(fields, defaults)?;
    Ok(DecoderConfig {
        qkv_bias: fields.optional("attention_bias")?.unwrap_or(true),
        fused_gate_up: true,
        rotates_neighbours: true,
        ..decoder
    })
}

fn glm4(fields: &mut Fields) -> Result<DecoderConfig> {
    Ok(DecoderConfig {
        branch_norms: true,
        norm_names: NormNames::Glm,
        ..glm(fields)?
    })
}

fn granite(fields: &mut Fields) -> Result<DecoderConfig> {
    let decoder = llama(fields)?;
    with_multipliers(fields, decoder, 1.0)
}

/// Granite with other defaults, norms on branches, and logits that are multiplied.
fn hyperclovax(fields: &mut Fields) -> Result<DecoderConfig> {
    let decoder = llama(fields)?;
    let attention_scale = decoder.attention_scale;
    let decoder = with_multipliers(fields, decoder, attention_scale)?;
    Ok(DecoderConfig {
        branch_norms: fields.optional("use_post_norm")?.unwrap_or(true),
        norm_names: NormNames::HyperClovaX,
        logits_scaling: 1.0 / decoder.logits_scaling,
        ..decoder
    })
}

/// Factors for embeddings, branches, scores and logits, 1 where the config does not say; that of scores is `attention_scale`
/// then.
fn with_multipliers(
    fields: &mut Fields,
    decoder: DecoderConfig,
    attention_scale: f64,
) -> Result<DecoderConfig> {
    let mut multiplier = |field, default| -> Result<f64> {
        let multiplier = fields.optional_positive(field)?;
        Ok(multiplier.unwrap_or(default))
    };
    Ok(DecoderConfig {
        embedding_multiplier: multiplier("embedding_multiplier", 1.0)?,
        residual_multiplier: multiplier("residual_multiplier", 1.0)?,
        attention_scale: multiplier("attention_multiplier", attention_scale)?,
        logits_scaling: multiplier("logits_scaling", 1.0)?,
        ..decoder
    })
}

fn olmo_defaults() -> Defaults {
    Defaults {
        vocab_size: Some(50_304),
        rms_norm_eps: 1e-5,
        pad_token_id: Some(1),
        ..Defaults::new(2048)
    }
}

fn olmo2(fields: &mut Fields) -> Result<DecoderConfig> {
    olmo(fields, olmo_defaults())
}

fn olmo3(fields: &mut Fields) -> Result<DecoderConfig> {
    let theta = 500_000.0;
    let mut decoder = olmo(
        fields,
        Defaults {
            rope_theta: theta,
            rotary: Rotary::Two { local_theta: theta },
            ..olmo_defaults()
        },
    )?;
    let window = window(fields)?;
    decoder.sliding_window = windows(fields, decoder.num_layers, window, |layer| {
        !(layer + 1).is_multiple_of(4)
    })?;
    decoder.layer_rope = local_where_windows(&decoder.sliding_window);
    Ok(decoder)
}

/// Norms after the attention and the MLP in place of those before, and on all heads of a token together.
fn olmo(fields: &mut Fields, defaults: Defaults) -> Result<DecoderConfig> {
    let mut decoder = decoder(fields, defaults)?;
    attention_bias(fields, &mut decoder)?;
    decoder.qk_norm = Some(QkNorm::Token);
    decoder.input_norms = false;
    decoder.branch_norms = true;
    Ok(decoder)
}

fn seed_oss(fields: &mut Fields) -> Result<DecoderConfig> {
    let mut defaults = Defaults::new(524_288);
    defaults.vocab_size = Some(155_136);
    defaults.num_heads = Some(80);
    defaults.num_kv_heads = Some(8);
    defaults.head_dim = (!fields.is_null("head_dim")).then_some(128);
    defaults.pad_token_id = Some(1);
    let mut decoder = decoder(fields, defaults)?;
    decoder.qkv_bias = fields.optional("attention_bias")?.unwrap_or(true);
    decoder.o_bias = fields.optional("attention_out_bias")?.unwrap_or(false);
    mlp_bias(fields, &mut decoder)?;
    // As `attention_dropout`: it is of pretraining.
    fields.ignore(&["residual_dropout"]);
    Ok(decoder)
}

/// Where some layers have a window, those without one have no rotary embedding either.
fn exaone4(fields: &mut Fields) -> Result<DecoderConfig> {
    let mut defaults = Defaults::new(2048);
    defaults.vocab_size = Some(102_400);
    defaults.num_heads = Some(32);
    defaults.num_kv_heads = Some(32);
    defaults.rms_norm_eps = 1e-5;
    let decoder = decoder(fields, defaults)?;
    let window = window(fields)?;
    let every = match fields.optional::<Value>("sliding_window_pattern")? {
        None => Some(4),
        // Or "LLLG", which transformers no longer reads.
        Some(pattern) => pattern.as_u64().filter(|every| *every > 0),
    };
    let types = fields.optional::<Vec<String>>("layer_types")?;
    if window.is_some() && every.is_none() && types.is_none() {
        let reason = "is no number of layers, and there is no `layer_types`";
        return Err(fields.malformed("sliding_window_pattern", reason));
    }
    let sliding_window = windows(fields, decoder.num_layers, window, |layer| {
        every.is_some_and(|every| !(layer as u64 + 1).is_multiple_of(every))
    })?;
    let rope = |own: &Option<usize>| match (window, own) {
        (Some(_), None) => LayerRope::None,
        _ => LayerRope::Model,
    };
    Ok(DecoderConfig {
        qk_norm: Some(QkNorm::Head),
        input_norms: false,
        branch_norms: true,
        layer_rope: sliding_window.iter().map(rope).collect(),
        sliding_window,
        ..decoder
    })
}

fn cwm(fields: &mut Fields) -> Result<DecoderConfig> {
    let mut defaults = Defaults::new(131_072);
    defaults.vocab_size = Some(128_256);
    defaults.num_heads = Some(48);
    defaults.num_kv_heads = Some(8);
    defaults.head_dim = Some(128);
    defaults.rms_norm_eps = 1e-5;
    defaults.rope_theta = 1_000_000.0;
    let mut decoder = decoder(fields, defaults)?;
    mlp_bias(fields, &mut decoder)?;
    let old = fields.object("rope_scaling")?;
    if old.or(fields.object("rope_parameters")?).is_none() {
        decoder.rope.scaling = RopeScaling::Llama3 {
            factor: 16.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
    }
    let window = fields.optional_size("sliding_window")?.unwrap_or(8192);
    decoder.sliding_window = windows(fields, decoder.num_layers, Some(window), |layer| {
        !layer.is_multiple_of(4)
    })?;
    Ok(decoder)
}
