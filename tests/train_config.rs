//! The training configuration: names, defaults, and errors that say which key they mean.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use qlora::data::{DatasetFormat, ExcessLength};
use qlora::device::DeviceKind;
use qlora::quant::QuantType;
use qlora::store::TargetModules;
use qlora::train::TrainConfig;
use qlora::train::config::{FOREIGN_KEYS, KEYS, Optim, Resume, SYNONYMS};
use qlora::train::schedule::SchedulerType;

const TOML: &str = r#"
model_name_or_path = "models/tiny"
dataset = "rows.jsonl"
dataset_format = "input-output"
quant_type = "fp4"
double_quant = false
lora_r = 8
lora_alpha = 32
lora_target_modules = ["q_proj", "v_proj"]
learning_rate = 1e-4
lr_scheduler_type = "cosine_with_min_lr"
min_lr_rate = 0.1
max_steps = -1
num_train_epochs = 2.5
optim = "paged_adamw_32bit"
resume_from_checkpoint = "run/checkpoint-10"
"#;

const YAML: &str = r#"
model_name_or_path: models/tiny
dataset: rows.jsonl
dataset_format: input-output
quant_type: fp4
double_quant: false
lora_r: 8
lora_alpha: 32
lora_target_modules: [q_proj, v_proj]
learning_rate: 1e-4
lr_scheduler_type: cosine_with_min_lr
min_lr_rate: 0.1
max_steps: -1
num_train_epochs: 2.5
optim: paged_adamw_32bit
resume_from_checkpoint: run/checkpoint-10
eval_steps: null
"#;

const JSON: &str = r#"{
"model_name_or_path": "models/tiny", "dataset": "rows.jsonl", "dataset_format": "input-output",
"quant_type": "fp4", "double_quant": false, "lora_r": 8,
"lora_alpha": 32, "lora_target_modules": ["q_proj", "v_proj"], "learning_rate": 1e-4,
"lr_scheduler_type": "cosine_with_min_lr", "min_lr_rate": 0.1, "max_steps": -1, "num_train_epochs": 2.5,
"optim": "paged_adamw_32bit", "resume_from_checkpoint": "run/checkpoint-10"
}"#;

fn written() -> TrainConfig {
    TrainConfig {
        model_name_or_path: "models/tiny".into(),
        dataset: "rows.jsonl".into(),
        dataset_format: Some(DatasetFormat::InputOutput),
        quant_type: QuantType::Fp4,
        double_quant: false,
        lora_r: Some(8),
        lora_alpha: Some(32.0),
        lora_target_modules: Some(TargetModules::Names(vec!["q_proj".into(), "v_proj".into()])),
        learning_rate: 1e-4,
        lr_scheduler_type: SchedulerType::CosineWithMinLr,
        min_lr_rate: Some(0.1),
        max_steps: -1,
        num_train_epochs: Some(2.5),
        optim: Optim::PagedAdamw32bit,
        resume_from_checkpoint: Resume::From("run/checkpoint-10".into()),
        ..TrainConfig::default()
    }
}

fn flags(flags: &[(&str, &str)]) -> Vec<(String, String)> {
    let owned = |(key, text): &(&str, &str)| (key.to_string(), text.to_string());
    flags.iter().map(owned).collect()
}

fn from_flags(given: &[(&str, &str)]) -> Result<TrainConfig, String> {
    TrainConfig::load_partial(None, &flags(given)).map_err(|e| e.to_string())
}

fn from_file(name: &str, text: &str) -> Result<TrainConfig, String> {
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    TrainConfig::load_partial(Some(&path), &[]).map_err(|e| e.to_string())
}

#[test]
fn toml_yaml_and_json_mean_the_same() {
    for (name, text) in [
        ("a.toml", TOML),
        ("a.yaml", YAML),
        ("a.yml", YAML),
        ("a.json", JSON),
    ] {
        assert_eq!(from_file(name, text), Ok(written()), "{name}");
    }
}

