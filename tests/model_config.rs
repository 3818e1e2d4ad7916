//! `config.json` to `DecoderConfig`: both generations of the file say the same, and what is not understood is named.

use std::path::Path;

use qlora::model::{
    Activation, DecoderConfig, LayerRope, ModelTensor, NormNames, QkNorm, QueryScaling, RopeConfig,
    RopeScaling,
};
use serde_json::{Value, json};

fn read(config: &Value) -> qlora::Result<DecoderConfig> {
    DecoderConfig::from_json(config, Path::new("model/config.json"))
}

fn error(config: &Value) -> String {
    read(config).unwrap_err().to_string()
}

fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in `{message}`");
    }
}

/// `config` with the fields of `changes` set.
fn with(mut config: Value, changes: Value) -> Value {
    let fields = config.as_object_mut().unwrap();
    fields.extend(changes.as_object().unwrap().clone());
    config
}

fn without(mut config: Value, field: &str) -> Value {
    config.as_object_mut().unwrap().remove(field).unwrap();
    config
}

/// Without anything about rotary embedding.
fn small(model_type: &str) -> Value {
    json!({
        "architectures": ["SomeForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 320,
        "max_position_embeddings": 256,
        "model_type": model_type,
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false,
        "use_cache": true,
        "vocab_size": 466,
    })
}

#[test]
fn both_generations_of_rope_fields_give_the_same_config() {
    let none = json!({"rope_type": "default"});
    let linear = json!({"rope_type": "linear", "factor": 4.0});
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    });
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64});
    for model_type in ["llama", "mistral", "qwen2", "qwen3", "smollm3"] {
        for scaling in [&none, &linear, &llama3, &yarn] {
            let new = json!({"dtype": "bfloat16", "rope_parameters": with(scaling.clone(), json!({"rope_theta": 5e5}))});
            let old =
                json!({"torch_dtype": "bfloat16", "rope_theta": 500000, "rope_scaling": scaling});
            let new = read(&with(small(model_type), new)).unwrap();
            assert_eq!(
                new,
                read(&with(small(model_type), old)).unwrap(),
                "{model_type} {scaling}"
            );
            assert_eq!(new.rope.theta, 5e5);
        }
    }
}

#[test]
fn rope_scaling_is_read_from_either_key() {
    let scaling = |config: Value| read(&with(small("llama"), config)).unwrap().rope;
    let linear = RopeConfig {
        theta: 1e4,
        scaling: RopeScaling::Linear { factor: 2.0 },
        query_scaling: None,
    };
    assert_eq!(
        scaling(json!({"rope_scaling": {"type": "linear", "factor": 2.0}})),
        linear
    );
    assert_eq!(
        scaling(json!({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2}})),
        linear
    );
    let plain = RopeConfig {
        theta: 1e4,
        scaling: RopeScaling::None,
        query_scaling: None,
    };
    assert_eq!(scaling(json!({"rope_scaling": null})), plain);
    assert_eq!(scaling(json!({})), plain);
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0});
    let RopeScaling::Llama3 {
        original_max_position_embeddings,
        ..
    } = scaling(json!({"rope_scaling": llama3})).scaling
    else {
        panic!("read as another scaling");
    };
    assert_eq!(original_max_position_embeddings, 256);
}

#[test]
fn yarn_takes_what_is_not_said_from_the_paper() {
    let scaling = |rope: Value| {
        let rope = with(json!({"rope_type": "yarn", "factor": 4.0}), rope);
        let config = with(small("qwen2"), json!({"rope_parameters": rope}));
        read(&config).unwrap().rope.scaling
    };
    let usual = RopeScaling::Yarn {
        factor: 4.0,
        attention_factor: 0.1 * 4f64.ln() + 1.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_max_position_embeddings: 256,
        truncate: true,
    };
    assert_eq!(scaling(json!({})), usual);
    let changed = json!({
        "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2, "original_max_position_embeddings": 64, "truncate": false,
    });
    let changed_scaling = RopeScaling::Yarn {
        factor: 4.0,
        attention_factor: 1.5,
        beta_fast: 16.0,
        beta_slow: 2.0,
        original_max_position_embeddings: 64,
        truncate: false,
    };
    assert_eq!(scaling(changed), changed_scaling);
    let of_deepseek = scaling(json!({"mscale": 1.0, "mscale_all_dim": 1.0}));
    let RopeScaling::Yarn {
        attention_factor, ..
    } = of_deepseek
    else {
        panic!("read as another scaling");
    };
    assert_eq!(attention_factor, 1.0);
    let without = json!({"mscale": 1.0, "mscale_all_dim": 0});
    assert_eq!(scaling(without), scaling(json!({})));
    // The length says the factor where that is null.
    let implied = json!({"factor": null, "original_max_position_embeddings": 32});
    let RopeScaling::Yarn { factor, .. } = scaling(implied) else {
        panic!("read as another scaling");
    };
    assert_eq!(factor, 8.0);
    let rope = json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 2});
    assert_says(
        &error(&with(small("qwen2"), json!({"rope_parameters": rope}))),
        &["`rope_parameters.beta_fast` 1 is below"],
    );
}

