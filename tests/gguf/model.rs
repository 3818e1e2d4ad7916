use std::fs;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use qlora::export::{GgufBase, GgufReport, GgufType, write_gguf_model};
use qlora::model::RopeScaling;
use qlora::quant::DenseTensor;
use qlora::{Error, Result};
use serde_json::{Value, json};

use super::files::*;

/// Names in the checkpoint and in the file; `0` stands for any layer.
const NAMES: [(&str, &str); 23] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
    (
        "model.layers.0.input_layernorm.weight",
        "blk.0.attn_norm.weight",
    ),
    (
        "model.layers.0.post_attention_layernorm.weight",
        "blk.0.ffn_norm.weight",
    ),
    (
        "model.layers.0.self_attn.q_norm.weight",
        "blk.0.attn_q_norm.weight",
    ),
    (
        "model.layers.0.self_attn.k_norm.weight",
        "blk.0.attn_k_norm.weight",
    ),
    (
        "model.layers.0.self_attn.q_proj.weight",
        "blk.0.attn_q.weight",
    ),
    (
        "model.layers.0.self_attn.k_proj.weight",
        "blk.0.attn_k.weight",
    ),
    (
        "model.layers.0.self_attn.v_proj.weight",
        "blk.0.attn_v.weight",
    ),
    (
        "model.layers.0.self_attn.o_proj.weight",
        "blk.0.attn_output.weight",
    ),
    (
        "model.layers.0.mlp.gate_proj.weight",
        "blk.0.ffn_gate.weight",
    ),
    ("model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight"),
    (
        "model.layers.0.mlp.down_proj.weight",
        "blk.0.ffn_down.weight",
    ),
    ("model.layers.0.self_attn.q_proj.bias", "blk.0.attn_q.bias"),
    ("model.layers.0.self_attn.k_proj.bias", "blk.0.attn_k.bias"),
    ("model.layers.0.self_attn.v_proj.bias", "blk.0.attn_v.bias"),
    (
        "model.layers.0.self_attn.o_proj.bias",
        "blk.0.attn_output.bias",
    ),
    ("model.layers.0.mlp.gate_proj.bias", "blk.0.ffn_gate.bias"),
    ("model.layers.0.mlp.up_proj.bias", "blk.0.ffn_up.bias"),
    (
        "model.layers.0.self_attn.qkv_proj.weight",
        "blk.0.attn_qkv.weight",
    ),
    (
        "model.layers.0.mlp.gate_up_proj.weight",
        "blk.0.ffn_up.weight",
    ),
    ("model.layers.0.mlp.down_proj.bias", "blk.0.ffn_down.bias"),
];

/// The names of norms on what is added to the residual stream, and of one before the MLP beside them.
const NORMS_OF_BRANCHES: [(&str, &str); 3] = [
    (
        "model.layers.0.post_attention_layernorm.weight",
        "blk.0.post_attention_norm.weight",
    ),
    (
        "model.layers.0.pre_feedforward_layernorm.weight",
        "blk.0.ffn_norm.weight",
    ),
    (
        "model.layers.0.post_feedforward_layernorm.weight",
        "blk.0.post_ffw_norm.weight",
    ),
];

/// Those of GLM's.
const NORMS_OF_GLM: [(&str, &str); 2] = [
    (
        "model.layers.0.post_self_attn_layernorm.weight",
        "blk.0.post_attention_norm.weight",
    ),
    (
        "model.layers.0.post_mlp_layernorm.weight",
        "blk.0.post_ffw_norm.weight",
    ),
];

fn file_name(name: &str, architecture: &str) -> String {
    let layer = name.split('.').nth(2).filter(|_| name.contains(".layers."));
    let layer = layer.unwrap_or("0");
    let any = name.replace(&format!(".layers.{layer}."), ".layers.0.");
    let of_branches = NORMS_OF_BRANCHES
        .iter()
        .filter(|_| ["gemma2", "gemma3", "olmo2", "seed_oss", "exaone4"].contains(&architecture));
    let mut names = of_branches.chain(&NORMS_OF_GLM).chain(&NAMES);
    let (_, file) = names.find(|(name, _)| *name == any).unwrap();
    file.replace("blk.0.", &format!("blk.{layer}."))
}

