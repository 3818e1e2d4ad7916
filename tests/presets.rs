//! A preset is the published script, the same configuration as its command line, pasted; or a row of the paper's table.

use qlora::train::TrainConfig;
use qlora::train::config::Preset;

/// What `scripts/finetune_guanaco_*.sh` of artidoro/qlora have in common, but for `--do_mmlu_eval`, which is not done in training, and
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
    for (name, model, learning_rate, lora_dropout, save_steps) in [
        ("guanaco-7b", "huggyllama/llama-7b", "0.0002", "0.1", "500"),
        (
            "guanaco-13b",
            "huggyllama/llama-13b",
            "0.0002",
            "0.05",
            "500",
        ),
        (
            "guanaco-33b",
            "huggyllama/llama-30b",
            "0.0001",
            "0.05",
            "200",
        ),
        (
            "guanaco-65b",
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
            preset: Some(name.parse().unwrap()),
            ..config(&[PUBLISHED, &script].concat())
        };
        assert_eq!(config(&[("preset", name)]), pasted, "{name}");
    }
}

/// Table 9 of arXiv:2305.14314: batch size, learning rate, steps, and lengths of source and target, where `-` is what the scripts
/// have for rows without a source.
const TABLE: &str = "
    qlora-all-7b        16  2e-4  10000  384   128
    qlora-oasst1-7b     16  2e-4   1875    -   512
    qlora-hh-rlhf-7b    16  2e-4  10000    -   768
    qlora-longform-7b   16  2e-4   4000  512  1024
    qlora-all-13b       16  2e-4  10000  384   128
    qlora-oasst1-13b    16  2e-4   1875    -   512
    qlora-hh-rlhf-13b   16  2e-4  10000    -   768
    qlora-longform-13b  16  2e-4   4000  512  1024
    qlora-all-33b       32  1e-4   5000  384   128
    qlora-oasst1-33b    16  1e-4   1875    -   512
    qlora-hh-rlhf-33b   32  1e-4   5000    -   768
    qlora-longform-33b  32  1e-4   2343  512  1024
    qlora-all-65b       64  1e-4   2500  384   128
    qlora-oasst1-65b    16  1e-4   1875    -   512
    qlora-hh-rlhf-65b   64  1e-4   2500    -   768
    qlora-longform-65b  32  1e-4   2343  512  1024
";

/// What the paper says of all of them.
const PAPER: &[(&str, &str)] = &[
    ("lora_r", "64"),
    ("lora_alpha", "16"),
    ("lora_target_modules", "all-linear"),
    ("quant_type", "nf4"),
    ("double_quant", "true"),
    ("optim", "paged_adamw_32bit"),
    ("adam_beta2", "0.999"),
    ("max_grad_norm", "0.3"),
    ("lr_scheduler_type", "constant"),
    ("group_by_length", "true"),
    ("per_device_train_batch_size", "1"),
];

#[test]
fn presets_are_the_rows_of_the_papers_table() {
    let mut names: Vec<_> = ["7b", "13b", "33b", "65b"]
        .map(|size| format!("guanaco-{size}"))
        .into();
    for row in TABLE.lines().filter(|line| !line.trim().is_empty()) {
        let row: Vec<_> = row.split_whitespace().collect();
        let [name, batch_size, learning_rate, max_steps, source, target] = row[..] else {
            panic!("six columns: {row:?}");
        };
        let (data, size) = name["qlora-".len()..].rsplit_once('-').unwrap();
        let (model, lora_dropout) = match size {
            "7b" => ("huggyllama/llama-7b", "0.1"),
            "13b" => ("huggyllama/llama-13b", "0.1"),
            "33b" => ("huggyllama/llama-30b", "0.05"),
            _ => ("huggyllama/llama-65b", "0.05"),
        };
        let source = if source == "-" { "16" } else { source };
        let dataset = ("dataset", if data == "all" { "alpaca" } else { data });
        let values = [
            ("model_name_or_path", model),
            dataset,
            ("gradient_accumulation_steps", batch_size),
            ("learning_rate", learning_rate),
            ("max_steps", max_steps),
            ("source_max_len", source),
            ("target_max_len", target),
            ("lora_dropout", lora_dropout),
        ];
        let by_hand = TrainConfig {
            preset: Some(name.parse().unwrap()),
            ..config(&[PAPER, &values].concat())
        };
        let by_name = [("preset", name), dataset];
        let given = if data == "all" { 2 } else { 1 };
        assert_eq!(config(&by_name[..given]), by_hand, "{name}");
        names.push(name.to_string());
    }
    let mut all: Vec<_> = Preset::all().map(|preset| preset.to_string()).collect();
    all.sort();
    names.sort();
    assert_eq!(all, names);
}

#[test]
fn a_preset_for_any_data_set_asks_for_one() {
    let error = |flags: &[(&str, &str)]| {
        let owned = |(key, value): &(&str, &str)| (key.to_string(), value.to_string());
        let flags: Vec<_> = flags.iter().map(owned).collect();
        TrainConfig::load(None, &flags).unwrap_err().to_string()
    };
    assert_eq!(
        error(&[("preset", "qlora-all-33b")]),
        "config key `dataset`: is required: qlora-all-33b is for any data set; name one, as in --dataset alpaca"
    );
    assert_eq!(
        error(&[("model_name_or_path", "models/mine")]),
        "config key `dataset`: is required; give it in the config file or as --dataset PATH"
    );
    for (name, nearest) in [
        ("guanaco-8b", "guanaco-7b"),
        ("qlora-hh-rhlf-7b", "qlora-hh-rlhf-7b"),
        ("qlora-longform-65", "qlora-longform-65b"),
        ("oasst1-13b", "qlora-oasst1-13b"),
    ] {
        let error = error(&[("preset", name)]);
        let expected =
            format!("config key `preset`: `{name}` is not a preset, did you mean `{nearest}`?");
        assert!(error.starts_with(&expected), "{error}");
    }
    assert_eq!(
        error(&[("preset", "llama")]),
        "config key `preset`: `llama` is not a preset; there are guanaco-, qlora-all-, qlora-oasst1-, \
         qlora-hh-rlhf-, qlora-longform-, each with 7b, 13b, 33b or 65b"
    );
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
    assert!(message.contains("did you mean `guanaco-7b`?"), "{message}");
}