#[test]
fn smollm3_leaves_out_the_rotary_embedding_of_the_layers_its_config_names() {
    use LayerRope::{Model, None};
    let ropes = |change| read(&with(small("smollm3"), change)).unwrap().layer_rope;
    assert_eq!(ropes(json!({})), [Model, Model, Model, None]);
    assert_eq!(
        ropes(json!({"no_rope_layer_interval": 2})),
        [Model, None, Model, None]
    );
    assert_eq!(
        ropes(json!({"no_rope_layers": [0, 1, 1, 0], "pretraining_tp": 2})),
        [None, Model, Model, None]
    );
    let windows = json!({"use_sliding_window": true, "sliding_window": 12});
    let windowed = read(&with(small("smollm3"), windows)).unwrap();
    assert_eq!(windowed.sliding_window[2..], [Option::None, Some(12)]);
    assert_says(
        &error(&with(small("smollm3"), json!({"no_rope_layers": [1, 1]}))),
        &["`no_rope_layers` has 2 entries for 4 layers"],
    );
    let silent = without(small("smollm3"), "tie_word_embeddings");
    let silent = read(&silent).unwrap();
    assert!(silent.tie_word_embeddings && silent.rope.theta == 2e6);
}

#[test]
fn both_generations_of_gemma3_give_the_same_config() {
    let old = json!({
        "attn_logit_softcapping": null, "final_logit_softcapping": null, "cache_implementation": "hybrid",
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 144, "rope_theta": 1e6,
        "rope_local_base_freq": 1e4, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 12, "sliding_window_pattern": 2, "head_dim": 32, "hidden_act": null,
    });
    let new = json!({
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 144, "use_bidirectional_attention": false,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 12, "_sliding_window_pattern": 6, "head_dim": 32, "hidden_act": null,
    });
    let gemma = read(&with(small("gemma3_text"), old)).unwrap();
    assert_eq!(gemma, read(&with(small("gemma3_text"), new)).unwrap());
    let linear = RopeScaling::Linear { factor: 8.0 };
    assert_eq!((gemma.rope.theta, gemma.rope.scaling), (1e6, linear));
    let local = gemma.local_rope.unwrap();
    assert_eq!((local.theta, local.scaling), (1e4, RopeScaling::None));
    assert_eq!(gemma.sliding_window, [Some(12), None, Some(12), None]);
    let (local, model) = (LayerRope::Local, LayerRope::Model);
    assert_eq!(gemma.layer_rope, [local, model, local, model]);
    assert_eq!(gemma.qk_norm, Some(QkNorm::Head));
    assert!(gemma.input_norms && gemma.branch_norms && gemma.norms_less_one);
    assert_eq!(gemma.activation, Activation::GeluTanh);
    assert_eq!(gemma.attention_scale, 1.0 / 12.0);
    assert_eq!(gemma.embedding_scale, 128f64.sqrt());
    let bare = with(small("gemma3_text"), json!({"hidden_act": null}));
    let bare = read(&bare).unwrap();
    assert_eq!(bare.activation, Activation::GeluTanh);
    assert_eq!((bare.head_dim, bare.attention_scale), (256, 1.0 / 16.0));
    assert_eq!(bare.sliding_window, [Some(4096); 4]);
    for change in [
        json!({"use_bidirectional_attention": true}),
        json!({"hidden_activation": "relu"}),
        json!({"rope_parameters": {"linear_attention": {}}}),
    ] {
        let message = error(&with(small("gemma3_text"), change));
        assert_says(&message, &["is not supported"]);
    }
}

/// As the 2B models of Gemma 1 and 2 were published, but for the sizes.
#[test]
fn the_first_gemmas_have_no_norms_on_branches_and_the_second_ones_caps() {
    let gemma = json!({"hidden_act": "gelu", "hidden_activation": null, "head_dim": 256, "rope_theta": 10000.0});
    let gemma = read(&with(small("gemma"), gemma)).unwrap();
    assert!(gemma.input_norms && !gemma.branch_norms && gemma.norms_less_one);
    assert_eq!(gemma.activation, Activation::GeluTanh);
    assert_eq!(gemma.embedding_scale, 128f64.sqrt());
    assert_eq!((gemma.head_dim, gemma.attention_scale), (256, 1.0 / 16.0));
    let bare = with(small("gemma"), json!({"hidden_act": "gelu_pytorch_tanh"}));
    assert_eq!(read(&bare).unwrap(), gemma);
    let gemma2 = json!({
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid",
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "query_pre_attn_scalar": 144,
        "sliding_window": 64, "sliding_window_size": 64, "_attn_implementation": "eager",
    });
    let gemma2 = with(small("gemma2"), gemma2);
    let second = read(&gemma2).unwrap();
    assert!(second.input_norms && second.branch_norms && second.norms_less_one);
    let caps = |config: &DecoderConfig| [config.attention_soft_cap, config.logits_soft_cap];
    assert_eq!(caps(&second), [Some(50.0), Some(30.0)]);
    assert_eq!((second.attention_scale, second.qk_norm), (1.0 / 12.0, None));
    assert_eq!(second.sliding_window, [Some(64), None, Some(64), None]);
    let bare = with(small("gemma2"), json!({"hidden_act": null}));
    let bare = read(&bare).unwrap();
    assert_eq!(caps(&bare), caps(&second));
    assert_eq!(
        (bare.attention_scale, bare.sliding_window[0]),
        (1.0 / 16.0, Some(4096))
    );
    let uncapped = json!({"attn_logit_softcapping": null, "final_logit_softcapping": null});
    let uncapped = read(&with(gemma2, uncapped)).unwrap();
    assert_eq!(caps(&uncapped), [None; 2]);
    let gemma3 = json!({"hidden_act": null, "final_logit_softcapping": 20.0});
    let gemma3 = read(&with(small("gemma3_text"), gemma3)).unwrap();
    assert_eq!(caps(&gemma3), [None, Some(20.0)]);
    for (model_type, change) in [
        ("gemma2", json!({"hidden_activation": "gelu"})),
        ("llama", json!({"hidden_act": "gelu"})),
    ] {
        assert_says(
            &error(&with(small(model_type), change)),
            &["is not supported"],
        );
    }
    let zero = json!({"final_logit_softcapping": 0.0});
    assert_says(
        &error(&with(small("gemma2"), zero)),
        &["is not a positive number"],
    );
}

