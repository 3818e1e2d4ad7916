//! What a run does with a checkpoint: takes up the newest that is whole, refuses one of another run, keeps the best.

mod tiny_run;

use std::fs;
use std::path::{Path, PathBuf};

use qlora::train::config::{EvalMetric, OnNonFinite, Resume};
use qlora::train::schedule::SchedulerType;
use qlora::train::{Outcome, TrainConfig};
use safetensors::SafeTensors;
use serde_json::Value;
use tiny_run::{assert_same_end, bytes, config, metrics, model, names, resumed, run, trainer};

/// Of a checkpoint, in the order in which they are looked at.
const FILES: [&str; 5] = [
    "manifest.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "trainer_state.json",
];

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for name in names(from) {
        match from.join(&name).is_dir() {
            true => copy_dir(&from.join(&name), &to.join(&name)),
            false => drop(fs::copy(from.join(&name), to.join(&name)).unwrap()),
        }
    }
}

/// Ten steps, of which five are to be done again.
fn half(output_dir: &Path) -> TrainConfig {
    TrainConfig {
        max_steps: 10,
        ..config(output_dir)
    }
}

fn error(config: TrainConfig) -> String {
    run(config).unwrap_err().to_string()
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_it_is_used() {
    let whole = tempfile::tempdir().unwrap();
    run(half(whole.path())).unwrap();
    for file in FILES {
        for damage in [truncate, flip_a_bit, remove] {
            let dir = tempfile::tempdir().unwrap();
            copy_dir(whole.path(), dir.path());
            damage(&dir.path().join("checkpoint-10").join(file));
            let mut trainer = trainer(resumed(half(dir.path()))).unwrap();
            let told = trainer.resumed().unwrap().clone();
            assert_eq!(told.checkpoint, dir.path().join("checkpoint-5"), "{file}");
            assert_eq!(told.damaged.len(), 1);
            assert!(told.damaged[0].contains("checkpoint-10"), "{told:?}");
            let stop = std::sync::atomic::AtomicBool::new(false);
            assert_eq!(trainer.run(&stop, |_| ()).unwrap(), Outcome::Finished);
            assert_same_end(dir.path(), whole.path());
            assert!(dir.path().join("superseded-checkpoint-10").is_dir());
        }
    }
}

fn truncate(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

fn flip_a_bit(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

fn remove(path: &Path) {
    fs::remove_file(path).unwrap();
}

#[test]
fn where_no_checkpoint_is_whole_each_is_named() {
    let dir = tempfile::tempdir().unwrap();
    run(half(dir.path())).unwrap();
    for checkpoint in ["checkpoint-5", "checkpoint-10"] {
        truncate(&dir.path().join(checkpoint).join("optimizer.safetensors"));
    }
    let before = names(dir.path());
    let error = error(resumed(half(dir.path())));
    for part in ["checkpoint-5", "checkpoint-10", "optimizer.safetensors"] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(names(dir.path()), before);
}

#[test]
fn a_damaged_checkpoint_that_was_asked_for_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    run(half(dir.path())).unwrap();
    let checkpoint = dir.path().join("checkpoint-10");
    flip_a_bit(&checkpoint.join("adapter_model.safetensors"));
    let error = error(TrainConfig {
        resume_from_checkpoint: Resume::From(checkpoint),
        ..half(dir.path())
    });
    assert!(
        error.contains("adapter_model.safetensors") && error.contains("SHA-256"),
        "{error}"
    );
}

#[test]
fn a_change_of_the_mathematics_is_refused_and_told_unless_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    run(half(dir.path())).unwrap();
    let before = names(dir.path());

    let other_data = dir.path().join("other.jsonl");
    let rows = fs::read_to_string(&half(dir.path()).dataset.0[0]).unwrap();
    fs::write(
        &other_data,
        rows.lines().skip(1).collect::<Vec<_>>().join("\n"),
    )
    .unwrap();
    let other_model = dir.path().join("model");
    copy_dir(&model(), &other_model);
    poison(&other_model, 7, 1.0);

    let longer = TrainConfig {
        max_steps: 20,
        ..half(dir.path())
    };
    type Change = fn(&mut TrainConfig);
    let changes: [(Change, &[&str]); 4] = [
        (
            |c| c.learning_rate = 1e-3,
            &["`learning_rate` is 0.001, it was 0.005"],
        ),
        (|c| c.data_seed = 7, &["`data_seed` is 7, it was 42"]),
        (
            |c| {
                c.adam_beta1 = 0.5;
                c.gradient_accumulation_steps = 1;
            },
            &[
                "`adam_beta1`",
                "`gradient_accumulation_steps` is 1, it was 2",
            ],
        ),
        (
            |c| c.lr_scheduler_type = SchedulerType::Linear,
            &["`lr_scheduler_type`", "the learning rate of step"],
        ),
    ];
    let mut cases: Vec<(TrainConfig, Vec<&str>)> = Vec::new();
    for (change, told) in changes {
        let mut changed = longer.clone();
        change(&mut changed);
        cases.push((changed, told.to_vec()));
    }
    let with_data = TrainConfig {
        dataset: other_data.clone().into(),
        ..longer.clone()
    };
    cases.push((with_data, vec!["the training rows changed"]));
    let with_model = TrainConfig {
        model_name_or_path: other_model.clone(),
        ..longer.clone()
    };
    cases.push((with_model, vec!["the base model changed"]));

    for (changed, told) in cases {
        let error = error(resumed(changed.clone()));
        for part in told.iter().chain(&["checkpoint-10", "resume_with_changes"]) {
            assert!(error.contains(part), "`{part}` is not in: {error}");
        }
        let accepted = trainer(resumed(TrainConfig {
            resume_with_changes: true,
            ..changed
        }));
        let accepted = accepted.unwrap();
        let changes = &accepted.resumed().unwrap().changes;
        assert!(changes.join("; ").contains(told[0]), "{changes:?}");
    }
    let mut left = names(dir.path());
    left.retain(|name| name != "other.jsonl" && name != "model");
    assert_eq!(left, before, "nothing was written");

    // What is kept and where it lies may change, and a constant rate allows more steps.
    let moved = tempfile::tempdir().unwrap();
    copy_dir(dir.path(), moved.path());
    let copied_data = moved.path().join("copy.jsonl");
    fs::copy(&half(dir.path()).dataset.0[0], &copied_data).unwrap();
    run(resumed(TrainConfig {
        dataset: copied_data.into(),
        save_steps: 3,
        logging_steps: 1,
        gradient_checkpointing: Some(true),
        threads: Some(1),
        output_dir: moved.path().to_path_buf(),
        ..longer
    }))
    .unwrap();
    let whole = tempfile::tempdir().unwrap();
    run(config(whole.path())).unwrap();
    assert_eq!(
        bytes(moved.path(), "adapter_model.safetensors"),
        bytes(whole.path(), "adapter_model.safetensors")
    );
}

/// Sets a value of the embedding of `token`.
fn poison(model: &Path, token: usize, value: f32) {
    let path = model.join("model.safetensors");
    let mut file = fs::read(&path).unwrap();
    let (header, _) = SafeTensors::read_metadata(&file).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let embedding = tensors.tensor("model.embed_tokens.weight").unwrap();
    let start = embedding.data().as_ptr().addr() - file.as_ptr().addr();
    let row = embedding.shape()[1] * embedding.dtype().bitsize() / 8;
    let encoded = match embedding.dtype() {
        safetensors::Dtype::F32 => value.to_le_bytes().to_vec(),
        safetensors::Dtype::BF16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
        other => panic!("{other:?}"),
    };
    assert!(start > header);
    let at = start + token * row;
    file[at..at + encoded.len()].copy_from_slice(&encoded);
    fs::write(&path, file).unwrap();
}

#[test]
fn metrics_of_lost_steps_are_told() {
    let dir = tempfile::tempdir().unwrap();
    run(half(dir.path())).unwrap();
    let metrics = fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    let cut: String = metrics.lines().skip(2).map(|l| format!("{l}\n")).collect();
    fs::write(dir.path().join("metrics.jsonl"), cut).unwrap();
    let mut notices = Vec::new();
    let stop = std::sync::atomic::AtomicBool::new(false);
    trainer(resumed(half(dir.path())))
        .unwrap()
        .run(&stop, |event| {
            if let qlora::train::Event::Notice(text) = event {
                notices.push(text.to_string());
            }
        })
        .unwrap();
    assert_eq!(notices.len(), 1, "{notices:?}");
    assert!(
        notices[0].contains("10 records up to step 10, there were 12"),
        "{notices:?}"
    );
}

#[test]
fn the_best_checkpoint_is_kept_and_ends_the_run() {
    let dir = tempfile::tempdir().unwrap();
    // The rate is so high that the loss rises after the first step, by far more than processors differ in their rounding.
    let config = TrainConfig {
        load_best_model_at_end: true,
        metric_for_best_model: Some(EvalMetric::EvalLoss),
        learning_rate: 0.1,
        eval_steps: Some(1),
        save_steps: 1,
        save_total_limit: 2,
        max_steps: 5,
        ..config(dir.path())
    };
    run(config.clone()).unwrap();
    let loss = |r: &Value| Some((r["step"].as_u64()?, r["eval_loss"].as_f64()?));
    let losses: Vec<(u64, f64)> = metrics(dir.path()).iter().filter_map(loss).collect();
    let best = losses.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0;
    assert!(best < 4, "another run is needed: {losses:?}");
    let checkpoints: Vec<String> = names(dir.path())
        .into_iter()
        .filter(|name| name.starts_with("checkpoint-"))
        .collect();
    let best = format!("checkpoint-{best}");
    let mut expected = [best.clone(), "checkpoint-5".to_string()];
    expected.sort();
    assert_eq!(checkpoints, expected);
    let best = dir.path().join(best);
    assert_eq!(
        bytes(dir.path(), "adapter_model.safetensors"),
        bytes(&best, "adapter_model.safetensors")
    );
    let state: Value =
        serde_json::from_slice(&bytes(dir.path(), "checkpoint-5/trainer_state.json")).unwrap();
    assert_eq!(
        state["best_model_checkpoint"],
        best.file_name().unwrap().to_str().unwrap()
    );

    // Continued, it is still known.
    fs::remove_file(dir.path().join("adapter_model.safetensors")).unwrap();
    run(resumed(config)).unwrap();
    assert_eq!(
        bytes(dir.path(), "adapter_model.safetensors"),
        bytes(&best, "adapter_model.safetensors")
    );
}

#[test]
fn a_best_model_needs_an_evaluation_at_each_checkpoint() {
    let pairs = |keys: &[(&str, &str)]| -> Vec<(String, String)> {
        let required = [
            ("model_name_or_path", "m"),
            ("dataset", "d"),
            ("save_steps", "6"),
        ];
        let all = required.iter().chain(keys);
        all.map(|(k, v)| (k.to_string(), v.to_string())).collect()
    };
    let load = |keys: &[(&str, &str)]| TrainConfig::load(None, &pairs(keys));
    for (keys, reason) in [
        (&[("load_best_model_at_end", "true")][..], "evaluation rows"),
        (
            &[("metric_for_best_model", "loss"), ("eval_dataset", "e")],
            "eval_steps; they are 6 and unset",
        ),
        (
            &[
                ("load_best_model_at_end", "true"),
                ("eval_dataset", "e"),
                ("eval_steps", "4"),
            ],
            "they are 6 and 4",
        ),
    ] {
        let error = load(keys).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    let good = [
        ("metric_for_best_model", "loss"),
        ("eval_dataset", "e"),
        ("eval_steps", "3"),
    ];
    let config = load(&good).unwrap();
    assert_eq!(config.metric_for_best_model, Some(EvalMetric::EvalLoss));
}

/// A model of which one token makes everything NaN, and the lines of the rows that have it.
fn model_with_a_bad_token(dir: &Path) -> (PathBuf, Vec<usize>) {
    let rows = fs::read_to_string(model().join("train/data.jsonl")).unwrap();
    let rows: Vec<Vec<u64>> = rows
        .lines()
        .map(|line| {
            let row: Value = serde_json::from_str(line).unwrap();
            let ids = row["input_ids"].as_array().unwrap();
            ids.iter().map(|id| id.as_u64().unwrap()).collect()
        })
        .collect();
    let lines_of = |token: u64| -> Vec<usize> {
        let lines = rows.iter().enumerate().filter(|(_, r)| r.contains(&token));
        lines.map(|(line, _)| line + 1).collect()
    };
    let token = rows.iter().flatten().copied();
    let token = token
        .min_by_key(|&token| lines_of(token).len())
        .expect("there are rows");
    let bad = dir.join("bad_model");
    copy_dir(&model(), &bad);
    poison(&bad, token as usize, f32::NAN);
    (bad, lines_of(token))
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_with_its_rows_and_a_checkpoint_from_before() {
    let dir = tempfile::tempdir().unwrap();
    let (model_name_or_path, bad_lines) = model_with_a_bad_token(dir.path());
    let output = dir.path().join("run");
    let config = TrainConfig {
        model_name_or_path,
        eval_dataset_size: None,
        eval_steps: None,
        save_steps: 100,
        ..config(&output)
    };
    let error = error(config.clone());
    let step: usize = error
        .strip_prefix("step ")
        .and_then(|rest| rest.split(':').next())
        .and_then(|step| step.parse().ok())
        .unwrap_or_else(|| panic!("{error}"));
    let rows = error.split("with row").nth(1).unwrap();
    let rows = rows.trim_start_matches('s').split(" of ").next().unwrap();
    let rows: Vec<usize> = rows.split(',').map(|r| r.trim().parse().unwrap()).collect();
    assert!(error.contains("data.jsonl") && error.contains("on_non_finite"));
    assert_eq!(rows.len(), 2, "the micro-batch: {error}");
    assert!(rows.iter().any(|row| bad_lines.contains(row)), "{error}");
    let checkpoint = format!("checkpoint-{}", step - 1);
    assert_eq!(
        names(&output),
        [checkpoint.as_str(), "config.toml", "metrics.jsonl"]
    );

    // With the steps skipped, the run goes on from there to where it would have come at once.
    let skipping = |output_dir: PathBuf| TrainConfig {
        on_non_finite: OnNonFinite::Skip,
        output_dir,
        ..config.clone()
    };
    let whole = dir.path().join("whole");
    run(skipping(whole.clone())).unwrap();
    run(TrainConfig {
        resume_with_changes: true,
        ..resumed(skipping(output.clone()))
    })
    .unwrap();
    assert_same_end(&output, &whole);
    let records = metrics(&whole);
    assert_eq!(records.len(), 20, "no step is missing");
    let skipped: Vec<&Value> = records.iter().filter(|r| r["loss"].is_null()).collect();
    assert!(!skipped.is_empty() && skipped.len() < 20);
    for record in skipped {
        let rows = record["skipped_rows"].as_array().unwrap();
        let is_bad = |row: &Value| bad_lines.contains(&row.as_str().unwrap().parse().unwrap());
        assert!(rows.iter().any(is_bad), "{record}");
    }
}

#[test]
fn a_run_whose_every_step_would_be_skipped_stops() {
    let dir = tempfile::tempdir().unwrap();
    let error = error(TrainConfig {
        learning_rate: 1e30,
        max_grad_norm: 0.0,
        on_non_finite: OnNonFinite::Skip,
        ..config(dir.path())
    });
    assert!(
        error.contains("so were the steps before it") && error.contains("learning_rate"),
        "{error}"
    );
    assert!(!dir.path().join("adapter_model.safetensors").exists());
}

/// A template that prints the date makes other rows on another day, but not within a run.
#[test]
fn a_run_keeps_the_date_that_its_chat_template_prints() {
    const TEMPLATE: &str = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{% generation %}\
        {{ m.content + eos_token }}{% endgeneration %}{% endfor %}";
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    copy_dir(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo/base"),
        &model,
    );
    fs::write(model.join("chat_template.jinja"), TEMPLATE).unwrap();
    let rows = dir.path().join("rows.jsonl");
    let row = r#"{"messages": [{"role": "assistant", "content": "yes"}]}"#;
    fs::write(&rows, format!("{row}\n{row}\n")).unwrap();
    let output_dir = dir.path().join("run");
    let config = |date: Option<&str>, max_steps| TrainConfig {
        model_name_or_path: model.clone(),
        dataset: rows.clone().into(),
        max_steps,
        save_steps: 1,
        gradient_accumulation_steps: 1,
        eval_dataset_size: None,
        chat_template_date: date.map(|date| date.parse().unwrap()),
        ..config(&output_dir)
    };
    run(config(Some("2001-02-03"), 1)).unwrap();
    // Some years later.
    run(resumed(config(None, 2))).unwrap();
    let message = error(resumed(config(Some("2001-02-04"), 3)));
    assert!(message.contains("the training rows"), "{message}");
    let kept = TrainConfig::load(Some(&output_dir.join("config.toml")), &[]).unwrap();
    assert_eq!(kept.chat_template_date, "2001-02-03".parse().ok());

    // What a run did can be done again from its config.
    assert_eq!(kept.resume_from_checkpoint, Resume::Never);
    let today = run(TrainConfig {
        output_dir: dir.path().join("today"),
        ..config(None, 1)
    });
    today.unwrap();
    let today = TrainConfig::load(Some(&dir.path().join("today/config.toml")), &[]).unwrap();
    assert!(today.chat_template_date > kept.chat_template_date);
}
