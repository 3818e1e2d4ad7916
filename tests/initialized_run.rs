//! A run on a model that was made together with an adapter: it starts from that adapter, resumes with the same bits, and
//! leaves an adapter for the original model.

mod reference_case;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use qlora::device::Placement;
use qlora::model::{Decoder, InitLoraWeights, Sequences};
use qlora::store::{
    Adapter, Checkpoint, INITIAL_ADAPTER, Initialization, MappedFile, RelativeTo, SafetensorsWriter,
};
use qlora::train::config::Resume;
use qlora::train::{Event, Outcome, TrainConfig, Trainer};
use reference_case::{largest_difference, values};
use serde_json::Value;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn qlora(arguments: &[&str]) -> Command {
    let mut command = Command::cargo_bin("qlora").unwrap();
    command.args(arguments);
    command
}

fn demo_base() -> PathBuf {
    repository().join("examples/demo/base")
}

/// The demo's model in 4 bits with an adapter of rank 4.
fn initialized(home: &Path, method: &str) -> PathBuf {
    initialized_with(home, method, &[])
}

fn initialized_with(home: &Path, method: &str, more: &[&str]) -> PathBuf {
    initialized_of(&demo_base(), home, method, more)
}

fn initialized_of(source: &Path, home: &Path, method: &str, more: &[&str]) -> PathBuf {
    let dir = home.join(method);
    let (source, path) = (source.to_str().unwrap(), dir.to_str().unwrap());
    let options = ["--lora_r", "4", "--lora_alpha", "8"];
    let command = ["quantize", source, path, "--init_lora_weights", method];
    qlora(&[&command[..], &options, more].concat())
        .assert()
        .success()
        .stdout(contains("initial_adapter"));
    dir
}

fn config(model: &Path, output_dir: PathBuf, max_steps: i64) -> TrainConfig {
    TrainConfig {
        model_name_or_path: model.to_path_buf(),
        output_dir,
        dataset: repository().join("examples/demo/train.jsonl").into(),
        max_train_samples: Some(16),
        max_seq_len: Some(64),
        per_device_train_batch_size: 2,
        gradient_accumulation_steps: 1,
        max_steps,
        learning_rate: 1e-3,
        ..TrainConfig::default()
    }
}

fn run(config: TrainConfig) -> Vec<String> {
    let mut notices = Vec::new();
    let outcome =
        Trainer::new(config, &Placement::cpu())
            .unwrap()
            .run(&AtomicBool::new(false), |event| {
                if let Event::Notice(text) = event {
                    notices.push(text.to_string());
                }
            });
    assert_eq!(outcome.unwrap(), Outcome::Finished);
    notices
}

fn adapter_bytes(dir: &Path) -> Vec<u8> {
    fs::read(dir.join("adapter_model.safetensors")).unwrap()
}

#[test]
fn a_run_starts_from_the_initial_adapter_and_resumes_with_the_same_bits() {
    let home = tempfile::tempdir().unwrap();
    let model = initialized(home.path(), "pissa_niter_4");
    let whole = home.path().join("whole");
    run(config(&model, whole.clone(), 4));
    let parts = home.path().join("parts");
    run(config(&model, parts.clone(), 2));
    run(TrainConfig {
        resume_from_checkpoint: Resume::Latest,
        ..config(&model, parts.clone(), 4)
    });
    assert!(adapter_bytes(&whole) == adapter_bytes(&parts));
    let for_original = |dir: &Path| adapter_bytes(&dir.join("adapter_for_original_model"));
    assert!(for_original(&whole) == for_original(&parts));
    let initial = adapter_bytes(&model.join(INITIAL_ADAPTER));
    assert!(initial != adapter_bytes(&whole), "it was trained");
}

#[test]
fn the_run_leaves_an_adapter_for_the_original_model_and_says_which_is_which() {
    let home = tempfile::tempdir().unwrap();
    let original = home.path().join("models--org--demo/snapshots/0123abc");
    fs::create_dir_all(original.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink(demo_base(), &original).unwrap();
    let model = initialized_of(&original, home.path(), "loftq", &[]);
    let out = home.path().join("run");
    // Said explicitly this time.
    let notices = run(TrainConfig {
        init_lora_weights: Some(InitLoraWeights::Loftq),
        ..config(&model, out.clone(), 2)
    });
    assert!(
        notices.iter().any(|n| n.contains("for the original model")),
        "{notices:?}"
    );
    let converted_dir = out.join("adapter_for_original_model");
    let (raw, converted) = (Adapter::read(&out), Adapter::read(&converted_dir));
    let (raw, converted) = (raw.unwrap(), converted.unwrap());
    assert_eq!((raw.config.r, converted.config.r), (4, 8));
    assert_eq!(raw.config.scaling(), converted.config.scaling());
    let named = converted.config.base_model_name_or_path.unwrap();
    assert_eq!(named, "org/demo");
    assert_eq!(converted.config.revision.as_deref(), Some("0123abc"));
    let named = raw.config.base_model_name_or_path.unwrap();
    assert_eq!(Path::new(&named), model);
    assert_eq!(raw.config.revision, None);
    let relative_to = |dir: &Path| {
        let record = Initialization::read(dir).unwrap().unwrap();
        record.adapter_is_relative_to
    };
    assert_eq!(relative_to(&out), RelativeTo::InitializedBase);
    assert_eq!(relative_to(&converted_dir), RelativeTo::OriginalModel);
    // PEFT would change the base once more if the method were named there.
    for dir in [&out, &converted_dir, &model.join(INITIAL_ADAPTER)] {
        let text = fs::read_to_string(dir.join("adapter_config.json")).unwrap();
        let config: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(config["init_lora_weights"], true);
    }
}

const IDS: [u32; 12] = [1, 40, 300, 7, 7, 512, 90, 1000, 3, 64, 65, 2];
const POSITIONS: [u32; 12] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];