#[test]
fn granite_has_a_factor_for_embeddings_branches_scores_and_logits() {
    let config = with(
        small("granite"),
        json!({"embedding_multiplier": 12, "residual_multiplier": 0.22, "attention_multiplier": 0.015625, "logits_scaling": 8.0}),
    );
    let granite = read(&config).unwrap();
    let factors = |config: &DecoderConfig| {
        let of_stream = (config.embedding_multiplier, config.residual_multiplier);
        (of_stream, config.attention_scale, config.logits_scaling)
    };
    assert_eq!(factors(&granite), ((12.0, 0.22), 1.0 / 64.0, 8.0));
    // Scores too, where the config does not say.
    assert_eq!(
        factors(&read(&small("granite")).unwrap()),
        ((1.0, 1.0), 1.0, 1.0)
    );
    // Where logits are multiplied, and scores are by the width of a head unless the config says otherwise.
    let clova = read(&with(config.clone(), json!({"model_type": "hyperclovax"}))).unwrap();
    assert_eq!(factors(&clova), ((12.0, 0.22), 1.0 / 64.0, 1.0 / 8.0));
    assert!(clova.branch_norms && clova.norm_names == NormNames::HyperClovaX);
    let bare = read(&small("hyperclovax")).unwrap();
    assert_eq!(factors(&bare), ((1.0, 1.0), 1.0 / 4.0, 1.0));
    let without_norms = with(small("hyperclovax"), json!({"use_post_norm": false}));
    assert!(!read(&without_norms).unwrap().branch_norms);
    for (field, value) in [
        ("residual_multiplier", json!(0.0)),
        ("logits_scaling", json!(-8.0)),
    ] {
        let message = error(&with(small("granite"), json!({ field: value })));
        assert_says(&message, &[field, "is not a positive number"]);
        let message = error(&with(small("llama"), json!({ field: 2.0 })));
        assert_says(&message, &[field, "is not supported", "only 1.0 is"]);
    }
}

#[test]
fn olmo_has_norms_after_its_branches_and_over_all_heads() {
    let olmo2 = read(&small("olmo2")).unwrap();
    assert!(!olmo2.input_norms && olmo2.branch_norms && !olmo2.norms_less_one);
    assert_eq!(olmo2.qk_norm, Some(QkNorm::Token));
    assert_eq!((&olmo2.local_rope, olmo2.padding_id), (&None, Some(1)));
    assert_eq!(olmo2.sliding_window, [None; 4]);
    // As OLMo 3 was published: YaRN is for the layers with full attention alone.
    let olmo3 = json!({
        "rope_theta": 500000, "sliding_window": 64,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
            "original_max_position_embeddings": 32, "rope_type": "yarn",
        },
    });
    let olmo3 = read(&with(small("olmo3"), olmo3)).unwrap();
    assert!(matches!(
        olmo3.rope.scaling,
        RopeScaling::Yarn { factor: 8.0, .. }
    ));
    let local = olmo3.local_rope.unwrap();
    assert_eq!((local.theta, local.scaling), (5e5, RopeScaling::None));
    assert_eq!(olmo3.sliding_window, [Some(64), Some(64), Some(64), None]);
    let (local, model) = (LayerRope::Local, LayerRope::Model);
    assert_eq!(olmo3.layer_rope, [local, local, local, model]);
    let bare = read(&small("olmo3")).unwrap();
    assert_eq!((bare.rope.theta, bare.local_rope), (5e5, Some(bare.rope)));
    assert_eq!(bare.sliding_window[0], Some(4096));
    let defaults = DecoderConfig {
        local_rope: None,
        sliding_window: vec![None; 4],
        layer_rope: vec![model; 4],
        rope: olmo2.rope.clone(),
        ..bare
    };
    assert_eq!(defaults, olmo2);
}