pub fn write(
    model: &Model,
    config: &Value,
    file_type: GgufType,
    path: &Path,
) -> Result<GgufReport> {
    let base = GgufBase {
        config,
        dir: &tokenizer_dir(),
        name: "a model",
    };
    write_gguf_model(model, base, file_type, path, |_| ())
}

/// A random model of this config, written and read.
fn written(config: &Value, file_type: GgufType) -> (Model, Gguf, GgufReport) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let model = Model::random(config);
    let report = write(&model, config, file_type, &path).unwrap();
    assert_eq!(report.written_bytes, path.metadata().unwrap().len());
    let gguf = Gguf::read(&path);
    assert_eq!(report.tensors, gguf.names().len());
    (model, gguf, report)
}

/// Why a model of this config is not written, and that there is no file then.
fn refusal(model: &Model, config: &Value, file_type: GgufType) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let error = write(model, config, file_type, &dir.path().join("model.gguf"));
    assert_eq!(dir.path().read_dir().unwrap().count(), 0);
    error.expect_err("a refusal")
}

/// The engine's families, and llama with all biases.
pub fn configs() -> Vec<Value> {
    let mut biased = config_with_vocabulary("llama_mha");
    biased["attention_bias"] = true.into();
    biased["mlp_bias"] = true.into();
    let cases = [
        "llama_mha",
        "llama_gqa",
        "llama_odd",
        "mistral",
        "qwen2",
        "qwen3",
        "qwen2_yarn",
    ];
    let mut configs: Vec<Value> = cases.map(config_with_vocabulary).into();
    configs.push(biased);
    let mut smollm3 = config_with_vocabulary("smollm3");
    smollm3["no_rope_layers"] = json!([1, 1]);
    configs.push(smollm3);
    let mut gemma3 = config_with_vocabulary("gemma3");
    gemma3["query_pre_attn_scalar"] = gemma3["head_dim"].clone();
    configs.push(gemma3);
    configs.push(config_with_vocabulary("gemma"));
    let mut gemma2 = config_with_vocabulary("gemma2");
    gemma2["query_pre_attn_scalar"] = gemma2["head_dim"].clone();
    configs.push(gemma2);
    configs.extend(["granite", "olmo2", "ministral3"].map(config_with_vocabulary));
    let mut olmo3 = config_with_vocabulary("olmo3");
    olmo3["rope_parameters"]["sliding_attention"] =
        json!({"rope_type": "default", "rope_theta": 5e4});
    configs.push(olmo3);
    let mut seed_oss = config_with_vocabulary("seed_oss");
    seed_oss["attention_out_bias"] = false.into();
    configs.push(seed_oss);
    configs.push(exaone4_with_windows());
    let mut exaone4 = config_with_vocabulary("exaone4");
    exaone4["sliding_window"] = Value::Null;
    exaone4["layer_types"] = json!(["full_attention", "full_attention"]);
    configs.push(exaone4);
    let mut iquestcoder = config_with_vocabulary("llama_gqa");
    iquestcoder["model_type"] = "iquestcoder".into();
    configs.push(iquestcoder);
    let mut phi3 = config_with_vocabulary("phi3");
    phi3["sliding_window"] = Value::Null;
    phi3["partial_rotary_factor"] = 0.75.into();
    phi3["rope_parameters"]["partial_rotary_factor"] = 0.75.into();
    configs.push(phi3);
    configs.push(config_with_vocabulary("glm4"));
    configs
}

/// With the number of layers by which llama.cpp knows that it has them.
fn exaone4_with_windows() -> Value {
    let mut config = config_with_vocabulary("exaone4");
    config["num_hidden_layers"] = 64.into();
    config["layer_types"] = Value::Null;
    config["sliding_window_pattern"] = 4.into();
    config
}

/// The last of those that is of this family.
pub fn config_of(model_type: &str) -> Value {
    let mut of_family = configs();
    of_family.retain(|config| config["model_type"] == model_type);
    of_family.pop().unwrap()
}

