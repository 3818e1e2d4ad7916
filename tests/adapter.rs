//! PEFT adapters: what is written is read back, in PEFT's own words; what would compute something else is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::DType;
use half::{bf16, f16};
use qlora::quant::DenseTensor;
use qlora::store::{Adapter, AdapterConfig, MappedFile, ModulePatterns, TargetModules};
use serde_json::{Value, json};

const LAYER: &str = "base_model.model.model.layers.0.self_attn.q_proj";

fn config() -> AdapterConfig {
    AdapterConfig {
        base_model_name_or_path: Some("some/model".into()),
        r: 2,
        lora_alpha: 16.0,
        lora_dropout: 0.05,
        target_modules: TargetModules::Names(vec!["v_proj".into(), "q_proj".into()]),
        ..AdapterConfig::default()
    }
}

/// Rank 2 on a layer with 3 inputs and 4 outputs.
fn adapter() -> Adapter {
    let a: Vec<f32> = (0..6).map(|i| i as f32 / 7.0).collect();
    let b: Vec<f32> = (0..8).map(|i| -(i as f32) / 3.0).collect();
    Adapter {
        config: config(),
        tensors: BTreeMap::from([
            (
                format!("{LAYER}.lora_A.weight"),
                DenseTensor::from_f32(vec![2, 3], &a),
            ),
            (
                format!("{LAYER}.lora_B.weight"),
                DenseTensor::from_f32(vec![4, 2], &b),
            ),
        ]),
    }
}

fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in `{message}`");
    }
}

fn read_config(changes: Value) -> qlora::Result<AdapterConfig> {
    let mut json = config().to_json();
    json.as_object_mut()
        .unwrap()
        .extend(changes.as_object().unwrap().clone());
    AdapterConfig::from_json(&json, Path::new("adapter_config.json"))
}

#[test]
fn an_adapter_reads_back_as_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new");
    let written = adapter();
    written.write(&path).unwrap();
    let read = Adapter::read(&path).unwrap();
    let sorted = TargetModules::Names(vec!["q_proj".into(), "v_proj".into()]);
    assert_eq!(
        read.config,
        AdapterConfig {
            target_modules: sorted,
            ..written.config
        }
    );
    assert_eq!(read.tensors.len(), 2);
    for (name, tensor) in &written.tensors {
        let read = &read.tensors[name];
        assert_eq!(
            (read.dtype, &read.shape, &read.data),
            (tensor.dtype, &tensor.shape, &tensor.data)
        );
    }
    let mut files: Vec<_> = fs::read_dir(&path)
        .unwrap()
        .map(|file| file.unwrap().file_name())
        .collect();
    files.sort();
    assert_eq!(files, ["adapter_config.json", "adapter_model.safetensors"]);
    let file = MappedFile::open(&path.join("adapter_model.safetensors")).unwrap();
    assert_eq!(file.metadata("format"), Some("pt"));
}

#[test]
fn the_same_adapter_is_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = |name: &str| {
        let path = dir.path().join(name);
        adapter().write(&path).unwrap();
        ["adapter_config.json", "adapter_model.safetensors"]
            .map(|file| fs::read(path.join(file)).unwrap())
    };
    assert_eq!(bytes("one"), bytes("two"));
}

#[test]
fn sixteen_bit_tensors_are_written_as_the_same_numbers_in_f32() {
    let numbers = [1.0, -0.5, 0.3, 1e-3, 7.0, 0.0];
    let bf: Vec<bf16> = numbers.map(bf16::from_f32).to_vec();
    let half: Vec<f16> = [1.0, -0.5, 0.3, 1e-3, 7.0, 0.0, 2.0, 3.0]
        .map(f16::from_f32)
        .to_vec();
    let mut adapter = adapter();
    adapter.tensors.insert(
        format!("{LAYER}.lora_A.weight"),
        DenseTensor::from_bf16(vec![2, 3], &bf),
    );
    adapter.tensors.insert(
        format!("{LAYER}.lora_B.weight"),
        DenseTensor::from_f16(vec![4, 2], &half),
    );
    let dir = tempfile::tempdir().unwrap();
    adapter.write(dir.path()).unwrap();
    let read = Adapter::read(dir.path()).unwrap().tensors;
    let values = |name: &str| {
        let tensor = &read[&format!("{LAYER}.{name}.weight")];
        assert_eq!(tensor.dtype, DType::F32);
        tensor
            .data
            .chunks(4)
            .map(|word| f32::from_le_bytes(word.try_into().unwrap()))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        values("lora_A"),
        bf.iter().map(|x| x.to_f32()).collect::<Vec<_>>()
    );
    assert_eq!(
        values("lora_B"),
        half.iter().map(|x| x.to_f32()).collect::<Vec<_>>()
    );
}