/// As Seed-OSS 36B was published, but for the sizes.
#[test]
fn seed_oss_has_biases_before_its_attention() {
    let seed = json!({
        "attention_bias": true, "attention_dropout": 0.1, "attention_out_bias": false, "head_dim": 128, "mlp_bias": false,
        "pretraining_tp": 1, "residual_dropout": 0.1, "rope_scaling": {"rope_type": "default"}, "rope_theta": 1e7,
    });
    let seed = read(&with(small("seed_oss"), seed)).unwrap();
    assert_eq!(
        (seed.qkv_bias, seed.o_bias, seed.mlp_bias),
        (true, false, false)
    );
    assert_eq!((seed.head_dim, seed.rope.theta), (128, 1e7));
    assert_eq!(seed.padding_id, Some(1));
    let bare = read(&small("seed_oss")).unwrap();
    assert_eq!(
        DecoderConfig {
            rope: seed.rope.clone(),
            ..bare
        },
        seed
    );
    let other = json!({"attention_bias": false, "attention_out_bias": true, "mlp_bias": true, "head_dim": null});
    let other = read(&with(small("seed_oss"), other)).unwrap();
    assert_eq!(
        (other.qkv_bias, other.o_bias, other.mlp_bias),
        (false, true, true)
    );
    assert_eq!(other.head_dim, 16);
}

/// As EXAONE 4.0 was published: 32B with windows, 1.2B without.
#[test]
fn the_layers_of_exaone4_with_full_attention_have_no_rotary_embedding() {
    let types = [
        "sliding_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
    ];
    let llama3 = json!({
        "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64, "rope_type": "llama3",
    });
    let large = json!({
        "layer_types": types, "rope_scaling": llama3, "rope_theta": 1e6, "sliding_window": 64, "sliding_window_pattern": "LLLG",
    });
    let large = read(&with(small("exaone4"), large)).unwrap();
    assert!(!large.input_norms && large.branch_norms && !large.norms_less_one);
    assert_eq!(large.qk_norm, Some(QkNorm::Head));
    assert!(matches!(large.rope.scaling, RopeScaling::Llama3 { .. }));
    assert_eq!(large.sliding_window, [Some(64), Some(64), Some(64), None]);
    let (none, model) = (LayerRope::None, LayerRope::Model);
    assert_eq!(large.layer_rope, [model, model, model, none]);
    let small_one = json!({
        "layer_types": vec!["full_attention"; 4], "rope_theta": 1e6, "sliding_window": null, "sliding_window_pattern": null,
    });
    let small_one = read(&with(small("exaone4"), small_one)).unwrap();
    assert_eq!(small_one.sliding_window, [None; 4]);
    assert_eq!(small_one.layer_rope, [model; 4]);
    let every_second = json!({"sliding_window": 64, "sliding_window_pattern": 2});
    let every_second = read(&with(small("exaone4"), every_second)).unwrap();
    assert_eq!(every_second.layer_rope, [model, none, model, none]);
    let bare = read(&small("exaone4")).unwrap();
    assert_eq!(bare.sliding_window[0], Some(4096));
    let letters = with(small("exaone4"), json!({"sliding_window_pattern": "LLLG"}));
    assert_says(&error(&letters), &["sliding_window_pattern", "layer_types"]);
}

#[test]
fn every_fourth_layer_of_cwm_has_no_window_from_the_first_on() {
    let llama3 = json!({
        "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_theta": 1e6, "rope_type": "llama3",
    });
    let cwm = json!({"head_dim": 128, "mlp_bias": false, "rope_parameters": llama3, "sliding_window": 8192});
    let cwm = read(&with(small("cwm"), cwm)).unwrap();
    let window = Some(8192);
    assert_eq!(cwm.sliding_window, [None, window, window, window]);
    assert_eq!(cwm.rope.theta, 1e6);
    assert!(matches!(
        cwm.rope.scaling,
        RopeScaling::Llama3 { factor: 16.0, .. }
    ));
    assert_eq!(read(&small("cwm")).unwrap(), cwm);
    let biased = with(small("cwm"), json!({"attention_bias": true}));
    assert_says(&error(&biased), &["attention_bias", "only false is"]);
}

/// As Phi 4 was published, but for the sizes.
#[test]
fn the_layers_of_phi_that_read_one_input_are_one() {
    let phi = json!({
        "attention_bias": false, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "original_max_position_embeddings": 256, "rope_scaling": null,
        "rope_theta": 250000, "sliding_window": null,
    });
    let phi = with(small("phi3"), phi);
    let found = read(&phi).unwrap();
    let expected = DecoderConfig {
        fused_qkv: true,
        fused_gate_up: true,
        ..read(&with(small("llama"), json!({"rope_theta": 250000}))).unwrap()
    };
    assert_eq!(found, expected);
    let names = found.modules().map(|module| found.linear_path(1, module));
    let names: Vec<_> = names.collect();
    assert_eq!(
        names,
        [
            "self_attn.qkv_proj",
            "self_attn.o_proj",
            "mlp.gate_up_proj",
            "mlp.down_proj"
        ]
        .map(|name| format!("model.layers.1.{name}"))
    );
    let windows = read(&with(phi.clone(), json!({"sliding_window": 64}))).unwrap();
    assert_eq!(windows.sliding_window, [Some(64); 4]);
    assert_eq!(
        read(&without(phi.clone(), "rope_theta"))
            .unwrap()
            .rope
            .theta,
        1e4
    );
}