#[test]
fn every_tensor_has_its_name_shape_and_values_in_the_order_of_llama_cpp() {
    for config in configs() {
        let (model, gguf, _) = written(&config, GgufType::F32);
        let decoder = decoder(&config);
        let architecture = gguf.text("general.architecture");
        let is_reordered = ["llama", "smollm3", "granite", "mistral3"].contains(&architecture);
        let mut names: Vec<String> = model
            .0
            .keys()
            .map(|name| file_name(name, architecture))
            .collect();
        if gguf.names().contains(&"rope_freqs.weight") {
            names.push("rope_freqs.weight".into());
        }
        names.sort_unstable();
        assert_eq!(gguf.names(), names);
        for (name, tensor) in &model.0 {
            let file_name = file_name(name, architecture);
            assert_eq!(gguf.shape(&file_name), tensor.shape, "{name}");
            assert_eq!(gguf.dtype(&file_name), GgmlDType::F32);
            let stored = gguf.values(&file_name);
            let is_rotated = is_reordered && (name.contains("q_proj") || name.contains("k_proj"));
            let mut values = tensor.to_f32_vec();
            if architecture.starts_with("gemma") && name.ends_with("norm.weight") {
                values.iter_mut().for_each(|weight| *weight += 1.0);
            }
            if is_rotated {
                let columns = tensor.shape.get(1).copied().unwrap_or(1);
                assert_ne!(stored, values, "{name}");
                assert_eq!(
                    unpermuted(&stored, decoder.head_dim, columns),
                    values,
                    "{name}"
                );
            } else {
                assert_eq!(stored, values, "{name}");
            }
        }
    }
}

#[test]
fn the_first_rows_of_a_head_are_those_that_turn_together() {
    let config = config_with_vocabulary("mistral");
    let (model, gguf, _) = written(&config, GgufType::F32);
    let (head_dim, columns) = (decoder(&config).head_dim, decoder(&config).hidden_size);
    let source = model.0["model.layers.1.self_attn.k_proj.weight"].to_f32_vec();
    let stored = gguf.values("blk.1.attn_k.weight");
    let row = |values: &[f32], row: usize| values[row * columns..][..columns].to_vec();
    // Of the second head.
    assert_eq!(row(&stored, head_dim), row(&source, head_dim));
    assert_eq!(
        row(&stored, head_dim + 1),
        row(&source, head_dim + head_dim / 2)
    );
    assert_eq!(row(&stored, head_dim + 2), row(&source, head_dim + 1));
}

#[test]
fn the_config_is_told_in_the_keys_of_its_architecture() {
    let architectures = [
        "llama", "llama", "llama", "llama", "qwen2", "qwen3", "qwen2", "llama", "smollm3",
        "gemma3", "gemma", "gemma2", "granite", "olmo2", "mistral3", "olmo2", "seed_oss",
        "exaone4", "exaone4", "llama", "phi3", "glm4",
    ];
    assert_eq!(configs().len(), architectures.len());
    for (config, architecture) in configs().into_iter().zip(architectures) {
        let (_, gguf, report) = written(&config, GgufType::Bf16);
        assert_eq!(report.notes, [] as [&str; 0]);
        let decoder = decoder(&config);
        assert_eq!(gguf.text("general.architecture"), architecture);
        assert_eq!(gguf.text("general.type"), "model");
        assert_eq!(gguf.text("general.name"), "a model");
        assert_eq!(gguf.u32("general.file_type"), 32);
        assert_eq!(gguf.u32("general.quantization_version"), 2);
        for (key, size) in [
            ("context_length", decoder.max_position_embeddings),
            ("embedding_length", decoder.hidden_size),
            ("block_count", decoder.num_layers),
            ("feed_forward_length", decoder.intermediate_size),
            ("attention.head_count", decoder.num_heads),
            ("attention.head_count_kv", decoder.num_kv_heads),
            ("attention.key_length", decoder.head_dim),
            ("attention.value_length", decoder.head_dim),
            ("rope.dimension_count", decoder.rotary_dim),
            ("vocab_size", 448),
        ] {
            assert_eq!(
                gguf.u32(&format!("{architecture}.{key}")),
                size as u32,
                "{key}"
            );
        }
        let number = |key: &str| gguf.f32(&format!("{architecture}.{key}"));
        let epsilon = number("attention.layer_norm_rms_epsilon");
        assert_eq!(epsilon, decoder.rms_norm_eps as f32);
        assert_eq!(number("rope.freq_base"), decoder.rope.theta as f32);
        let is_scaled = !matches!(
            decoder.rope.scaling,
            RopeScaling::None | RopeScaling::Llama3 { .. }
        );
        assert_eq!(
            gguf.has(&format!("{architecture}.rope.scaling.type")),
            is_scaled
        );
        let has_window_key = gguf.has(&format!("{architecture}.attention.sliding_window"));
        let has_windows = decoder.sliding_window.iter().any(Option::is_some);
        assert_eq!(has_window_key, has_windows && architecture != "llama");
        let has_theta_of_windows = gguf.has(&format!("{architecture}.rope.freq_base_swa"));
        assert_eq!(has_theta_of_windows, decoder.local_rope.is_some());
        let is_tied = config["tie_word_embeddings"] == true;
        assert_eq!(gguf.names().contains(&"output.weight"), !is_tied);
    }
}

