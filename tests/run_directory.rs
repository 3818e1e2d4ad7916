//! The directory of a training run: what is in it, continuing from it, and what is left after a failure.

mod tiny_run;

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use qlora::device::Placement;
use qlora::store::Adapter;
use qlora::train::config::Resume;
use qlora::train::{Event, Outcome, TrainConfig, Trainer};
use serde_json::Value;
use tiny_run::{bytes, config, metrics, names, resumed, run};

#[test]
fn a_run_leaves_adapter_checkpoints_config_and_metrics() {
    let dir = tempfile::tempdir().unwrap();
    let limited = TrainConfig {
        save_total_limit: 2,
        ..config(dir.path())
    };
    assert_eq!(run(limited.clone()).unwrap(), Outcome::Finished);
    assert_eq!(
        names(dir.path()),
        [
            "adapter_config.json",
            "adapter_model.safetensors",
            "checkpoint-15",
            "checkpoint-20",
            "config.toml",
            "metrics.jsonl"
        ]
    );
    assert_eq!(
        names(&dir.path().join("checkpoint-20")),
        [
            "adapter_config.json",
            "adapter_model.safetensors",
            "manifest.json",
            "optimizer.safetensors",
            "trainer_state.json"
        ]
    );
    let records = metrics(dir.path());
    let is_step = |record: &&Value| record.get("loss").is_some();
    assert_eq!(records.iter().filter(is_step).count(), 20);
    let evaluations: Vec<&Value> = records
        .iter()
        .filter(|r| r.get("eval_loss").is_some())
        .collect();
    assert_eq!(
        evaluations
            .iter()
            .map(|r| r["step"].as_u64().unwrap())
            .collect::<Vec<_>>(),
        [5, 10, 15, 20]
    );
    let loss = |record: &Value| record["eval_loss"].as_f64().unwrap();
    assert!(
        loss(evaluations[3]) < loss(evaluations[0]),
        "the run learns: {evaluations:?}"
    );
    let resolved = TrainConfig::load(Some(&dir.path().join("config.toml")), &[]).unwrap();
    assert_eq!(resolved, limited);
    Adapter::read(dir.path()).unwrap();
}

#[test]
fn resume_equals_uninterrupted_run() {
    let whole = tempfile::tempdir().unwrap();
    run(config(whole.path())).unwrap();

    let parts = tempfile::tempdir().unwrap();
    let stop = AtomicBool::new(false);
    let stopped = Trainer::new(config(parts.path()), &Placement::cpu())
        .unwrap()
        .run(&stop, |event| {
            if let Event::Step(record) = event {
                stop.store(record.step == 8, Ordering::Relaxed);
            }
        });
    let checkpoint = parts.path().join("checkpoint-8");
    assert_eq!(stopped.unwrap(), Outcome::Stopped(checkpoint.clone()));
    assert!(!parts.path().join("adapter_model.safetensors").exists());
    let resumed = TrainConfig {
        resume_from_checkpoint: Resume::Latest,
        ..config(parts.path())
    };
    assert_eq!(run(resumed).unwrap(), Outcome::Finished);

    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        assert!(
            bytes(whole.path(), file) == bytes(parts.path(), file),
            "{file} differs"
        );
    }
    for file in [
        "checkpoint-20/optimizer.safetensors",
        "checkpoint-20/trainer_state.json",
    ] {
        assert!(
            bytes(whole.path(), file) == bytes(parts.path(), file),
            "{file} differs"
        );
    }
    assert_eq!(metrics(whole.path()), metrics(parts.path()));

    // From an older checkpoint by name: what came after it is written again, not twice.
    let again = TrainConfig {
        resume_from_checkpoint: Resume::From(checkpoint),
        ..config(parts.path())
    };
    assert_eq!(run(again).unwrap(), Outcome::Finished);
    assert_eq!(metrics(whole.path()), metrics(parts.path()));
}

