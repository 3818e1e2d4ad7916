//! Signals to `qlora train`: SIGINT and SIGTERM save and stop, a second one stops at once, SIGUSR1 saves and goes on.

mod tiny_run;

use std::path::Path;
use std::process::Child;

use libc::{SIGINT, SIGTERM, SIGUSR1};
use tiny_run::{
    assert_same_end, command, model, names, signal, stderr, text, wait_for_records, wait_until,
};

/// Six steps of so many micro-batches that a signal comes within one.
fn start(dir: &Path, resume: &str) -> Child {
    let data = model().join("train/data.jsonl");
    command(&[
        ("model_name_or_path", text(&model())),
        ("dataset", text(&data)),
        ("output_dir", text(dir)),
        ("lora_r", "4"),
        ("learning_rate", "5e-3"),
        ("per_device_train_batch_size", "1"),
        ("gradient_accumulation_steps", "150"),
        ("max_steps", "6"),
        ("save_steps", "100"),
        ("resume_from_checkpoint", resume),
    ])
    .spawn()
    .unwrap()
}

fn whole_run() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let output = start(dir.path(), "false").wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    dir
}

fn checkpoints(dir: &Path) -> Vec<String> {
    let mut names = names(dir);
    names.retain(|name| name.starts_with("checkpoint-"));
    names
}

#[test]
fn the_first_signal_saves_within_the_step_and_ends_with_130() {
    let whole = whole_run();
    for number in [SIGINT, SIGTERM] {
        let dir = tempfile::tempdir().unwrap();
        let child = start(dir.path(), "false");
        wait_for_records(dir.path(), 2);
        // Within the third step, as a rule.
        std::thread::sleep(std::time::Duration::from_millis(20));
        signal(&child, number);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
        let saved = checkpoints(dir.path());
        assert_eq!(saved.len(), 1, "{saved:?}");
        assert!(!saved[0].ends_with("-6"), "it came too late: {saved:?}");
        let told = stderr(&output);
        assert!(told.contains(&saved[0]) && told.contains("--resume_from_checkpoint true"));
        assert!(!names(dir.path()).contains(&"adapter_model.safetensors".to_string()));

        let output = start(dir.path(), "true").wait_with_output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        assert_same_end(dir.path(), whole.path());
    }
}

#[test]
fn a_second_signal_ends_the_run_at_once_without_harm() {
    let whole = whole_run();
    let dir = tempfile::tempdir().unwrap();
    let child = start(dir.path(), "false");
    wait_for_records(dir.path(), 1);
    signal(&child, SIGUSR1);
    wait_until("checkpoint", || !checkpoints(dir.path()).is_empty());
    signal(&child, SIGINT);
    signal(&child, SIGTERM);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    let output = start(dir.path(), "true").wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_same_end(dir.path(), whole.path());
}

#[test]
fn sigusr1_saves_and_the_run_goes_on() {
    let whole = whole_run();
    let dir = tempfile::tempdir().unwrap();
    let child = start(dir.path(), "false");
    wait_for_records(dir.path(), 1);
    signal(&child, SIGUSR1);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let saved = checkpoints(dir.path());
    assert_eq!(saved.len(), 2, "{saved:?}");
    assert_eq!(saved[1], "checkpoint-6");
    assert_same_end(dir.path(), whole.path());

    // And what was saved is good.
    let from = dir.path().join(&saved[0]);
    let again = tempfile::tempdir().unwrap();
    let copy = again.path().join(&saved[0]);
    std::fs::create_dir(&copy).unwrap();
    for name in names(&from) {
        std::fs::copy(from.join(&name), copy.join(&name)).unwrap();
    }
    let output = start(again.path(), "true").wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(
        tiny_run::bytes(again.path(), "adapter_model.safetensors"),
        tiny_run::bytes(whole.path(), "adapter_model.safetensors")
    );
}