#[test]
fn what_granite_multiplies_by_is_told_in_keys() {
    let (_, gguf, _) = written(&config_with_vocabulary("granite"), GgufType::F32);
    for (key, value) in [
        ("attention.scale", 0.09),
        ("embedding_scale", 6.0),
        ("residual_scale", 0.22),
        ("logit_scale", 0.7),
    ] {
        assert_eq!(gguf.f32(&format!("granite.{key}")), value, "{key}");
    }
}

#[test]
fn how_ministral3_scales_its_queries_is_told_in_keys() {
    let (_, gguf, _) = written(&config_with_vocabulary("ministral3"), GgufType::F32);
    for (key, value) in [
        ("attention.temperature_scale", 0.5),
        ("rope.scaling.factor", 4.0),
        ("rope.scaling.yarn_beta_fast", 4.0),
        // Both of DeepSeek's numbers are 1: nothing is multiplied.
        ("rope.scaling.yarn_log_multiplier", 1.0),
        ("rope.scaling.attn_factor", 1.0),
    ] {
        assert_eq!(gguf.f32(&format!("mistral3.{key}")), value, "{key}");
    }
    let original = "mistral3.rope.scaling.original_context_length";
    assert_eq!(gguf.u32(original), 8);
}

#[test]
fn the_windows_of_olmo3_are_told_in_keys() {
    let (_, gguf, _) = written(&config_of("olmo3"), GgufType::F32);
    assert_eq!(gguf.u32("olmo2.attention.sliding_window"), 12);
    assert_eq!(gguf.u32("olmo2.attention.sliding_window_pattern"), 2);
    assert_eq!(gguf.text("olmo2.rope.scaling.type"), "yarn");
    assert_eq!(gguf.f32("olmo2.rope.freq_base_swa"), 5e4);
}

#[test]
fn the_windows_and_caps_of_gemma2_are_told_in_keys() {
    let (_, gguf, _) = written(&config_of("gemma2"), GgufType::F16);
    assert_eq!(gguf.u32("gemma2.attention.sliding_window"), 12);
    assert_eq!(gguf.u32("gemma2.attention.sliding_window_pattern"), 2);
    assert_eq!(gguf.f32("gemma2.attn_logit_softcapping"), 2.0);
    assert_eq!(gguf.f32("gemma2.final_logit_softcapping"), 3.0);
}

#[test]
fn the_windows_of_exaone4_are_told_in_keys() {
    let (_, gguf, _) = written(&exaone4_with_windows(), GgufType::F16);
    assert_eq!(gguf.u32("exaone4.attention.sliding_window"), 12);
    assert_eq!(gguf.u32("exaone4.attention.sliding_window_pattern"), 4);
}

/// The one that sees is written by llama.cpp's own converter, and needs them.
#[test]
fn a_file_of_qwen3_vl_says_what_images_need() {
    let config = config_with_vocabulary("qwen3_vl");
    let (_, gguf, report) = written(&config, GgufType::F32);
    assert_eq!(gguf.text("general.architecture"), "qwen3vl");
    assert_eq!(gguf.u32("qwen3vl.n_deepstack_layers"), 1);
    let sections = gguf.i32s("qwen3vl.rope.dimension_sections");
    assert_eq!(sections, [6, 5, 5, 0]);
    assert!(gguf.names().contains(&"blk.1.attn_q_norm.weight"));
    assert!(report.notes[0].contains("--mmproj"), "{:?}", report.notes);
}