#[test]
fn only_keys_that_old_peft_knows_are_written() {
    let json = config().to_json();
    let keys: Vec<&str> = json
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(
        keys,
        [
            "alpha_pattern",
            "auto_mapping",
            "base_model_name_or_path",
            "bias",
            "fan_in_fan_out",
            "inference_mode",
            "init_lora_weights",
            "layers_pattern",
            "layers_to_transform",
            "lora_alpha",
            "lora_dropout",
            "modules_to_save",
            "peft_type",
            "r",
            "rank_pattern",
            "revision",
            "target_modules",
            "task_type",
            "use_dora",
            "use_rslora",
        ]
    );
    assert_eq!(json["lora_alpha"].to_string(), "16");
    assert_eq!(json["target_modules"], json!(["q_proj", "v_proj"]));
}

#[test]
fn all_linear_is_written_as_the_layers_it_became() {
    let dir = tempfile::tempdir().unwrap();
    let mut adapter = adapter();
    adapter.config.target_modules = TargetModules::AllLinear;
    adapter.write(dir.path()).unwrap();
    let read = Adapter::read(dir.path()).unwrap();
    assert_eq!(
        read.config.target_modules,
        TargetModules::Names(vec!["q_proj".into()])
    );
}

#[test]
fn a_config_of_todays_peft_is_read() {
    let read = read_config(json!({
        "alora_invocation_tokens": null, "arrow_config": null, "corda_config": null, "ensure_weight_tying": false,
        "eva_config": null, "exclude_modules": null, "layer_replication": null, "loftq_config": {}, "lora_bias": false,
        "megatron_config": null, "megatron_core": "megatron.core", "peft_version": "0.21.2", "qalora_group_size": 16,
        "target_parameters": null, "trainable_token_indices": null, "use_bdlora": null, "use_qalora": false,
        "lora_alpha": 8.5, "use_rslora": true, "target_modules": "all-linear", "modules_to_save": [],
    }))
    .unwrap();
    assert_eq!(
        (
            read.lora_alpha,
            read.use_rslora,
            read.target_modules.clone()
        ),
        (8.5, true, TargetModules::AllLinear)
    );
    assert!((read.scaling() - 8.5 / 2f64.sqrt()).abs() < 1e-12);
    assert_eq!(config().scaling(), 8.0);
}

#[test]
fn a_key_that_changes_the_mathematics_is_an_error_that_names_it() {
    for (key, value) in [
        ("lora_bias", json!(true)),
        ("alora_invocation_tokens", json!([1, 2])),
        ("bias", json!("all")),
        ("fan_in_fan_out", json!(true)),
        ("ensure_weight_tying", json!(true)),
        ("layer_replication", json!([[0, 4]])),
        ("init_lora_weights", json!("pissa")),
        ("init_lora_weights", json!("olora")),
        ("use_qalora", json!(true)),
        ("peft_type", json!("IA3")),
        ("task_type", json!("SEQ_CLS")),
        ("some_future_key", json!(3)),
    ] {
        let message = read_config(json!({key: value})).unwrap_err().to_string();
        assert_says(
            &message,
            &[
                "adapter_config.json",
                &format!("`{key}` = {value} is not supported"),
            ],
        );
    }
}