/// As GLM-4 0414 was published, but for the sizes.
#[test]
fn glm4_turns_neighbours_of_a_half_of_each_head() {
    let glm = json!({
        "attention_bias": true, "head_dim": 128, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "pad_token_id": 151_329,
    });
    let glm = with(small("glm4"), glm);
    let found = read(&glm).unwrap();
    assert_eq!((found.head_dim, found.rotary_dim), (128, 64));
    assert!(found.rotates_neighbours && !found.fused_qkv && found.fused_gate_up);
    assert!(found.qkv_bias && !found.o_bias && !found.mlp_bias);
    assert!(found.input_norms && found.branch_norms && !found.norms_less_one);
    assert_eq!(found.norm_names, NormNames::Glm);
    assert_eq!(read(&small("glm4")).unwrap(), found);
    let names = ModelTensor::all(&found)
        .into_iter()
        .map(|tensor| tensor.name(&found));
    let norms = names.filter(|name| name.starts_with("model.layers.1.") && name.contains("norm"));
    assert_eq!(
        norms.collect::<Vec<_>>(),
        [
            "input_layernorm",
            "post_self_attn_layernorm",
            "post_attention_layernorm",
            "post_mlp_layernorm"
        ]
        .map(|norm| format!("model.layers.1.{norm}.weight"))
    );
    let glm_before = DecoderConfig {
        branch_norms: false,
        norm_names: NormNames::Gemma,
        ..found.clone()
    };
    assert_eq!(
        read(&with(glm.clone(), json!({"model_type": "glm"}))).unwrap(),
        glm_before
    );
    let new = json!({
        "partial_rotary_factor": null,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    });
    assert_eq!(read(&with(without(glm, "rope_theta"), new)).unwrap(), found);
}