#[test]
fn a_run_that_goes_on_after_its_end_takes_its_earlier_adapter_away() {
    let dir = tempfile::tempdir().unwrap();
    let steps = |max_steps| TrainConfig {
        max_steps,
        ..config(dir.path())
    };
    run(steps(5)).unwrap();
    // There is nothing left to do: it stays.
    run(resumed(steps(5))).unwrap();
    assert!(Adapter::exists(dir.path()));
    let stop = AtomicBool::new(false);
    let mut longer = Trainer::new(resumed(steps(10)), &Placement::cpu()).unwrap();
    let stopped = longer.run(&stop, |_| stop.store(true, Ordering::Relaxed));
    assert!(matches!(stopped.unwrap(), Outcome::Stopped(_)));
    assert!(!Adapter::exists(dir.path()));
    run(resumed(steps(10))).unwrap();
    assert!(Adapter::exists(dir.path()));
}

#[test]
fn a_new_run_refuses_the_directory_of_an_earlier_one() {
    let dir = tempfile::tempdir().unwrap();
    run(TrainConfig {
        max_steps: 1,
        ..config(dir.path())
    })
    .unwrap();
    let before = bytes(dir.path(), "metrics.jsonl");
    let error = run(config(dir.path())).unwrap_err().to_string();
    assert!(
        error.contains("output_dir") && error.contains("checkpoint-1"),
        "{error}"
    );
    assert_eq!(
        bytes(dir.path(), "metrics.jsonl"),
        before,
        "nothing of the earlier run is touched"
    );
}

#[test]
fn resuming_with_another_rank_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    run(config(dir.path())).unwrap();
    let other = TrainConfig {
        resume_from_checkpoint: Resume::Latest,
        lora_r: config(dir.path()).lora_r.map(|r| r + 1),
        ..config(dir.path())
    };
    let error = run(other).unwrap_err().to_string();
    assert!(
        error.contains("`lora_r`") && error.contains("checkpoint-20"),
        "{error}"
    );
}

#[test]
fn resuming_without_a_checkpoint_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let resumed = TrainConfig {
        resume_from_checkpoint: Resume::Latest,
        ..config(dir.path())
    };
    let error = run(resumed).unwrap_err().to_string();
    assert!(error.contains("resume_from_checkpoint"), "{error}");
}

#[test]
fn a_damaged_optimizer_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    run(TrainConfig {
        max_steps: 1,
        ..config(dir.path())
    })
    .unwrap();
    let path: PathBuf = dir.path().join("checkpoint-1/optimizer.safetensors");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let resumed = TrainConfig {
        resume_from_checkpoint: Resume::Latest,
        ..config(dir.path())
    };
    let error = run(resumed).unwrap_err().to_string();
    assert!(error.contains("optimizer.safetensors"), "{error}");
}

#[test]
fn a_diverging_run_stops_with_the_step_and_no_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let wild = TrainConfig {
        learning_rate: 1e30,
        max_grad_norm: 0.0,
        ..config(dir.path())
    };
    let error = run(wild).unwrap_err().to_string();
    assert!(
        error.starts_with("step ") && error.contains("not finite"),
        "{error}"
    );
    assert!(!dir.path().join("adapter_model.safetensors").exists());
}

/// transformers would load the adapter together with the model.
#[test]
fn a_run_does_not_write_into_its_model() {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(tiny_run::model().join(file), dir.path().join(file)).unwrap();
    }
    let in_model = TrainConfig {
        model_name_or_path: dir.path().to_path_buf(),
        output_dir: dir.path().join("."),
        ..config(dir.path())
    };
    let error = run(in_model).unwrap_err().to_string();
    assert!(
        error.contains("`output_dir`") && error.contains("model's own"),
        "{error}"
    );
    assert_eq!(names(dir.path()), ["config.json", "model.safetensors"]);
}

#[test]
fn rows_beyond_what_the_model_was_made_for_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let told = |tokens: usize| {
        let rows = dir.path().join("rows.jsonl");
        let row = serde_json::json!({"input_ids": vec![5; tokens]});
        fs::write(&rows, format!("{row}\n")).unwrap();
        let run = dir.path().join(tokens.to_string());
        let output = tiny_run::command(&[
            ("model_name_or_path", tiny_run::text(&tiny_run::model())),
            ("dataset", tiny_run::text(&rows)),
            ("output_dir", tiny_run::text(&run)),
            ("max_steps", "1"),
            ("gradient_accumulation_steps", "1"),
        ])
        .output()
        .unwrap();
        assert!(output.status.success(), "{output:?}");
        tiny_run::stderr(&output)
    };
    assert!(told(129).contains("up to 129 tokens, and the model was made for 128"));
    assert!(!told(128).contains("was made for"));
}