#[test]
fn the_resolved_configuration_reads_back_as_itself() {
    for config in [written(), TrainConfig::default()] {
        let text = config.resolved_toml().unwrap();
        assert_eq!(from_file("config.toml", &text), Ok(config));
    }
}

#[test]
fn flags_win_over_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.toml");
    std::fs::write(&path, TOML).unwrap();
    let given = flags(&[
        ("lora_r", "16"),
        ("double_quant", "True"),
        ("lora_target_modules", "all-linear"),
        ("resume_from_checkpoint", "true"),
    ]);
    let config = TrainConfig::load(Some(&path), &given).unwrap();
    let expected = TrainConfig {
        lora_r: Some(16),
        double_quant: true,
        lora_target_modules: Some(TargetModules::AllLinear),
        resume_from_checkpoint: Resume::Latest,
        ..written()
    };
    assert_eq!(config, expected);
}

#[test]
fn defaults_are_those_of_qlora_py() {
    let config = TrainConfig::default();
    let adapter = config.new_adapter_config();
    assert_eq!((adapter.r, adapter.lora_alpha), (64, 16.0));
    assert_eq!(adapter.target_modules, TargetModules::AllLinear);
    assert_eq!((config.source_max_len, config.target_max_len), (1024, None));
    assert_eq!(config.longest_sequence(), 1024 + 256);
    assert_eq!((config.learning_rate, config.max_grad_norm), (2e-4, 0.3));
    assert_eq!((config.adam_beta1, config.adam_beta2), (0.9, 0.999));
    assert_eq!(config.gradient_accumulation_steps, 16);
    assert_eq!((config.max_steps, config.save_steps), (10_000, 250));
    assert_eq!(config.device, DeviceKind::Cpu);
    assert!(config.double_quant);
}

#[test]
fn every_field_is_a_key_with_a_help_line() {
    let fields = serde_json::to_value(TrainConfig::default()).unwrap();
    let fields: Vec<_> = fields.as_object().unwrap().keys().cloned().collect();
    let keys: Vec<_> = KEYS.iter().map(|key| key.name).collect();
    assert_eq!(fields, keys);
    for key in KEYS {
        assert!(
            !key.help.is_empty() && !key.help.ends_with('.'),
            "{}",
            key.name
        );
    }
    for (name, key) in SYNONYMS {
        assert!(
            keys.contains(key) && !keys.contains(name),
            "{name} -> {key}"
        );
    }
    for key in FOREIGN_KEYS {
        assert!(!keys.contains(&key.name), "{} is both", key.name);
    }
}

#[test]
fn an_unknown_key_is_an_error_with_the_nearest_name() {
    for (given, nearest) in [
        ("lora_rr", "lora_r"),
        ("learning-rate", "learning_rate"),
        ("lr", "learning_rate"),
        ("batch_size", "per_device_train_batch_size"),
        ("gradient_acumulation_step", "gradient_accumulation_steps"),
        ("lora_dropuot", "lora_dropout"),
    ] {
        let error = from_flags(&[(given, "1")]).unwrap_err();
        let expected = format!("unknown config key `{given}`, did you mean `{nearest}`?");
        assert_eq!(error, expected);
    }
    let error = from_flags(&[("zzz", "1")]).unwrap_err();
    assert_eq!(error, "unknown config key `zzz`");
}