#[test]
fn linear_rope_scaling_is_a_key() {
    let mut config = config_with_vocabulary("qwen2");
    config["rope_parameters"] = json!({ "rope_type": "linear", "rope_theta": 1e4, "factor": 4.0 });
    let (_, gguf, _) = written(&config, GgufType::F32);
    assert_eq!(gguf.text("qwen2.rope.scaling.type"), "linear");
    assert_eq!(gguf.f32("qwen2.rope.scaling.factor"), 4.0);
    assert!(!gguf.names().contains(&"rope_freqs.weight"));
}

#[test]
fn yarn_is_told_in_keys() {
    let mut config = config_with_vocabulary("qwen2_yarn");
    let (_, gguf, _) = written(&config, GgufType::F32);
    assert_eq!(gguf.text("qwen2.rope.scaling.type"), "yarn");
    assert_eq!(gguf.u32("qwen2.rope.scaling.original_context_length"), 32);
    for (key, value) in [
        ("factor", 4.0),
        ("yarn_beta_fast", 32.0),
        ("yarn_beta_slow", 1.0),
        ("attn_factor", 1.0),
    ] {
        assert_eq!(
            gguf.f32(&format!("qwen2.rope.scaling.{key}")),
            value,
            "{key}"
        );
    }
    // llama.cpp multiplies what the paper has for the factor by this.
    config["rope_parameters"]["attention_factor"] = 0.5.into();
    let (_, gguf, _) = written(&config, GgufType::F32);
    let found = gguf.f32("qwen2.rope.scaling.attn_factor");
    assert!(
        (found * (0.1 * 4f32.ln() + 1.0) - 0.5).abs() < 1e-6,
        "{found}"
    );
}

#[test]
fn windows_of_gemma_are_told_in_keys() {
    let mut config = config_of("gemma3_text");
    let keys = |config: &Value| {
        let (_, gguf, report) = written(config, GgufType::F32);
        assert_eq!(report.notes, [] as [&str; 0]);
        let pattern = gguf.u32("gemma3.attention.sliding_window_pattern");
        (gguf.u32("gemma3.attention.sliding_window"), pattern)
    };
    assert_eq!(keys(&config), (12, 2));
    config["layer_types"] = json!(["sliding_attention", "sliding_attention"]);
    assert_eq!(keys(&config), (12, 6));
    let (_, gguf, _) = written(&config, GgufType::F32);
    assert_eq!(gguf.f32("gemma3.rope.freq_base_swa"), 1e4);
    assert_eq!(gguf.f32("gemma3.rope.freq_base"), 1e6);
    assert_eq!(gguf.f32("gemma3.rope.scaling.factor"), 8.0);
    config["layer_types"] = json!(["full_attention", "full_attention"]);
    let (_, gguf, _) = written(&config, GgufType::F32);
    assert!(!gguf.has("gemma3.attention.sliding_window"));
}

#[test]
fn of_a_model_that_also_sees_images_the_language_model_is_written_as_if_it_were_alone() {
    let mut whole = config_with_vocabulary("gemma3_vision");
    // What llama.cpp takes it for.
    let text = &mut whole["text_config"];
    text["query_pre_attn_scalar"] = text["head_dim"].clone();
    let alone = whole["text_config"].clone();
    let dir = tempfile::tempdir().unwrap();
    let [of_whole, of_alone] = ["whole", "alone"].map(|name| dir.path().join(name));
    let model = Model::random(&whole);
    let report = write(&model, &whole, GgufType::F32, &of_whole).unwrap();
    assert!(report.notes.len() == 1 && report.notes[0].contains("--mmproj"));
    let named = |(name, tensor): (String, DenseTensor)| {
        (name.replace("model.language_model.", "model."), tensor)
    };
    let model = Model(model.0.into_iter().map(named).collect());
    write(&model, &alone, GgufType::F32, &of_alone).unwrap();
    assert!(fs::read(of_whole).unwrap() == fs::read(of_alone).unwrap());
}

