use std::path::Path;

use candle_core::quantized::GgmlDType;
use qlora::export::{GgufBase, GgufReport, GgufType, write_gguf_adapter};
use qlora::quant::DenseTensor;
use qlora::store::{Adapter, AdapterConfig, MappedFile, ModulePatterns};
use qlora::{Error, Result};
use serde_json::Value;

use super::files::*;

const Q: &str = "model.layers.0.self_attn.q_proj";

pub fn write(
    adapter: &Adapter,
    config: &Value,
    file_type: GgufType,
    path: &Path,
) -> Result<GgufReport> {
    let base = GgufBase {
        config,
        dir: Path::new("of no tokenizer"),
        name: "an adapter",
    };
    write_gguf_adapter(adapter, base, file_type, path)
}

fn written(adapter: &Adapter, config: &Value, file_type: GgufType) -> Gguf {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter.gguf");
    let report = write(adapter, config, file_type, &path).unwrap();
    let gguf = Gguf::read(&path);
    assert_eq!(report.tensors, gguf.names().len());
    gguf
}

fn refusal(adapter: &Adapter, config: &Value) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let error = write(
        adapter,
        config,
        GgufType::F32,
        &dir.path().join("adapter.gguf"),
    );
    assert_eq!(dir.path().read_dir().unwrap().count(), 0);
    error.expect_err("a refusal")
}

/// An adapter of PEFT and the config of its base.
pub fn of_peft(case: &str) -> (Adapter, Value) {
    let dir = fixture("adapters").join(case);
    match dir.exists() {
        true => {
            let base = std::fs::read_to_string(dir.join("base")).unwrap();
            (
                Adapter::read(dir.join("adapter")).unwrap(),
                config(base.trim()),
            )
        }
        false => {
            let dir = fixture("engine").join(case);
            (Adapter::read(dir.join("adapter")).unwrap(), config(case))
        }
    }
}

/// An adapter of the query projection of the first layer alone.
fn of_query(adapter_config: AdapterConfig, a: DenseTensor, b: DenseTensor) -> Adapter {
    let part = |part: &str| format!("base_model.model.{Q}.{part}.weight");
    Adapter {
        config: adapter_config,
        tensors: [(part("lora_A"), a), (part("lora_B"), b)].into(),
    }
}

/// The name of a linear layer in the file.
fn file_name(path: &str) -> String {
    let parts: Vec<&str> = path.split('.').collect();
    let module = match parts[4] {
        "q_proj" => "attn_q",
        "k_proj" => "attn_k",
        "v_proj" => "attn_v",
        "o_proj" => "attn_output",
        "gate_proj" => "ffn_gate",
        "up_proj" => "ffn_up",
        "down_proj" => "ffn_down",
        other => panic!("{other}"),
    };
    format!("blk.{}.{module}.weight", parts[2])
}

/// `scaling * B A`, `[out, in]`.
pub fn product(a: &[f32], b: &[f32], r: usize, scaling: f64) -> Vec<f64> {
    let d_in = a.len() / r;
    let rows = b.chunks_exact(r).flat_map(|b| {
        (0..d_in).map(move |column| {
            let terms = b.iter().enumerate();
            let sum: f64 = terms
                .map(|(i, b)| f64::from(*b) * f64::from(a[i * d_in + column]))
                .sum();
            scaling * sum
        })
    });
    rows.collect()
}