/// As the mini model of Phi 4 was published, but for the sizes.
#[test]
fn phi_may_turn_a_part_of_its_heads_by_factors_for_short_and_long_batches() {
    let (short, long) = (
        vec![1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        vec![1.0, 1.5, 2.5, 4.0, 8.0, 16.0],
    );
    let rope = json!({"long_factor": long, "short_factor": short, "type": "longrope"});
    let mini = json!({
        "original_max_position_embeddings": 64, "partial_rotary_factor": 0.75, "rope_scaling": rope, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": false, "mlp_bias": false,
    });
    let mini = with(small("phi3"), mini);
    let found = read(&mini).unwrap();
    assert_eq!((found.head_dim, found.rotary_dim), (16, 12));
    let RopeScaling::LongRope {
        short_factors,
        long_factors,
        attention_factor,
        original_max_position_embeddings: 64,
    } = &found.rope.scaling
    else {
        panic!("{:?}", found.rope);
    };
    assert_eq!((short_factors, long_factors), (&short, &long));
    // The context is four times the original one.
    assert_eq!(*attention_factor, (1.0 + 4f64.ln() / 64f64.ln()).sqrt());
    assert!(!found.rope.is_long(64) && found.rope.is_long(65));
    let frequencies = |is_long| found.rope.inv_freq(12, is_long)[5];
    assert_eq!(frequencies(false) / frequencies(true), 16.0 / 1.5);
    let new = json!({
        "rope_scaling": null, "partial_rotary_factor": null, "original_max_position_embeddings": 4096,
        "rope_parameters": with(
            without(rope.clone(), "type"),
            json!({
                "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 64, "factor": 4.0,
            }),
        ),
    });
    assert_eq!(read(&with(mini.clone(), new)).unwrap(), found);
    for name in ["su", "yarn"] {
        let old = json!({"rope_scaling": with(rope.clone(), json!({"type": name}))});
        assert_eq!(read(&with(mini.clone(), old)).unwrap(), found);
    }
    for (change, parts) in [
        (
            json!({"rope_scaling": with(rope.clone(), json!({"short_factor": [1.0]}))}),
            ["short_factor", "1 numbers for 6 frequencies"],
        ),
        (
            json!({"rope_scaling": with(rope.clone(), json!({"long_factor": vec![0.0; 6]}))}),
            ["long_factor", "not a positive number"],
        ),
        (
            json!({"rope_scaling": without(rope.clone(), "long_factor")}),
            ["long_factor", "is missing"],
        ),
        (
            json!({"partial_rotary_factor": 1.5}),
            ["partial_rotary_factor", "makes 24 columns of 16"],
        ),
        (
            json!({"partial_rotary_factor": 0.7}),
            ["partial_rotary_factor", "makes 11 columns of 16"],
        ),
    ] {
        assert_says(&error(&with(mini.clone(), change)), &parts);
    }
    let elsewhere = json!({"rope_scaling": rope});
    assert_says(
        &error(&with(small("llama"), elsewhere)),
        &["is not supported"],
    );
}

#[test]
fn iquestcoder_is_a_llama() {
    let coder = json!({
        "attention_bias": false, "clip_qkv": null, "head_dim": 128, "max_window_layers": 0, "mlp_bias": false,
        "rope_scaling": null, "rope_theta": 5e5, "sliding_window": null, "use_sliding_window": false,
    });
    let coder = with(small("iquestcoder"), coder);
    let llama = json!({"head_dim": 128, "rope_theta": 5e5});
    let llama = with(small("llama"), llama);
    assert_eq!(read(&coder).unwrap(), read(&llama).unwrap());
    for change in [
        json!({"clip_qkv": 8.0}),
        json!({"use_sliding_window": true}),
    ] {
        let message = error(&with(coder.clone(), change));
        assert_says(&message, &["is not supported"]);
    }
}

/// As Qwen3-VL 4B was published, with an image's axes in the rotary parameters.
#[test]
fn the_language_model_of_qwen3_vl_is_qwen3() {
    let rope =
        json!({"mrope_interleaved": true, "mrope_section": [24, 20, 20], "rope_type": "default"});
    let text = with(
        small("qwen3_vl_text"),
        json!({"rope_scaling": rope, "rope_theta": 5e6, "attention_bias": false}),
    );
    let config = json!({
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "text_config": text,
        "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "tie_word_embeddings": true, "transformers_version": "4.57.0.dev0",
        "vision_config": {"depth": 24, "model_type": "qwen3_vl"},
    });
    let qwen3 = with(small("qwen3"), json!({"rope_theta": 5e6}));
    let expected = DecoderConfig {
        decoder_path: "model.language_model",
        tie_word_embeddings: true,
        ..read(&qwen3).unwrap()
    };
    assert_eq!(read(&config).unwrap(), expected);
    let untied = read(&without(config.clone(), "tie_word_embeddings")).unwrap();
    assert!(!untied.tie_word_embeddings);
    assert_eq!(read(&text).unwrap().decoder_path, "model");
    let bare = read(&small("qwen3_vl_text")).unwrap();
    assert_eq!((bare.rope.theta, bare.head_dim), (5e5, 128));
    let elsewhere = with(small("qwen3"), json!({"rope_scaling": rope}));
    assert_says(
        &error(&elsewhere),
        &["rope_scaling.mrope_", "is not supported"],
    );
}

#[test]
fn the_queries_of_ministral3_are_scaled_by_their_positions() {
    let rope = json!({
        "type": "yarn", "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 64, "max_position_embeddings": 1024, "mscale": 1.0, "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    });
    let config = with(
        small("ministral3"),
        json!({"rope_parameters": rope, "sliding_window": null}),
    );
    let found = read(&config).unwrap();
    let scaling = found.rope.query_scaling.unwrap();
    assert_eq!(
        scaling,
        QueryScaling {
            beta: 0.1,
            length: 64
        }
    );
    assert_eq!([0, 63].map(|position| scaling.factor(position)), [1.0; 2]);
    assert_eq!(scaling.factor(64), (1.0 + 0.1 * 2f64.ln()) as f32);
    assert_eq!(scaling.factor(64 * 8 + 5), (1.0 + 0.1 * 9f64.ln()) as f32);
    assert_eq!(found.rope.amplitude(), 1.0);
    assert_eq!((found.head_dim, found.sliding_window), (128, vec![None; 4]));
    assert_eq!((found.rope.theta, found.padding_id), (1e6, Some(11)));
    let bare = without(
        with(
            config.clone(),
            json!({"rope_parameters": with(without(rope.clone(), "rope_theta"), json!({"llama_4_scaling_beta": 0}))}),
        ),
        "rms_norm_eps",
    );
    let bare = read(&bare).unwrap();
    assert_eq!((bare.rope.theta, bare.rms_norm_eps), (1e4, 1e-5));
    assert_eq!(bare.rope.query_scaling.unwrap().factor(1000), 1.0);
    let beside = with(
        config.clone(),
        json!({"rope_parameters": without(rope.clone(), "rope_theta"), "rope_theta": 5e5, "head_dim": null}),
    );
    let beside = read(&beside).unwrap();
    assert_eq!((beside.rope.theta, beside.head_dim), (5e5, 16));
    let silent = with(small("ministral3"), json!({"rope_parameters": null}));
    assert_says(&error(&silent), &["rope_parameters", "is missing"]);
    let without_beta = with(
        config.clone(),
        json!({"rope_parameters": without(rope.clone(), "llama_4_scaling_beta")}),
    );
    assert_says(
        &error(&without_beta),
        &["rope_parameters.llama_4_scaling_beta", "is missing"],
    );
    let llama = with(
        small("llama"),
        json!({"rope_parameters": without(rope, "max_position_embeddings")}),
    );
    assert_says(
        &error(&llama),
        &["rope_parameters.llama_4_scaling_beta", "is not supported"],
    );
}

/// As the larger models of Gemma 3 have been published: their language model's config says what is not the class's default.
#[test]
fn the_config_of_a_language_model_is_found_in_that_of_a_model_that_also_sees_images() {
    let text = json!({
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    });
    let gemma = json!({
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255_999, "eoi_token_index": 256_000,
        "eos_token_id": [1, 106], "image_token_index": 262_144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1152},
    });
    let within = read(&gemma).unwrap();
    assert_eq!(within.decoder_path, "model.language_model");
    let alone = with(text, json!({"architectures": ["Gemma3ForCausalLM"]}));
    let alone = read(&alone).unwrap();
    assert_eq!(alone.decoder_path, "model");
    let decoder_path = within.decoder_path;
    assert_eq!(
        within,
        DecoderConfig {
            decoder_path,
            ..alone
        }
    );
    let heads = (within.num_heads, within.num_kv_heads, within.head_dim);
    assert_eq!((within.vocab_size, heads), (262_208, (8, 4, 256)));
    assert!(within.tie_word_embeddings);
    assert_eq!(within.sliding_window.iter().flatten().count(), 29);

    let mistral = with(
        without(gemma.clone(), "boi_token_index"),
        json!({
            "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "spatial_merge_size": 2,
            "vision_feature_layer": -1, "projector_hidden_act": "gelu", "multimodal_projector_bias": false,
            "text_config": with(without(small("mistral"), "architectures"), json!({"sliding_window": null})),
        }),
    );
    let within = read(&mistral).unwrap();
    assert_eq!(within.decoder_path, "model.language_model");
    // Whatever its language model says by itself.
    assert!(within.tie_word_embeddings);
    let mut of_text = with(mistral.clone(), json!({"tie_word_embeddings": false}));
    of_text["text_config"]["tie_word_embeddings"] = true.into();
    assert!(read(&of_text).unwrap().tie_word_embeddings);
    let untied = with(mistral, json!({"tie_word_embeddings": false}));
    assert!(!read(&untied).unwrap().tie_word_embeddings);

    for (change, parts) in [
        (
            json!({"text_config": small("qwen2")}),
            ["text_config.model_type", "qwen2"],
        ),
        (json!({"text_config": null}), ["text_config", "is missing"]),
        (
            json!({"text_config": with(text_of(&gemma), json!({"use_bidirectional_attention": true}))}),
            [
                "text_config.use_bidirectional_attention",
                "is not supported",
            ],
        ),
        (
            json!({"audio_config": {}}),
            ["audio_config", "is not supported"],
        ),
        (
            json!({"architectures": ["Gemma3ForSequenceClassification"]}),
            ["architectures", "is not supported"],
        ),
    ] {
        assert_says(&error(&with(gemma.clone(), change)), &parts);
    }
}