#[test]
fn a_bad_value_is_an_error_that_names_its_key() {
    for (key, value, reason) in [
        ("lora_r", "0", "at least 1"),
        (
            "lora_r",
            "-1",
            "expected a non-negative integer, found `-1`",
        ),
        (
            "lora_r",
            "1.5",
            "expected a non-negative integer, found `1.5`",
        ),
        ("learning_rate", "0", "greater than 0"),
        ("learning_rate", "nan", "expected a number, found `nan`"),
        ("learning_rate", "fast", "expected a number, found `fast`"),
        ("adam_beta1", "1", "less than 1"),
        ("adam_beta2", "-0.1", "at least 0"),
        ("lora_dropout", "1", "at least 0 and less than 1"),
        ("lora_dropout", "-0.1", "at least 0 and less than 1"),
        ("neftune_noise_alpha", "-1", "0 or greater"),
        ("loraplus_lr_ratio", "0", "greater than 0"),
        ("warmup_ratio", "1.1", "from 0 to 1"),
        ("max_steps", "0", "at least 1, or -1"),
        ("max_steps", "-2", "at least 1, or -1"),
        ("max_seq_len", "1", "at least 2"),
        (
            "double_quant",
            "maybe",
            "expected true or false, found `maybe`",
        ),
        ("quant_type", "int4", "expected `nf4` or `fp4`"),
        (
            "lr_scheduler_type",
            "polynomial",
            "expected one of `constant`",
        ),
        (
            "dataset_format",
            "parquet",
            "expected `tokenized`, `messages`",
        ),
        ("optim", "sgd", "use adamw_torch, adamw_8bit"),
        ("lora_target_modules", "(q_proj", "is not a regex"),
        ("compute_dtype", "f16", "expected one of `f32`"),
        ("min_lr_rate", "0.1", "only used by"),
        ("seed", "9223372036854775808", "below 2^63"),
        ("threads", "0", "at least 1"),
    ] {
        let error = from_flags(&[(key, value)]).unwrap_err();
        let named = error.starts_with(&format!("config key `{key}`: "));
        assert!(named && error.contains(reason), "{key} = {value}: {error}");
    }
}

#[test]
fn keys_that_contradict_each_other_are_refused() {
    let error = from_flags(&[("eval_dataset", "e.jsonl"), ("eval_dataset_size", "4")]).unwrap_err();
    assert!(error.contains("not both"), "{error}");
    let error = from_flags(&[("device", "cuda"), ("compute_dtype", "f32")]).unwrap_err();
    assert!(error.contains("only bf16 is supported on CUDA"), "{error}");
    let error = from_flags(&[("lr_scheduler_type", "cosine_with_min_lr")]).unwrap_err();
    assert!(error.contains("`min_lr_rate`: is required"), "{error}");
}

#[test]
fn a_model_and_a_data_set_are_required() {
    let load = |given: &[(&str, &str)]| {
        let loaded = TrainConfig::load(None, &flags(given));
        loaded.map_err(|e| e.to_string())
    };
    assert!(
        load(&[("dataset", "d")])
            .unwrap_err()
            .contains("`model_name_or_path`: is required")
    );
    let model = ("model_name_or_path", "m");
    assert!(
        load(&[model])
            .unwrap_err()
            .contains("`dataset`: is required")
    );
    assert!(load(&[model, ("dataset", "d")]).is_ok());
}

#[test]
fn a_qlora_py_key_passes_where_it_asks_for_what_is_done_anyway() {
    let harmless = [
        ("bits", "4"),
        ("group_by_length", "False"),
        ("do_train", "true"),
        ("report_to", "none"),
        ("save_strategy", "steps"),
        ("dataloader_num_workers", "3"),
        ("remove_unused_columns", "False"),
        ("max_new_tokens", "32"),
    ];
    assert_eq!(from_flags(&harmless), Ok(TrainConfig::default()));
    for (key, value) in [("bits", "8"), ("bf16", "true"), ("temperature", "0.7")] {
        let error = from_flags(&[(key, value)]).unwrap_err();
        let expected = format!("config key `{key}`: {value} is not supported");
        assert!(
            error.starts_with(&expected) && error.contains("leave it out"),
            "{error}"
        );
    }
}