/// By the formula of Llama 3.1 as transformers writes it, with wavelengths.
#[test]
fn llama3_rope_scaling_is_a_tensor_of_divisors() {
    let mut config = config_with_vocabulary("llama_gqa");
    // Some wavelengths below, between and above the two bounds.
    config["rope_parameters"]["rope_theta"] = 20.0.into();
    let (_, gguf, _) = written(&config, GgufType::F16);
    let rope = &config["rope_parameters"];
    let [factor, low, high, original] = [
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ]
    .map(|field| rope[field].as_f64().unwrap());
    let head_dim = decoder(&config).head_dim;
    let divisor = |i: usize| {
        let theta = rope["rope_theta"].as_f64().unwrap();
        let wavelength = std::f64::consts::TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
        if wavelength < original / high {
            return 1.0;
        }
        if wavelength > original / low {
            return factor;
        }
        let smooth = (original / wavelength - low) / (high - low);
        1.0 / ((1.0 - smooth) / factor + smooth)
    };
    let expected: Vec<f64> = (0..head_dim / 2).map(divisor).collect();
    assert!(
        expected[0] == 1.0 && expected.iter().any(|d| *d > 1.0 && *d < factor),
        "{expected:?}"
    );
    assert_eq!(gguf.dtype("rope_freqs.weight"), GgmlDType::F32);
    let stored = gguf.values("rope_freqs.weight");
    assert_eq!(stored.len(), expected.len());
    for (stored, expected) in stored.iter().zip(expected) {
        assert!(
            (f64::from(*stored) / expected - 1.0).abs() < 1e-6,
            "{stored} {expected}"
        );
    }
}

#[test]
fn matrices_have_the_type_asked_for_and_vectors_are_f32() {
    // Rows of 96 and 80 elements: whole blocks of 32, and not.
    let mut config = config_with_vocabulary("llama_odd");
    config["hidden_size"] = 96.into();
    config["num_attention_heads"] = 6.into();
    config["num_key_value_heads"] = 3.into();
    config["head_dim"] = 16.into();
    config["intermediate_size"] = 80.into();
    for (file_type, dtype, odd_rows, number, bound) in [
        (
            GgufType::F16,
            GgmlDType::F16,
            GgmlDType::F16,
            1,
            2f32.powi(-12),
        ),
        (
            GgufType::Bf16,
            GgmlDType::BF16,
            GgmlDType::BF16,
            32,
            2f32.powi(-9),
        ),
        // Half a step of 1/127 of the largest value, which is below 1, and the scale's rounding.
        (GgufType::Q8_0, GgmlDType::Q8_0, GgmlDType::F16, 7, 0.0045),
    ] {
        let (model, gguf, _) = written(&config, file_type);
        assert_eq!(gguf.u32("general.file_type"), number);
        assert_eq!(gguf.dtype("token_embd.weight"), dtype);
        assert_eq!(gguf.dtype("blk.1.ffn_up.weight"), dtype);
        assert_eq!(gguf.dtype("blk.1.ffn_down.weight"), odd_rows);
        assert_eq!(gguf.dtype("blk.1.ffn_norm.weight"), GgmlDType::F32);
        let source = model.0["model.layers.1.mlp.up_proj.weight"].to_f32_vec();
        let stored = gguf.values("blk.1.ffn_up.weight");
        let errors = stored.iter().zip(&source).map(|(a, b)| (a - b).abs());
        let largest = errors.fold(0.0, f32::max);
        assert!(
            largest > 0.0 && largest <= bound,
            "{file_type:?}: {largest}"
        );
    }
}