fn text_of(config: &Value) -> Value {
    config["text_config"].clone()
}

#[test]
fn llama_has_the_biases_its_config_says() {
    let plain = read(&small("llama")).unwrap();
    assert_eq!(
        (
            plain.num_layers,
            plain.num_heads,
            plain.num_kv_heads,
            plain.head_dim
        ),
        (4, 8, 2, 16)
    );
    assert_eq!(
        (plain.hidden_size, plain.intermediate_size, plain.vocab_size),
        (128, 320, 466)
    );
    assert_eq!(
        (plain.rms_norm_eps, plain.max_position_embeddings),
        (1e-5, 256)
    );
    assert!(
        !plain.qkv_bias
            && !plain.o_bias
            && !plain.mlp_bias
            && plain.qk_norm.is_none()
            && !plain.tie_word_embeddings
    );
    assert_eq!(plain.sliding_window, [None; 4]);
    let biased = read(&with(
        small("llama"),
        json!({"attention_bias": true, "mlp_bias": true}),
    ))
    .unwrap();
    assert!(biased.qkv_bias && biased.o_bias && biased.mlp_bias);
    let first_generation = without(small("llama"), "num_key_value_heads");
    assert_eq!(read(&first_generation).unwrap().num_kv_heads, 8);
}

#[test]
fn head_dim_is_explicit_or_implied() {
    let head_dim = |model_type, change| read(&with(small(model_type), change)).unwrap().head_dim;
    for model_type in ["llama", "mistral", "qwen2"] {
        assert_eq!(head_dim(model_type, json!({})), 16);
        assert_eq!(head_dim(model_type, json!({"head_dim": null})), 16);
        assert_eq!(head_dim(model_type, json!({"head_dim": 64})), 64);
    }
    assert_eq!(head_dim("qwen3", json!({})), 128);
    assert_eq!(head_dim("qwen3", json!({"head_dim": 32})), 32);
}

#[test]
fn mistral_has_one_window_on_all_layers() {
    let window = |change| {
        read(&with(small("mistral"), change))
            .unwrap()
            .sliding_window
    };
    assert_eq!(window(json!({})), [Some(4096); 4]);
    assert_eq!(window(json!({"sliding_window": null})), [None; 4]);
    assert_eq!(window(json!({"sliding_window": 12})), [Some(12); 4]);
}

#[test]
fn qwen_windows_are_on_the_layers_the_config_names() {
    for model_type in ["qwen2", "qwen3"] {
        let window = |change| {
            read(&with(small(model_type), change))
                .unwrap()
                .sliding_window
        };
        let off =
            json!({"sliding_window": 12, "max_window_layers": 2, "use_sliding_window": false});
        assert_eq!(window(off), [None; 4]);
        let on = json!({"sliding_window": 12, "max_window_layers": 2, "use_sliding_window": true});
        assert_eq!(window(on.clone()), [None, None, Some(12), Some(12)]);
        let types = [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
        ];
        let named = with(on, json!({"layer_types": types}));
        assert_eq!(window(named), [Some(12), None, Some(12), None]);
    }
}

#[test]
fn qwen_generations_differ_in_bias_and_norm() {
    let qwen2 = read(&small("qwen2")).unwrap();
    assert!(qwen2.qkv_bias && !qwen2.o_bias && qwen2.qk_norm.is_none());
    let qwen3 = read(&small("qwen3")).unwrap();
    assert!(!qwen3.qkv_bias && !qwen3.o_bias && qwen3.qk_norm == Some(QkNorm::Head));
}