/// What llama.cpp adds, `alpha / r * B A` with the file's alpha, is what PEFT adds.
#[test]
fn every_kind_of_scaling_comes_out_as_peft_has_it() {
    for case in [
        "llama_gqa",
        "llama_odd",
        "mistral",
        "qwen2",
        "qwen3",
        "rslora_q_v",
        "patterns",
        "one_layer",
    ] {
        let (adapter, config) = of_peft(case);
        let gguf = written(&adapter, &config, GgufType::F32);
        let decoder = decoder(&config);
        let alpha = f64::from(gguf.f32("adapter.lora.alpha"));
        let mut paths = 0;
        for (name, a) in &adapter.tensors {
            let Some(path) = name.strip_suffix(".lora_A.weight") else {
                continue;
            };
            paths += 1;
            let b = &adapter.tensors[&format!("{path}.lora_B.weight")];
            let path = path.strip_prefix("base_model.model.").unwrap();
            let weight = file_name(path);
            let (a_name, b_name) = (format!("{weight}.lora_a"), format!("{weight}.lora_b"));
            assert_eq!(gguf.shape(&a_name), a.shape, "{case}");
            assert_eq!(gguf.shape(&b_name), b.shape, "{case}");
            let r = gguf.shape(&b_name)[1];
            let mut stored_b = gguf.values(&b_name);
            let is_llama = gguf.text("general.architecture") == "llama";
            if is_llama && (path.ends_with("q_proj") || path.ends_with("k_proj")) {
                stored_b = unpermuted(&stored_b, decoder.head_dim, r);
            }
            let stored = product(&gguf.values(&a_name), &stored_b, r, alpha / r as f64);
            let scaling = adapter.config.scaling_of(path);
            let expected = product(&a.to_f32_vec(), &b.to_f32_vec(), r, scaling);
            let largest = expected.iter().fold(0f64, |m, x| m.max(x.abs()));
            assert!(largest > 0.0);
            for (stored, expected) in stored.iter().zip(&expected) {
                assert!(
                    (stored - expected).abs() <= 1e-6 * largest,
                    "{case} {path}: {stored} {expected}"
                );
            }
        }
        assert_eq!(gguf.names().len(), 2 * paths);
        assert_eq!(2 * paths, adapter.tensors.len());
    }
}

#[test]
fn an_adapter_says_what_it_is() {
    let (adapter, config) = of_peft("mistral");
    let gguf = written(&adapter, &config, GgufType::F32);
    assert_eq!(gguf.text("general.type"), "adapter");
    assert_eq!(gguf.text("general.architecture"), "llama");
    assert_eq!(gguf.text("general.name"), "an adapter");
    assert_eq!(gguf.text("adapter.type"), "lora");
    assert_eq!(gguf.u32("general.file_type"), 0);
    assert!(!gguf.has("tokenizer.ggml.model"));
}

#[test]
fn where_one_alpha_says_it_all_the_factors_are_stored_as_they_are() {
    let (r, config) = (3, config("qwen2"));
    let (d_out, d_in) = decoder(&config).linear_shape(qlora::model::Module::Q);
    let (a, b) = (random(&[r, d_in], 1), random(&[d_out, r], 2));
    let with = |use_rslora| AdapterConfig {
        r,
        lora_alpha: 7.0,
        use_rslora,
        ..AdapterConfig::default()
    };
    for (use_rslora, alpha) in [(false, 7.0), (true, 7.0 * 3f32.sqrt())] {
        let gguf = written(
            &of_query(with(use_rslora), a.clone(), b.clone()),
            &config,
            GgufType::F32,
        );
        assert!((gguf.f32("adapter.lora.alpha") - alpha).abs() <= 1e-6 * alpha);
        assert_eq!(gguf.values("blk.0.attn_q.weight.lora_a"), a.to_f32_vec());
        assert_eq!(gguf.values("blk.0.attn_q.weight.lora_b"), b.to_f32_vec());
    }
}

/// llama.cpp takes an alpha of 0 for none, and would scale by 1.
#[test]
fn an_alpha_of_zero_adds_nothing() {
    let (r, config) = (4, config("qwen2"));
    let (d_out, d_in) = decoder(&config).linear_shape(qlora::model::Module::Q);
    let zero = AdapterConfig {
        r,
        lora_alpha: 0.0,
        ..AdapterConfig::default()
    };
    let adapter = of_query(zero, random(&[r, d_in], 1), random(&[d_out, r], 2));
    let gguf = written(&adapter, &config, GgufType::F32);
    assert_ne!(gguf.f32("adapter.lora.alpha"), 0.0);
    assert!(
        gguf.values("blk.0.attn_q.weight.lora_b")
            .iter()
            .all(|b| *b == 0.0)
    );
}

/// The bytes are those of `gguf.quants.quantize` of gguf 0.19.0 for `((i * 37 % 64 - 31.5) / 7)`, the second half of them
/// times 0.001.
#[test]
fn q8_0_blocks_are_those_of_ggml() {
    const EXPECTED: &str = "89288116a93ed267fa8d22b54bde7306992ec257ea7f12a53ace63f6891eb147da6f4002\
                            02922cbb55e57f0f9e38c862f1811bab45d46efe8d28b751e17b0a9a34c45eed";
    let config = config("llama_gqa");
    let value = |i: usize| ((i * 37 % 64) as f32 - 31.5) / 7.0 * if i < 32 { 1.0 } else { 1e-3 };
    let values: Vec<f32> = (0..64).map(value).collect();
    let a = DenseTensor::from_f32(vec![1, 64], &values);
    let one = AdapterConfig {
        r: 1,
        ..AdapterConfig::default()
    };
    let gguf = written(
        &of_query(one, a, random(&[64, 1], 0)),
        &config,
        GgufType::Q8_0,
    );
    let bytes = gguf.bytes("blk.0.attn_q.weight.lora_a", 68);
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, EXPECTED);
    // Its rows of one element are no blocks.
    assert_eq!(gguf.dtype("blk.0.attn_q.weight.lora_b"), GgmlDType::F16);
}