#[test]
fn bf16_passes_where_it_says_what_the_device_does() {
    let cuda = ("device", "cuda");
    for given in [
        &[("bf16", "true"), cuda][..],
        &[("bf16", "True"), cuda, ("compute_dtype", "bf16")],
        &[("bf16", "false")],
        &[("bf16", "False"), ("compute_dtype", "f32")],
        &[("bf16", "True"), ("compute_dtype", "bf16")],
    ] {
        assert!(from_flags(given).is_ok(), "{given:?}");
    }
    for (given, remedy) in [
        (&[("bf16", "true")][..], "set it to false"),
        (&[("bf16", "false"), cuda], "set it to true"),
        (&[("fp16", "true"), cuda], "set it to false"),
    ] {
        let error = from_flags(given).unwrap_err();
        let named = error.starts_with(&format!("config key `{}`: ", given[0].0));
        let says = error.contains("f32 or bf16 on the CPU, bf16 on CUDA") && error.contains(remedy);
        assert!(named && says, "{error}");
    }
}

#[test]
fn the_names_of_an_optimizer_are_one() {
    for (optim, names) in [
        (
            Optim::AdamwTorch,
            &["adamw_torch", "adamw_hf", "adamw_torch_fused"][..],
        ),
        (
            Optim::PagedAdamw32bit,
            &["paged_adamw_32bit", "paged_adamw"],
        ),
        (Optim::Adamw8bit, &["adamw_8bit", "adamw_bnb_8bit"]),
    ] {
        for name in names {
            assert_eq!(
                from_flags(&[("optim", name)]).unwrap().optim,
                optim,
                "{name}"
            );
        }
    }
}

#[test]
fn epochs_decide_where_they_alone_are_given() {
    let epochs = |given| from_flags(given).unwrap().epochs();
    assert_eq!(epochs(&[]), None);
    assert_eq!(epochs(&[("num_train_epochs", "2")]), Some(2.0));
    assert_eq!(epochs(&[("max_steps", "-1")]), Some(3.0));
    assert_eq!(
        epochs(&[("max_steps", "7"), ("num_train_epochs", "2")]),
        None
    );
}

#[test]
fn a_file_that_cannot_be_read_is_named_with_its_line() {
    for (name, text, expected) in [
        ("a.toml", "lora_r = 3\nlora_alpha =\n", "a.toml: line 2: "),
        ("a.yaml", "lora_r: 1\nb: [\n", "line 3"),
        ("a.json", "{\"lora_r\": 1,}", "line 1"),
        ("a.json", "[1]", "expected keys and values"),
        (
            "a.conf",
            "lora_r = 3",
            "ends in .toml, .yaml, .yml or .json",
        ),
    ] {
        let error = from_file(name, text).unwrap_err();
        assert!(error.contains(name) && error.contains(expected), "{error}");
    }
    // JSON has no NaN: it must not pass for a key that is not given.
    let error = from_file("a.toml", "learning_rate = nan").unwrap_err();
    assert!(
        error.starts_with("config key `learning_rate`: expected a number"),
        "{error}"
    );
    let missing = TrainConfig::load(Some(Path::new("no/such.toml")), &[]).unwrap_err();
    assert!(
        missing.to_string().starts_with("no/such.toml: "),
        "{missing}"
    );
}

proptest! {
    #[test]
    fn reading_a_value_never_panics(key in 0..KEYS.len(), text in any::<String>()) {
        let given = [(KEYS[key].name.to_string(), text)];
        let _ = TrainConfig::load_partial(None, &given);
    }

    #[test]
    fn seeds_and_rates_survive_the_resolved_configuration(
        seed in 0..=i64::MAX as u64,
        learning_rate in 1e-12f64..1.0,
    ) {
        let config = TrainConfig { seed, learning_rate, ..TrainConfig::default() };
        let text = config.resolved_toml().unwrap();
        prop_assert_eq!(from_file("config.toml", &text), Ok(config));
    }
}