#[test]
fn a_number_that_cannot_be_is_an_error_that_names_its_field() {
    for (field, value) in [
        ("hidden_size", json!(0)),
        ("num_hidden_layers", json!(0)),
        ("num_hidden_layers", json!(1_000_000_000_000u64)),
        ("num_attention_heads", json!(0)),
        ("num_attention_heads", json!(7)),
        ("num_key_value_heads", json!(3)),
        ("num_key_value_heads", json!(0)),
        ("vocab_size", json!(-1)),
        ("vocab_size", json!("466")),
        ("intermediate_size", json!(1.5)),
        ("head_dim", json!(15)),
        ("rms_norm_eps", json!(0.0)),
        ("max_position_embeddings", json!(0)),
        ("rope_theta", json!(-1.0)),
        ("tie_word_embeddings", json!("yes")),
    ] {
        let message = error(&with(small("llama"), json!({field: value})));
        assert_says(&message, &["model/config.json", &format!("`{field}`")]);
        assert!(!message.contains("not supported"), "{message}");
    }
    for field in [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    ] {
        assert_says(
            &error(&without(small("llama"), field)),
            &[&format!("`{field}` is missing")],
        );
    }
    assert_says(
        &error(&with(
            small("qwen2"),
            json!({"layer_types": ["full_attention"]}),
        )),
        &["`layer_types`", "4 layers"],
    );
    assert_says(&error(&json!([])), &["not a JSON object"]);
}

#[test]
fn a_field_that_changes_the_mathematics_is_an_error_that_names_it() {
    for (model_type, field, value) in [
        ("llama", "hidden_act", json!("gelu")),
        ("llama", "rope_interleaved", json!(true)),
        ("llama", "partial_rotary_factor", json!(0.5)),
        ("llama", "sliding_window", json!(4096)),
        ("llama", "attn_logit_softcapping", json!(50.0)),
        ("llama", "final_logit_softcapping", json!(30.0)),
        ("llama", "logit_scale", json!(0.0625)),
        (
            "llama",
            "architectures",
            json!(["LlamaForSequenceClassification"]),
        ),
        (
            "llama",
            "quantization_config",
            json!({"quant_method": "gptq", "bits": 4}),
        ),
        (
            "llama",
            "quantization_config",
            json!({"quant_method": "bitsandbytes", "load_in_8bit": true}),
        ),
        ("llama", "something_new", json!(false)),
        ("mistral", "mlp_bias", json!(true)),
        ("mistral", "layer_types", json!(["full_attention"])),
        ("qwen2", "attention_bias", json!(true)),
        ("qwen2", "use_mrope", json!(true)),
        (
            "qwen2",
            "layer_types",
            json!([
                "full_attention",
                "full_attention",
                "full_attention",
                "linear_attention"
            ]),
        ),
        ("qwen3", "num_experts", json!(8)),
    ] {
        let message = error(&with(small(model_type), json!({field: value})));
        assert_says(
            &message,
            &[
                "model/config.json",
                &format!("`{field}` = {value} is not supported"),
            ],
        );
    }
    for model_type in ["gemma3n", "phi", "mixtral", ""] {
        let value = format!("`model_type` = \"{model_type}\" is not supported");
        assert_says(&error(&small(model_type)), &[&value]);
    }
}

#[test]
fn a_rope_type_that_is_not_understood_is_named() {
    for name in ["dynamic", "longrope", "mrope"] {
        for (parent, field) in [
            ("rope_scaling", "type"),
            ("rope_scaling", "rope_type"),
            ("rope_parameters", "rope_type"),
        ] {
            let config = json!({parent: {field: name, "factor": 2.0}});
            let expected = format!("`{parent}.{field}` = \"{name}\" is not supported");
            assert_says(&error(&with(small("llama"), config)), &[&expected]);
        }
    }
    let message = |rope: Value| error(&with(small("llama"), json!({"rope_parameters": rope})));
    assert_says(
        &message(json!({"rope_type": "linear"})),
        &["`rope_parameters.factor` is missing"],
    );
    assert_says(
        &message(json!({"rope_type": "llama3", "factor": 8.0})),
        &["`rope_parameters.low_freq_factor` is missing"],
    );
    let partial = json!({"rope_type": "default", "partial_rotary_factor": 0.5});
    assert_says(
        &message(partial),
        &["`rope_parameters.partial_rotary_factor` = 0.5 is not supported"],
    );
    let nested = json!({"full_attention": {"rope_type": "default"}});
    assert_says(
        &message(nested),
        &["`rope_parameters.full_attention`", "is not supported"],
    );
}

#[test]
fn fields_known_to_be_harmless_are_accepted() {
    let harmless = json!({
        "_name_or_path": "somewhere", "attention_bias": false, "mlp_bias": false, "pretraining_tp": 2, "unknown": null,
        // Of SmolLM2 and of Qwen2.5-1M, as they were published.
        "is_llama_config": true, "rope_interleaved": false, "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
        "dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144},
        "partial_rotary_factor": 1, "attention_dropout": 0.1, "temperature": 0.7, "id2label": {"0": "a"}, "transformers_version": "4.31.0",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"},
    });
    for model_type in ["llama", "mistral", "qwen2", "qwen3"] {
        assert_eq!(
            read(&with(small(model_type), harmless.clone())).unwrap(),
            read(&small(model_type)).unwrap()
        );
    }
}