#[test]
fn a_value_that_cannot_be_is_an_error_that_names_its_key() {
    for (key, value) in [
        ("r", json!(0)),
        ("r", json!(null)),
        ("r", json!("8")),
        ("lora_alpha", json!("16")),
        ("lora_dropout", json!(1.0)),
        ("lora_dropout", json!(-0.1)),
        ("target_modules", json!(7)),
        ("target_modules", json!(null)),
        ("target_modules", json!(["q_proj", 1])),
        ("exclude_modules", json!("(")),
        ("exclude_modules", json!([1])),
        ("modules_to_save", json!("lm_head")),
        ("modules_to_save", json!([1])),
        ("modules_to_save", json!([""])),
        ("rank_pattern", json!({"q_proj": 0})),
        ("rank_pattern", json!({"q_proj": 4.5})),
        ("rank_pattern", json!(["q_proj"])),
        ("alpha_pattern", json!({"(q_proj": 4})),
        ("alpha_pattern", json!({"q_proj": "4"})),
        ("layers_to_transform", json!([-1])),
        ("layers_to_transform", json!("0")),
        ("layers_pattern", json!("layers")),
    ] {
        let message = read_config(json!({key: value})).unwrap_err().to_string();
        assert_says(&message, &["adapter_config.json", &format!("`{key}`")]);
    }
}

#[test]
fn ranks_and_scales_of_single_modules_are_those_of_peft() {
    let read = read_config(json!({
        "r": 2, "lora_alpha": 16, "rank_pattern": {"1.self_attn.q_proj": 8, "q_proj": 4},
        "alpha_pattern": {".*layers.0.*v_proj": 3},
    }))
    .unwrap();
    let path = |layer, name| format!("model.layers.{layer}.self_attn.{name}");
    for (layer, name, r, scaling) in [
        (0, "q_proj", 4, 4.0),
        (1, "q_proj", 8, 2.0),
        (0, "v_proj", 2, 1.5),
        (1, "v_proj", 2, 8.0),
        (0, "not_q_proj", 2, 8.0),
    ] {
        let path = path(layer, name);
        assert_eq!(
            (read.rank_of(&path), read.scaling_of(&path)),
            (r, scaling),
            "{path}"
        );
    }
    let rslora = AdapterConfig {
        use_rslora: true,
        ..read
    };
    assert_eq!(rslora.scaling_of(&path(0, "q_proj")), 8.0);
}

#[test]
fn layers_and_exclusions_are_those_of_peft() {
    let targets = |changes: Value, path: &str| read_config(changes).unwrap().targets(path);
    let q = |layer| format!("model.layers.{layer}.self_attn.q_proj");
    for (changes, in_0, in_1) in [
        (json!({}), true, true),
        (json!({"layers_to_transform": 1}), false, true),
        (json!({"layers_to_transform": [0]}), true, false),
        (json!({"layers_to_transform": []}), true, true),
        (
            json!({"layers_to_transform": [0], "layers_pattern": "layers"}),
            true,
            false,
        ),
        (
            json!({"layers_to_transform": [0], "layers_pattern": ["h", "blocks"]}),
            false,
            false,
        ),
        (
            json!({"layers_to_transform": [0], "target_modules": [q(1)]}),
            false,
            true,
        ),
        (json!({"exclude_modules": ["q_proj"]}), false, false),
        (
            json!({"exclude_modules": ["1.self_attn.q_proj"]}),
            true,
            false,
        ),
        (json!({"exclude_modules": r".*\.0\..*"}), false, true),
        (json!({"exclude_modules": "q_proj"}), true, true),
    ] {
        let found = (
            targets(changes.clone(), &q(0)),
            targets(changes.clone(), &q(1)),
        );
        assert_eq!(found, (in_0, in_1), "{changes}");
    }
    let message = read_config(json!({"target_modules": ".*q_proj", "layers_to_transform": [0]}));
    assert_says(
        &message.unwrap_err().to_string(),
        &["`layers_to_transform`", "regex"],
    );
}

#[test]
fn what_chooses_modules_is_written_as_it_was_read() {
    let changes = json!({
        "rank_pattern": {"v_proj": 8, "q_proj": 4}, "alpha_pattern": {"q_proj": 0.5, "v_proj": 3},
        "layers_to_transform": [1, 0], "layers_pattern": ["layers"], "exclude_modules": ["k_proj"],
        "target_modules": ["0.self_attn.q_proj", "v_proj"],
    });
    let written = read_config(changes.clone()).unwrap().to_json();
    for (key, value) in changes.as_object().unwrap() {
        assert_eq!(written[key].to_string(), value.to_string(), "{key}");
    }
    assert_eq!(config().to_json().get("exclude_modules"), None);
}