#[test]
fn data_sets_weights_and_columns_are_read_from_files_and_flags() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    let toml = "model_name_or_path = \"m\"\ndataset = [\"a.jsonl\", \"b,c.jsonl\"]\ndataset_weights = [1, 0.5]\n\
                excess_length_strategy = \"drop\"\n[dataset_columns]\ninstruction = \"question\"\n";
    std::fs::write(&path, toml).unwrap();
    let config = TrainConfig::load(Some(&path), &[]).unwrap();
    assert_eq!(
        config.dataset.0,
        ["a.jsonl", "b,c.jsonl"].map(PathBuf::from)
    );
    assert_eq!(config.dataset_weights.as_ref().unwrap().0, [1.0, 0.5]);
    assert_eq!(
        config.dataset_columns.0,
        [("instruction".to_string(), "question".to_string())]
    );
    assert_eq!(config.excess_length_strategy, ExcessLength::Drop);
    // What a run directory keeps is the same configuration.
    let again = dir.path().join("config.toml");
    std::fs::write(&again, config.resolved_toml().unwrap()).unwrap();
    assert_eq!(TrainConfig::load(Some(&again), &[]).unwrap(), config);

    let flags = from_flags(&[
        ("dataset", "a.jsonl, b.jsonl"),
        ("dataset_weights", "2,1"),
        ("dataset_columns", "input=q,output=a"),
    ]);
    let config = flags.unwrap();
    assert_eq!(config.dataset.0, ["a.jsonl", "b.jsonl"].map(PathBuf::from));
    assert_eq!(config.dataset_weights.unwrap().0, [2.0, 1.0]);
    assert_eq!(config.dataset_columns.0.len(), 2);
}

#[test]
fn data_keys_that_cannot_be_are_refused() {
    for (flags, key, reason) in [
        (
            &[("dataset_weights", "1,2")][..],
            "dataset_weights",
            "2 weights for",
        ),
        (
            &[("dataset", "a"), ("dataset_weights", "0")],
            "dataset_weights",
            "0 is not a weight",
        ),
        (
            &[("dataset_weights", "x")],
            "dataset_weights",
            "expected a number or a list of numbers",
        ),
        (
            &[("dataset_columns", "input")],
            "dataset_columns",
            "`input` is not a pair",
        ),
        (
            &[("dataset_columns", "input=a,input=b")],
            "dataset_columns",
            "`input` is given twice",
        ),
        (&[("packing", "true")], "packing", "give max_seq_len"),
        (
            &[
                ("packing", "true"),
                ("max_seq_len", "8"),
                ("group_by_length", "true"),
            ],
            "group_by_length",
            "than packing",
        ),
        (
            &[("group_by_length", "true"), ("shuffle", "false")],
            "group_by_length",
            "than shuffle = false",
        ),
        (
            &[
                ("per_device_train_batch_tokens", "8"),
                ("per_device_train_batch_size", "2"),
            ],
            "per_device_train_batch_tokens",
            "than per_device_train_batch_size",
        ),
        (
            &[("excess_length_strategy", "cut")],
            "excess_length_strategy",
            "unknown variant `cut`",
        ),
    ] {
        let error = from_flags(flags).unwrap_err();
        let expected = format!("config key `{key}`: ");
        assert!(
            error.starts_with(&expected) && error.contains(reason),
            "{error}"
        );
    }
}

#[test]
fn a_date_is_read_from_every_kind_of_file() {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in [
        ("a.toml", "chat_template_date = 2026-11-27"),
        ("b.toml", "chat_template_date = \"2026-11-27\""),
        ("c.yaml", "chat_template_date: 2026-11-27"),
        ("d.json", "\u{feff}{\"chat_template_date\": \"2026-11-27\"}"),
    ] {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        let config = TrainConfig::load_partial(Some(&path), &[]).unwrap();
        assert_eq!(
            config.chat_template_date,
            "2026-11-27".parse().ok(),
            "{name}"
        );
    }
    let wrong = [("chat_template_date".to_string(), "yesterday".to_string())];
    let error = TrainConfig::load_partial(None, &wrong)
        .unwrap_err()
        .to_string();
    assert!(error.contains("expected a date such as"), "{error}");
}