fn loaded(model: &Path, adapter: Option<&Adapter>) -> Decoder {
    let checkpoint = Checkpoint::open(model).unwrap();
    let mut decoder = Decoder::load(&checkpoint, None, &Placement::cpu()).unwrap();
    if let Some(adapter) = adapter {
        decoder.load_adapter(adapter).unwrap();
    }
    decoder
}

fn logits(model: &Path, adapter: Option<&Adapter>) -> Vec<f32> {
    let sequences = Sequences {
        input_ids: &IDS,
        positions: &POSITIONS,
        cu_seqlens: &[0, IDS.len()],
    };
    values(&loaded(model, adapter).logits(sequences).unwrap())
}

/// The model that the 4-bit weights and their initial adapter stand for, `Q + s B_0 A_0` in f32: the original one but for what
/// quantization lost.
fn original_as_far_as_it_is_kept(initialized: &Path, dir: &Path) {
    let initial = Adapter::read(initialized.join(INITIAL_ADAPTER)).unwrap();
    let decoder = loaded(initialized, Some(&initial));
    let weights = MappedFile::open(&demo_base().join("model.safetensors")).unwrap();
    let mut tensors = weights.tensors().unwrap();
    for (layer, module, linear) in decoder.linears() {
        let name = format!("{}.weight", decoder.config().linear_path(layer, module));
        *tensors.get_mut(&name).unwrap() = linear.merged_weight().unwrap();
    }
    fs::create_dir(dir).unwrap();
    let path = dir.join("model.safetensors");
    SafetensorsWriter::write_f32(&path, &tensors, BTreeMap::new()).unwrap();
    fs::copy(demo_base().join("config.json"), dir.join("config.json")).unwrap();
}

#[test]
fn with_patterns_the_adapter_for_the_original_model_computes_there_what_was_trained() {
    let patterns = [
        "--rank_pattern",
        "q_proj=2,layers.1.mlp.down_proj=7",
        "--alpha_pattern",
        "q_proj=3,up_proj=20",
    ];
    for (method, more) in [
        ("pissa", &[][..]),
        ("pissa_niter_4", &["--use_rslora"]),
        ("loftq", &[]),
        ("olora", &["--use_rslora"]),
    ] {
        let home = tempfile::tempdir().unwrap();
        let model = initialized_with(home.path(), method, &[&patterns, more].concat());
        let out = home.path().join("run");
        run(config(&model, out.clone(), 2));
        let trained = Adapter::read(&out).unwrap();
        let converted = Adapter::read(out.join("adapter_for_original_model")).unwrap();
        for (module, r) in [("0.self_attn.q_proj", 4), ("1.mlp.down_proj", 14)] {
            let path = format!("base_model.model.model.layers.{module}.lora_A.weight");
            assert_eq!(converted.tensors[&path].shape[0], r, "{method} {module}");
        }
        let original = home.path().join("original");
        original_as_far_as_it_is_kept(&model, &original);
        let expected = logits(&model, Some(&trained));
        let found = logits(&original, Some(&converted));
        let difference = largest_difference(&found, &expected);
        let by_training = largest_difference(&logits(&original, None), &expected);
        assert!(difference < 1e-4, "{method}: {difference}");
        assert!(by_training > 0.1, "{method}: {by_training}");
    }
}