#[test]
fn a_value_that_the_type_cannot_hold_is_refused_by_the_name_of_its_tensor() {
    const NAME: &str = "model.layers.1.mlp.down_proj.weight";
    let config = config_with_vocabulary("llama_mha");
    let mut model = Model::random(&config);
    let shape = model.0[NAME].shape.clone();
    let mut spoil = |value: f32| {
        let mut values = random(&shape, 7).to_f32_vec();
        values[shape[1] + 3] = value;
        model
            .0
            .insert(NAME.into(), DenseTensor::from_f32(shape.clone(), &values));
        Model(model.0.clone())
    };
    for (value, file_type) in [
        (70_000.0, GgufType::F16),
        (f32::MAX, GgufType::Bf16),
        (f32::NAN, GgufType::F32),
        (f32::INFINITY, GgufType::Q8_0),
        (1e8, GgufType::Q8_0),
    ] {
        let error = refusal(&spoil(value), &config, file_type).to_string();
        assert!(error.contains(NAME), "{error}");
        assert!(error.contains(&format!("{value} at [1, 3]")), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    write(&spoil(65_504.0), &config, GgufType::F16, &path).unwrap();
    write(&spoil(70_000.0), &config, GgufType::Q8_0, &path).unwrap();
}

#[test]
fn a_source_that_does_not_fit_its_config_is_refused() {
    let config = config_with_vocabulary("llama_mha");
    let mut model = Model::random(&config);
    model.0.remove("model.norm.weight");
    let error = refusal(&model, &config, GgufType::F16);
    assert!(matches!(error, Error::MissingTensor { .. }), "{error}");
    model.0.insert("model.norm.weight".into(), random(&[3], 0));
    let error = refusal(&model, &config, GgufType::F16).to_string();
    assert!(
        error.contains("`model.norm.weight`") && error.contains("found [3]"),
        "{error}"
    );
}

#[test]
fn what_llama_cpp_does_not_compute_is_refused_by_its_field() {
    let rope = config("llama_gqa")["rope_parameters"].clone();
    for (case, field, value) in [
        ("qwen3", "attention_bias", true.into()),
        ("qwen2", "rope_parameters", rope.clone()),
        ("qwen3", "rope_scaling", rope),
        ("llama_mha", "model_type", "gemma3n".into()),
        ("llama_mha", "hidden_act", "gelu_new".into()),
        ("gemma3", "query_pre_attn_scalar", 24.into()),
        ("gemma3", "hidden_activation", "silu".into()),
        ("gemma3", "final_logit_softcapping", 30.into()),
        ("gemma", "tie_word_embeddings", false.into()),
        ("gemma2", "attn_logit_softcapping", Value::Null),
        ("gemma2", "query_pre_attn_scalar", 24.into()),
        ("gemma2", "tie_word_embeddings", false.into()),
        (
            "gemma2",
            "layer_types",
            json!(["full_attention", "sliding_attention"]),
        ),
        ("smollm3", "mlp_bias", true.into()),
        (
            "ministral3",
            "rope_parameters",
            json!({
                "rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8,
            }),
        ),
        ("olmo2", "attention_bias", true.into()),
        ("olmo2", "tie_word_embeddings", true.into()),
        ("olmo2", "head_dim", 32.into()),
        (
            "olmo3",
            "layer_types",
            json!(["full_attention", "sliding_attention"]),
        ),
        (
            "olmo3",
            "rope_parameters",
            config("olmo3")["rope_parameters"].clone(),
        ),
        (
            "qwen2",
            "rope_parameters",
            json!({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 16.0}),
        ),
        (
            "qwen2",
            "rope_parameters",
            json!({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "truncate": false}),
        ),
        ("smollm3", "no_rope_layers", json!([1, 0])),
        (
            "phi3_longrope",
            "rope_parameters",
            config("phi3_longrope")["rope_parameters"].clone(),
        ),
        ("seed_oss", "attention_out_bias", true.into()),
        ("exaone4", "sliding_window", 12.into()),
        ("exaone4", "head_dim", 32.into()),
        ("exaone4", "layer_types", json!(vec!["full_attention"; 64])),
        (
            "gemma3",
            "layer_types",
            json!(["full_attention", "sliding_attention"]),
        ),
    ] {
        let mut config = config_with_vocabulary(case);
        if case == "gemma3" {
            config["query_pre_attn_scalar"] = config["head_dim"].clone();
        }
        if case == "olmo3" {
            config["rope_parameters"] = json!({});
        }
        if field == "layer_types" && case == "exaone4" {
            config["num_hidden_layers"] = 64.into();
        }
        config[field] = value;
        let model = Model(Default::default());
        let error = refusal(&model, &config, GgufType::F16);
        let Error::UnsupportedModel { field: found, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(found, field);
    }
}

#[test]
fn a_window_that_llama_cpp_does_not_have_is_noted() {
    for case in ["mistral_sw", "cwm", "phi3"] {
        let mut config = config_with_vocabulary(case);
        let (_, _, report) = written(&config, GgufType::F16);
        assert_eq!(report.notes.len(), 1);
        let window = config["sliding_window"].to_string();
        assert!(report.notes[0].contains(&format!("the last {window} tokens")));
        // No text is that long.
        config["sliding_window"] = config["max_position_embeddings"].clone();
        assert_eq!(written(&config, GgufType::F16).2.notes, [] as [&str; 0]);
    }
}

#[test]
fn progress_ends_with_all_bytes() {
    let config = config_with_vocabulary("qwen3");
    let dir = tempfile::tempdir().unwrap();
    let base = GgufBase {
        config: &config,
        dir: &tokenizer_dir(),
        name: "",
    };
    let mut seen = Vec::new();
    let model = Model::random(&config);
    let path = dir.path().join("model.gguf");
    write_gguf_model(&model, base, GgufType::F16, &path, |progress| {
        seen.push((
            progress.tensor.to_string(),
            progress.done_bytes,
            progress.total_bytes,
        ));
    })
    .unwrap();
    assert_eq!(seen.len(), model.0.len());
    assert!(seen.is_sorted_by(|a, b| a.1 < b.1));
    let (_, done, total) = seen.last().unwrap();
    assert_eq!(done, total);
}

/// As llama-quantize has them.
#[test]
fn a_file_of_mixed_types_has_more_bits_where_they_tell_most() {
    let mut config = config_with_vocabulary("llama_mha");
    for (field, size) in [
        ("hidden_size", 256),
        ("intermediate_size", 512),
        ("num_hidden_layers", 8),
        ("head_dim", 64),
    ] {
        config[field] = size.into();
    }
    config["tie_word_embeddings"] = false.into();
    let (_, gguf, report) = written(&config, GgufType::Q4KM);
    assert_eq!(gguf.u32("general.file_type"), 15);
    assert_eq!(report.notes, [] as [&str; 0]);
    let layers_of = |module: &str| {
        let is_larger =
            |layer: &usize| gguf.dtype(&format!("blk.{layer}.{module}.weight")) == GgmlDType::Q6K;
        (0..8).filter(is_larger).collect::<Vec<_>>()
    };
    // The first eighth, the last, and each third between.
    assert_eq!(layers_of("attn_v"), [0, 3, 6, 7]);
    assert_eq!(layers_of("ffn_down"), [0, 3, 6, 7]);
    assert_eq!(layers_of("attn_q"), [] as [usize; 0]);
    assert_eq!(gguf.dtype("output.weight"), GgmlDType::Q6K);
    assert_eq!(gguf.dtype("token_embd.weight"), GgmlDType::Q4K);
    assert_eq!(gguf.dtype("blk.1.attn_norm.weight"), GgmlDType::F32);
    config["tie_word_embeddings"] = true.into();
    let (_, gguf, _) = written(&config, GgufType::Q5KM);
    assert_eq!(gguf.dtype("token_embd.weight"), GgmlDType::Q6K);
    assert_eq!(gguf.dtype("blk.1.ffn_up.weight"), GgmlDType::Q5K);

    let mut phi3 = config_with_vocabulary("phi3");
    for (field, size) in [("hidden_size", 256), ("intermediate_size", 512)] {
        phi3[field] = size.into();
    }
    for (file_type, of_qkv, of_up) in [
        (GgufType::Q4KM, GgmlDType::Q5K, GgmlDType::Q4K),
        (GgufType::Q5KM, GgmlDType::Q6K, GgmlDType::Q5K),
    ] {
        let (_, gguf, _) = written(&phi3, file_type);
        assert_eq!(gguf.dtype("blk.1.attn_qkv.weight"), of_qkv);
        assert_eq!(gguf.dtype("blk.1.ffn_up.weight"), of_up);
    }

    // Rows that are no whole blocks.
    config["hidden_size"] = 192.into();
    let (_, gguf, report) = written(&config, GgufType::Q4KM);
    assert_eq!(gguf.dtype("blk.1.ffn_up.weight"), GgmlDType::Q8_0);
    assert_eq!(gguf.dtype("blk.1.ffn_down.weight"), GgmlDType::Q4K);
    assert!(
        report.notes[0].contains("no blocks of 256"),
        "{:?}",
        report.notes
    );
}