/// ggml multiplies and adds in one rounding where its compiler chose so: a code may be another where two are about as near.
#[test]
fn k_quants_are_those_of_ggml_but_for_ties() {
    let ggml = MappedFile::open(&fixture("gguf/k_quants.safetensors")).unwrap();
    let ggml = ggml.tensors_and_codes().unwrap();
    let values = ggml["values"].to_f32_vec();
    let mut config = config("llama_gqa");
    config["hidden_size"] = 256.into();
    let a = DenseTensor::from_f32(vec![12, 256], &values);
    let one = AdapterConfig {
        r: 12,
        ..AdapterConfig::default()
    };
    let adapter = of_query(one, a, random(&[64, 12], 0));
    for (file_type, name) in [
        (GgufType::Q4KM, "q4_k"),
        (GgufType::Q5KM, "q5_k"),
        (GgufType::Q6K, "q6_k"),
    ] {
        let gguf = written(&adapter, &config, file_type);
        let expected = &ggml[name].data;
        let found = gguf.bytes("blk.0.attn_q.weight.lora_a", expected.len());
        let same = found.iter().zip(expected).filter(|(a, b)| a == b).count();
        assert!(
            same as f64 >= 0.99 * expected.len() as f64,
            "{name}: {same} of {}",
            expected.len()
        );
        let (found, theirs) = (
            gguf.values("blk.0.attn_q.weight.lora_a"),
            ggml[&format!("{name}.values")].to_f32_vec(),
        );
        for row in 0..12 {
            let error = |stored: &[f32]| -> f64 {
                let pairs = values[256 * row..][..256].iter().zip(&stored[256 * row..]);
                pairs
                    .map(|(a, b)| f64::from(a - b).powi(2))
                    .sum::<f64>()
                    .sqrt()
            };
            let (ours, theirs) = (error(&found), error(&theirs));
            assert!(
                ours <= 1.01 * theirs + 1e-12,
                "{name}, row {row}: {ours} {theirs}"
            );
        }
    }
}

#[test]
fn what_the_format_cannot_say_is_refused_with_what_to_do() {
    for (case, field) in [
        ("dora", "use_dora"),
        ("dora_patterns", "use_dora"),
        ("modules_to_save", "modules_to_save"),
        ("tied_head", "modules_to_save"),
    ] {
        let (adapter, config) = of_peft(case);
        let error = refusal(&adapter, &config);
        assert!(
            matches!(&error, Error::UnsupportedModel { field: found, .. } if found == field),
            "{error}"
        );
        assert!(
            error
                .to_string()
                .contains("export the merged model instead"),
            "{error}"
        );
    }
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let (adapter, config) = of_peft("llama_gqa");
    let mut smaller = config.clone();
    smaller["intermediate_size"] = 96.into();
    let error = refusal(&adapter, &smaller).to_string();
    assert!(
        error.contains("mlp.") && error.contains("expected ["),
        "{error}"
    );
    let mut shallower = config;
    shallower["num_hidden_layers"] = 1.into();
    let error = refusal(&adapter, &shallower).to_string();
    assert!(
        error.contains("layers.1.") && error.contains("that the model has"),
        "{error}"
    );
}

#[test]
fn a_rank_that_its_pattern_does_not_give_is_refused() {
    let config = config("qwen2");
    let (d_out, d_in) = decoder(&config).linear_shape(qlora::model::Module::Q);
    let other = AdapterConfig {
        r: 4,
        rank_pattern: ModulePatterns::new([("q_proj".to_string(), 2)]).unwrap(),
        ..AdapterConfig::default()
    };
    let adapter = of_query(other, random(&[4, d_in], 1), random(&[d_out, 4], 2));
    let error = refusal(&adapter, &config).to_string();
    assert!(error.contains(&format!("expected [{d_out}, 2]")), "{error}");
}