#[test]
fn a_plain_model_and_a_method_that_makes_the_base_do_not_go_together() {
    let home = tempfile::tempdir().unwrap();
    let error = |config: TrainConfig| {
        let trainer = Trainer::new(config, &Placement::cpu());
        trainer.err().unwrap().to_string()
    };
    let plain = || config(&demo_base(), home.path().join("run"), 1);
    let asked = error(TrainConfig {
        init_lora_weights: Some(InitLoraWeights::Pissa),
        ..plain()
    });
    assert!(
        asked.contains("qlora quantize SRC DST --init_lora_weights pissa --lora_r 64"),
        "{asked}"
    );
    let model = initialized(home.path(), "olora");
    let plain_on_residual = error(TrainConfig {
        init_lora_weights: Some(InitLoraWeights::Default),
        ..config(&model, home.path().join("run"), 1)
    });
    assert!(
        plain_on_residual.contains("was made with the initialization olora"),
        "{plain_on_residual}"
    );
    let both = error(TrainConfig {
        init_lora_weights: Some(InitLoraWeights::Gaussian),
        adapter: Some(model.join(INITIAL_ADAPTER)),
        ..plain()
    });
    assert!(both.contains("begins a new adapter"), "{both}");
    // Without the record the residual would pass for the model.
    let record = model.join(INITIAL_ADAPTER).join("initialization.json");
    let on_residual = || error(config(&model, home.path().join("run"), 1));
    fs::write(&record, "{\"seed\": 0}").unwrap();
    let damaged = on_residual();
    assert!(damaged.contains("initialization.json"), "{damaged}");
    fs::remove_file(&record).unwrap();
    let missing = on_residual();
    assert!(
        missing.contains("initialization.json: is missing"),
        "{missing}"
    );
}

#[test]
fn the_error_is_reported_for_each_weight_with_and_without_the_adapter() {
    let home = tempfile::tempdir().unwrap();
    let model = initialized(home.path(), "loftq");
    let (model, demo) = (model.to_str().unwrap(), demo_base());
    let original = demo.to_str().unwrap();
    let adapter = format!("{model}/{INITIAL_ADAPTER}");
    let inspect = ["inspect", model, "--original", original];
    let with_adapter = [&inspect[..], &["--adapter", &adapter]].concat();
    let json = |arguments: &[&str]| -> Value {
        let output = qlora(arguments).arg("--json").assert().success();
        serde_json::from_slice(&output.get_output().stdout).unwrap()
    };
    let measured = json(&with_adapter);
    let layers = measured["layers"].as_object().unwrap();
    assert_eq!(layers.len(), 28);
    for error in layers.values().chain([&measured["in_all"]]) {
        let number = |key: &str| error[key].as_f64().unwrap();
        let (base, both) = (number("relative_error_of_base"), number("relative_error"));
        assert!(0.05 < both && both < base && base < 0.15, "{error}");
    }
    let alone = json(&inspect);
    assert_eq!(
        alone["in_all"]["relative_error_of_base"],
        measured["in_all"]["relative_error_of_base"]
    );
    assert!(alone["in_all"].get("relative_error").is_none());
    let text = qlora(&with_adapter).assert().success();
    text.stdout(contains("in all").and(contains("model.layers.0.mlp.up_proj.weight")));
    qlora(&["inspect", original, "--original", original])
        .assert()
        .code(1)
        .stderr(contains("has no 4-bit weight"));
    qlora(&["inspect", original, "--original", model])
        .assert()
        .code(1)
        .stderr(contains("is quantized itself"));
}

#[test]
fn an_adapter_is_not_used_on_weights_that_it_is_no_change_of() {
    let home = tempfile::tempdir().unwrap();
    let model = initialized(home.path(), "pissa");
    let adapter = model.join(INITIAL_ADAPTER);
    let (demo, model) = (demo_base(), model.to_str().unwrap().to_string());
    let heldout = repository().join("examples/demo/heldout.jsonl");
    let data = heldout.to_str().unwrap();
    let adapter = ["--adapter", adapter.to_str().unwrap()];
    let eval = ["eval", "--data", data, "--max_eval_samples", "2", "--model"];
    let generate = [
        "generate",
        "--prompt",
        "a",
        "--max_new_tokens",
        "1",
        "--model",
    ];
    for command in [&eval[..], &generate] {
        let on = |model: &str| qlora(&[command, &[model], &adapter].concat()).assert();
        on(&model).success();
        on(demo.to_str().unwrap())
            .code(1)
            .stderr(contains("belongs to the 4-bit weights"));
    }
    let run_dir = home.path().join("run");
    run(config(Path::new(&model), run_dir.clone(), 1));
    let started_from = |adapter: PathBuf, model: &Path| TrainConfig {
        adapter: Some(adapter),
        ..config(model, home.path().join("other"), 1)
    };
    for (adapter, model, reason) in [
        (
            "checkpoint-1",
            demo.as_path(),
            "belongs to the 4-bit weights",
        ),
        ("", demo.as_path(), "belongs to the 4-bit weights"),
        (
            "adapter_for_original_model",
            Path::new(&model),
            "belongs to the original model",
        ),
    ] {
        let config = started_from(run_dir.join(adapter), model);
        let error = Trainer::new(config, &Placement::cpu()).map(|_| ());
        let message = error.unwrap_err().to_string();
        assert!(message.contains(reason), "{adapter}: {message}");
    }
}
