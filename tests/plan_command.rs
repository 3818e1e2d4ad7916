//! `qlora plan` as it is typed: its table, its JSON, and how it ends where nothing fits.

use std::path::Path;
use std::process::Output;

use qlora::store::{MatrixDropoutScale, MatrixDropoutSettings};
use serde_json::Value;

fn plan(arguments: &str) -> Output {
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("qlora"));
    command.arg("plan").args(arguments.split(' '));
    command.output().unwrap()
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

#[test]
fn the_fastest_run_that_fits_is_told_item_by_item() {
    let arguments =
        "--shape llama-65b --max_seq_len 512 --vram 24GiB --tflops 800 --optim paged_adamw_32bit";
    let output = plan(arguments);
    assert!(output.status.success(), "{output:?}");
    insta::assert_snapshot!(text(output.stdout));
}

#[test]
fn without_a_limit_keeping_and_recomputing_stand_side_by_side() {
    let output = plan("--shape llama3-8b --max_seq_len 2048 --lora_r 16");
    assert!(output.status.success(), "{output:?}");
    insta::assert_snapshot!(text(output.stdout));
}

#[test]
fn json_says_what_the_table_does() {
    let output = plan("--shape llama-33b --max_seq_len 512 --vram 48GB --json");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["fits"], true);
    assert_eq!(found["limit_bytes"], 48_000_000_000u64);
    let plan = &found["plans"][0];
    let items = plan["items"].as_object().unwrap().values();
    let sum: u64 = items.map(|bytes| bytes.as_u64().unwrap()).sum();
    assert_eq!(plan["total_bytes"], sum);
    assert!(sum <= 48_000_000_000);
}

#[test]
fn what_does_not_fit_ends_with_1_and_the_smallest_change_that_would() {
    let output = plan("--shape llama-65b --max_seq_len 512 --vram 8GiB");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    insta::assert_snapshot!(text(output.stderr));
}

#[test]
fn a_preset_has_the_shape_of_its_model_and_without_any_none_is_assumed() {
    let of = |arguments: &str| -> Value {
        let output = plan(arguments);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let preset = of("--preset guanaco-65b --json");
    assert_eq!(preset["model"]["num_hidden_layers"], 80);
    assert_eq!(
        of("--preset guanaco-7b --num_hidden_layers 3 --json")["model"]["num_hidden_layers"],
        3
    );
    let output = plan("--json");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(output.stderr).contains("--shape llama-7b"));
}

#[test]
fn what_a_run_would_refuse_is_refused() {
    for (arguments, part) in [
        ("--lora_target_modules q_proj,bar", "bar"),
        ("--layers_to_transform 99", "99"),
        ("--rank_pattern foo=8", "foo"),
        ("--use_dora --optim paged_adamw_8bit", "`optim`"),
        ("--lora_r 1000000000", "at most 65536"),
        (
            "--gradient_accumulation_steps 1000000000",
            "at most 268435456",
        ),
        ("--max_seq_len 99999999999", "more than 268435456 tokens"),
        (
            "--per_device_train_batch_size 1000000 --max_seq_len 1000000",
            "more than 268435456 tokens",
        ),
    ] {
        let output = plan(&format!("--shape llama-7b {arguments}"));
        assert_ne!(output.status.code(), Some(0), "{arguments}");
        let message = text(output.stderr);
        assert!(message.contains(part), "`{part}` is not in `{message}`");
    }
}

#[test]
fn of_changes_that_would_fit_one_without_an_effect_on_the_result_comes_first() {
    let output = plan("--shape llama-7b --vram 3.5GB");
    assert_eq!(output.status.code(), Some(1));
    let message = text(output.stderr);
    assert!(
        message.contains("optim paged_adamw_32bit would fit"),
        "{message}"
    );
    let output = plan("--shape llama-7b --vram 3.5GB --optim paged_adamw_32bit");
    assert!(output.status.success(), "{output:?}");
    let message = text(plan("--shape llama-7b --vram 1GB").stderr);
    assert!(message.contains("a smaller model"), "{message}");
}

/// The shape of the fixtures' model, whose weights are not there.
#[test]
fn the_config_of_a_model_is_enough() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/engine/llama_gqa");
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(fixtures.join("config.json"), dir.path().join("config.json")).unwrap();
    let total = |model: &Path| {
        let output = plan(&format!("--model {} --json", model.display()));
        let found: Value = serde_json::from_slice(&output.stdout).expect("a plan");
        found["plans"][0]["total_bytes"].as_u64().unwrap()
    };
    assert_eq!(total(dir.path()), total(&fixtures));
    let output = plan(&format!("--model {}", dir.path().join("none").display()));
    assert_eq!(output.status.code(), Some(1));
}

/// The dropout on matrices comes with the adapter that a run starts from.
#[test]
fn an_adapter_is_planned_with_its_masks() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/engine/llama_gqa");
    let dir = tempfile::tempdir().unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(fixtures.join("adapter").join(file), dir.path().join(file)).unwrap();
    }
    let (model, adapter) = (fixtures.display(), dir.path().display());
    let gradients = |more: &str| {
        let instances = "--lora_matrix_dropout_instances 3";
        let output = plan(&format!(
            "--model {model} --adapter {adapter} {instances} --json{more}"
        ));
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        found["plans"][0]["total_bytes"].as_u64().unwrap()
    };
    let (plain, masked) = (gradients(""), gradients(" --lora_matrix_dropout 0.5"));
    assert!(masked > plain);
    let settings = MatrixDropoutSettings {
        p: 0.5,
        scale: MatrixDropoutScale::Inverse,
        seed: 0,
    };
    MatrixDropoutSettings::write(Some(&settings), dir.path()).unwrap();
    assert_eq!(gradients(""), masked);
}
