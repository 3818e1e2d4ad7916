//! What llama.cpp reads of a model beside its tensors and its vocabulary.
//!
//! Source: `TextModel.set_gguf_parameters` of `convert_hf_to_gguf.py`, `gguf-py/gguf/constants.py`.

use serde::Deserialize;

use super::architecture::{Architecture, as_u32};
use super::writer::{Metadata, Value};
use super::{GgufBase, GgufType};
use crate::model::{DecoderConfig, RopeConfig, RopeScaling, yarn_amplitude};
use crate::quant::DenseTensor;

/// `GGML_QNT_VERSION`.
const QUANTIZATION_VERSION: u32 = 2;

/// In which layers there is a window, without the architecture's name.
pub(super) const WINDOW_PATTERN: &str = "attention.sliding_window_pattern";

/// The tensor with the divisors of the rotary frequencies.
pub(super) const ROPE_FREQS: &str = "rope_freqs.weight";

pub(super) fn add(
    metadata: &mut Metadata,
    base: &GgufBase,
    architecture: Architecture,
    config: &DecoderConfig,
    file_type: GgufType,
) {
    let name = architecture.name();
    metadata.add_text("general.architecture", name);
    metadata.add_text("general.type", "model");
    metadata.add_text("general.name", base.name);
    metadata.add_u32("general.file_type", file_type.file_type());
    metadata.add_u32("general.quantization_version", QUANTIZATION_VERSION);
    for (key, size) in [
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("block_count", config.num_layers),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_heads),
        ("attention.head_count_kv", config.num_kv_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.rotary_dim),
        ("vocab_size", config.vocab_size),
    ] {
        metadata.add_u32(format!("{name}.{key}"), as_u32(size));
    }
    let mut add_f32 = |key: &str, value: f64| {
        metadata.add(format!("{name}.{key}"), Value::F32(value as f32));
    };
    add_f32("attention.layer_norm_rms_epsilon", config.rms_norm_eps);
    add_f32("rope.freq_base", config.rope.theta);
    if let Some(scaling) = config.rope.query_scaling {
        add_f32("attention.temperature_scale", scaling.beta);
    }
    if let Some(cap) = config.attention_soft_cap {
        add_f32("attn_logit_softcapping", cap);
    }
    if let Some(cap) = config.logits_soft_cap {
        add_f32("final_logit_softcapping", cap);
    }
    if architecture == Architecture::Granite {
        add_f32("attention.scale", config.attention_scale);
        add_f32("embedding_scale", config.embedding_multiplier);
        add_f32("residual_scale", config.residual_multiplier);
        add_f32("logit_scale", config.logits_scaling);
    }
    match config.rope.scaling {
        RopeScaling::None | RopeScaling::Llama3 { .. } => {}
        RopeScaling::LongRope { .. } => unreachable!("the config has been checked"),
        RopeScaling::Linear { factor } => {
            add_f32("rope.scaling.factor", factor);
            metadata.add_text(format!("{name}.rope.scaling.type"), "linear");
        }
        RopeScaling::Yarn {
            factor,
            attention_factor,
            beta_fast,
            beta_slow,
            original_max_position_embeddings: original,
            ..
        } => {
            add_f32("rope.scaling.factor", factor);
            add_f32("rope.scaling.yarn_beta_fast", beta_fast);
            add_f32("rope.scaling.yarn_beta_slow", beta_slow);
            // llama.cpp has the paper's factor by itself, or DeepSeek's ratio, and multiplies it by this.
            let rope = base.field(base.rope_field());
            let mscale_all_dim = rope["mscale_all_dim"].as_f64();
            let divisor = mscale_all_dim.filter(|_| architecture == Architecture::Mistral3);
            if let Some(mscale) = divisor {
                add_f32("rope.scaling.yarn_log_multiplier", mscale);
            }
            let divisor = divisor.map_or(1.0, |mscale| yarn_amplitude(factor, mscale));
            let own = yarn_amplitude(factor, 1.0) / divisor;
            add_f32("rope.scaling.attn_factor", attention_factor / own);
            metadata.add_text(format!("{name}.rope.scaling.type"), "yarn");
            let key = format!("{name}.rope.scaling.original_context_length");
            metadata.add_u32(key, as_u32(original));
        }
    }
    if architecture == Architecture::Qwen3Vl {
        add_what_images_need(metadata, base, name);
    }
    if let Some(local) = &config.local_rope {
        metadata.add(
            format!("{name}.rope.freq_base_swa"),
            Value::F32(local.theta as f32),
        );
    }
    let windows = config.sliding_window.iter();
    if let (true, Some(window)) = (architecture.has_windows(), windows.flatten().next()) {
        metadata.add_u32(format!("{name}.attention.sliding_window"), as_u32(*window));
        let pattern = architecture.window_pattern(config);
        let pattern = pattern.expect("the config has been checked");
        let key = format!("{name}.{WINDOW_PATTERN}");
        metadata.add_u32(key, as_u32(pattern));
    }
}

