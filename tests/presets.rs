//! A preset is the published script: the same configuration as its command line, pasted.

use qlora::train::TrainConfig;
use qlora::train::config::Preset;

/// What `scripts/finetune_guanaco_*.sh` of artidoro/qlora have in common, but for `--do_mmlu_eval`, which is not done here, and
/// `--bf16`, which depends on the device.
const PUBLISHED: &[(&str, &str)] = &[
    ("logging_steps", "10"),
    ("save_strategy", "steps"),
    ("data_seed", "42"),
    ("save_total_limit", "40"),
    ("evaluation_strategy", "steps"),
    ("eval_dataset_size", "1024"),
    ("max_eval_samples", "1000"),
    ("per_device_eval_batch_size", "1"),
    ("max_new_tokens", "32"),
    ("dataloader_num_workers", "3"),
    ("group_by_length", "True"),
    ("logging_strategy", "steps"),
    ("remove_unused_columns", "False"),
    ("do_train", "True"),
    ("do_eval", "True"),
    ("lora_r", "64"),
    ("lora_alpha", "16"),
    ("double_quant", "True"),
    ("quant_type", "nf4"),
    ("bits", "4"),
    ("warmup_ratio", "0.03"),
    ("lr_scheduler_type", "constant"),
    ("dataset", "oasst1"),
    ("source_max_len", "16"),
    ("target_max_len", "512"),
    ("per_device_train_batch_size", "1"),
    ("gradient_accumulation_steps", "16"),
    ("max_steps", "1875"),
    ("eval_steps", "187"),
    ("adam_beta2", "0.999"),
    ("max_grad_norm", "0.3"),
    ("weight_decay", "0.0"),
    ("seed", "0"),
];

fn config(flags: &[(&str, &str)]) -> TrainConfig {
    let owned = |(key, value): &(&str, &str)| (key.to_string(), value.to_string());
    let flags: Vec<_> = flags.iter().map(owned).collect();
    TrainConfig::load(None, &flags).unwrap()
}

#[test]
fn presets_are_the_published_scripts() {
    for (name, preset, model, learning_rate, lora_dropout, save_steps) in [
        (
            "guanaco-7b",
            Preset::Guanaco7b,
            "huggyllama/llama-7b",
            "0.0002",
            "0.1",
            "500",
        ),
        (
            "guanaco-13b",
            Preset::Guanaco13b,
            "huggyllama/llama-13b",
            "0.0002",
            "0.05",
            "500",
        ),
        (
            "guanaco-33b",
            Preset::Guanaco33b,
            "huggyllama/llama-30b",
            "0.0001",
            "0.05",
            "200",
        ),
        (
            "guanaco-65b",
            Preset::Guanaco65b,
            "huggyllama/llama-65b",
            "0.0001",
            "0.05",
            "200",
        ),
    ] {
        let script = [
            ("model_name_or_path", model),
            ("learning_rate", learning_rate),
            ("lora_dropout", lora_dropout),
            ("save_steps", save_steps),
            // What qlora.py takes where its scripts say nothing.
            ("optim", "paged_adamw_32bit"),
            ("dataset_format", "oasst1"),
            ("lora_target_modules", "all-linear"),
        ];
        let pasted = TrainConfig {
            preset: Some(preset),
            ..config(&[PUBLISHED, &script].concat())
        };
        assert_eq!(config(&[("preset", name)]), pasted, "{name}");
    }
}

#[test]
fn keys_that_are_given_win_over_a_preset() {
    let given = config(&[
        ("preset", "guanaco-7b"),
        ("model_name_or_path", "models/mine"),
        ("lora_r", "8"),
        ("num_train_epochs", "2"),
    ]);
    assert_eq!(given.model_name_or_path.to_str(), Some("models/mine"));
    assert_eq!((given.lora_r, given.lora_dropout), (Some(8), Some(0.1)));
    assert_eq!(given.epochs(), Some(2.0));
    // A resolved configuration names its preset and is the same again.
    let text = given.resolved_toml().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    std::fs::write(&path, text).unwrap();
    assert_eq!(TrainConfig::load(Some(&path), &[]).unwrap(), given);
}

#[test]
fn print_config_prints_the_preset_and_trains_nothing() {
    let mut qlora = assert_cmd::Command::cargo_bin("qlora").unwrap();
    let output = qlora.args(["train", "--preset", "guanaco-65b", "--print-config"]);
    let output = output.assert().success().get_output().stdout.clone();
    let text = String::from_utf8(output).unwrap();
    for line in [
        "preset = \"guanaco-65b\"",
        "max_steps = 1875",
        "lora_dropout = 0.05",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}: {text}");
    }
    let mut qlora = assert_cmd::Command::cargo_bin("qlora").unwrap();
    let unknown = qlora
        .args(["train", "--preset", "guanaco-8b"])
        .assert()
        .failure();
    let message = String::from_utf8(unknown.get_output().stderr.clone()).unwrap();
    assert!(message.contains("guanaco-65b"), "{message}");
}