#[test]
fn a_tensor_has_the_rank_that_the_config_gives_its_module() {
    let mut adapter = adapter();
    let rank = |r| Some(("q_proj".to_string(), r));
    adapter.config.rank_pattern = ModulePatterns::new(rank(2)).unwrap();
    adapter.config.r = 5;
    let dir = tempfile::tempdir().unwrap();
    adapter.write(dir.path()).unwrap();
    let read = Adapter::read(dir.path()).unwrap().config;
    assert_eq!(
        (read.r, read.rank_pattern),
        (5, adapter.config.rank_pattern)
    );
    adapter.config.rank_pattern = ModulePatterns::new(rank(3)).unwrap();
    let message = adapter.write(dir.path()).unwrap_err().to_string();
    assert_says(&message, &["q_proj.lora_A.weight", "r = 3", "[2, 3]"]);
}

#[test]
fn a_pattern_of_layers_is_kept_as_it_is() {
    let pattern = r".*\.[01]\.self_attn\.(q|v)_proj";
    let read = read_config(json!({"target_modules": pattern})).unwrap();
    assert_eq!(read.to_json()["target_modules"], json!(pattern));
    let message = read_config(json!({"target_modules": "("}))
        .unwrap_err()
        .to_string();
    assert_says(&message, &["adapter_config.json", "`target_modules`"]);
}

/// The error of reading back an adapter of which one file was changed.
fn read_error(change: impl FnOnce(&Path)) -> String {
    let dir = tempfile::tempdir().unwrap();
    adapter().write(dir.path()).unwrap();
    change(dir.path());
    Adapter::read(dir.path()).unwrap_err().to_string()
}

#[test]
fn missing_and_broken_files_are_named() {
    assert_says(
        &read_error(|dir| fs::remove_file(dir.join("adapter_config.json")).unwrap()),
        &["adapter_config.json"],
    );
    assert_says(
        &read_error(|dir| fs::write(dir.join("adapter_config.json"), "{").unwrap()),
        &["adapter_config.json", "JSON"],
    );
    let weights = "adapter_model.safetensors";
    assert_says(
        &read_error(|dir| fs::remove_file(dir.join(weights)).unwrap()),
        &[weights],
    );
    assert_says(
        &read_error(|dir| fs::write(dir.join(weights), "short").unwrap()),
        &[weights, "complete"],
    );
    let pickled =
        read_error(|dir| fs::rename(dir.join(weights), dir.join("adapter_model.bin")).unwrap());
    assert_says(&pickled, &["adapter_model.bin", "safetensors"]);
}

/// The error of writing an adapter with one tensor more or in another shape; nothing is written.
fn write_error(name: &str, shape: Vec<usize>) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut adapter = adapter();
    let zeros = vec![0.0; shape.iter().product()];
    adapter
        .tensors
        .insert(name.into(), DenseTensor::from_f32(shape, &zeros));
    let error = adapter.write(dir.path()).unwrap_err().to_string();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    error
}

#[test]
fn tensors_that_are_not_lora_pairs_are_refused() {
    let a = format!("{LAYER}.lora_A.weight");
    let b = format!("{LAYER}.lora_B.weight");
    assert_says(
        &write_error(&a, vec![3, 3]),
        &[&a, "[r, in] with r = 2", "[3, 3]"],
    );
    assert_says(
        &write_error(&b, vec![2, 4]),
        &[&b, "[out, r] with r = 2", "[2, 4]"],
    );
    let magnitude = format!("{LAYER}.lora_magnitude_vector");
    assert_says(
        &write_error(&magnitude, vec![4]),
        &[&magnitude, "use_dora is false"],
    );
    let alone = "base_model.model.x.lora_A.weight";
    assert_says(
        &write_error(alone, vec![2, 3]),
        &["base_model.model.x.lora_B.weight", "missing"],
    );
    assert_says(
        &write_error("x.lora_A.weight", vec![2, 3]),
        &["`x.lora_A.weight`", "base_model.model."],
    );
}