/// What a file of Qwen3-VL's language model says for the one that sees: how the axes of an image share the rotary
/// frequencies, and to how many layers' outputs images are added.
fn add_what_images_need(metadata: &mut Metadata, base: &GgufBase, name: &str) {
    // What transformers takes where the config does not say.
    const SECTIONS: [i32; 3] = [24, 20, 20];
    const DEEPSTACK_LAYERS: usize = 3;
    let rope = base.field(base.rope_field());
    let sections: Option<Vec<i32>> = Deserialize::deserialize(&rope["mrope_section"]).ok();
    let mut sections = sections.unwrap_or_else(|| SECTIONS.into());
    sections.resize(4, 0);
    metadata.add(
        format!("{name}.rope.dimension_sections"),
        Value::I32s(sections),
    );
    let layers = base.field("vision_config")["deepstack_visual_indexes"].as_array();
    let layers = layers.map_or(DEEPSTACK_LAYERS, Vec::len);
    metadata.add_u32(format!("{name}.n_deepstack_layers"), as_u32(layers));
}

/// What llama.cpp takes where a file does not have a key, which is told without the architecture's name.
///
/// Source: `llama_model::load_hparams` of llama.cpp.
pub(super) fn default_of(
    key: &str,
    architecture: Architecture,
    config: &DecoderConfig,
) -> Option<Value> {
    let size = match key {
        "attention.head_count_kv" => config.num_heads,
        "attention.key_length" | "attention.value_length" => config.hidden_size / config.num_heads,
        "rope.dimension_count" => config.rotary_dim,
        "vocab_size" => config.vocab_size,
        WINDOW_PATTERN => architecture.default_window_pattern()?,
        "rope.freq_base_swa" if architecture == Architecture::Olmo2 => {
            return Some(Value::F32(config.rope.theta as f32));
        }
        "attn_logit_softcapping" => return Some(Value::F32(50.0)),
        "final_logit_softcapping" => return Some(Value::F32(30.0)),
        "rope.freq_base" | "rope.freq_base_swa" => return Some(Value::F32(10_000.0)),
        "attention.scale" => return Some(Value::F32(1.0 / (config.head_dim as f32).sqrt())),
        "embedding_scale" | "residual_scale" => return Some(Value::F32(1.0)),
        "attention.temperature_scale" | "rope.scaling.yarn_log_multiplier" => {
            return Some(Value::F32(0.0));
        }
        "n_deepstack_layers" => 0,
        "rope.scaling.yarn_beta_fast" => return Some(Value::F32(32.0)),
        "rope.scaling.yarn_beta_slow" | "rope.scaling.attn_factor" => {
            return Some(Value::F32(1.0));
        }
        "rope.scaling.original_context_length" => config.max_position_embeddings,
        _ => return None,
    };
    Some(Value::U32(as_u32(size)))
}

/// By what llama.cpp divides each rotary frequency, `[head_dim / 2]`; `None` if the keys say it all.
pub(super) fn rope_divisors(config: &DecoderConfig) -> Option<DenseTensor> {
    let RopeScaling::Llama3 { .. } = config.rope.scaling else {
        return None;
    };
    let plain = RopeConfig {
        scaling: RopeScaling::None,
        ..config.rope.clone()
    };
    let frequencies = |rope: &RopeConfig| rope.inv_freq(config.rotary_dim, false);
    let (plain, scaled) = (frequencies(&plain), frequencies(&config.rope));
    let divisors = plain
        .iter()
        .zip(scaled)
        .map(|(plain, scaled)| plain / scaled);
    let divisors: Vec<f32> = divisors.collect();
    Some(DenseTensor::from_f32(vec![divisors.len()], &divisors))
}
