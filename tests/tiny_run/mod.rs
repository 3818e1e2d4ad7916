//! A run of a tiny model, in this process or in one of its own, and what it leaves.
#![allow(dead_code, reason = "each test takes what it needs")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use qlora::device::Placement;
use qlora::train::config::Resume;
use qlora::train::{Outcome, TrainConfig, Trainer};
use serde_json::Value;

pub fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/engine/llama_gqa")
}

/// Twenty steps of two micro-batches, with evaluations and checkpoints every five.
pub fn config(output_dir: &Path) -> TrainConfig {
    TrainConfig {
        dataset: model().join("train/data.jsonl").into(),
        model_name_or_path: model(),
        output_dir: output_dir.to_path_buf(),
        eval_dataset_size: Some(4),
        eval_steps: Some(5),
        lora_r: Some(4),
        learning_rate: 5e-3,
        per_device_train_batch_size: 2,
        gradient_accumulation_steps: 2,
        max_steps: 20,
        save_steps: 5,
        ..TrainConfig::default()
    }
}

pub fn resumed(config: TrainConfig) -> TrainConfig {
    TrainConfig {
        resume_from_checkpoint: Resume::Latest,
        ..config
    }
}

pub fn trainer(config: TrainConfig) -> qlora::Result<Trainer> {
    Trainer::new(config, &Placement::cpu())
}

pub fn run(config: TrainConfig) -> qlora::Result<Outcome> {
    trainer(config)?.run(&AtomicBool::new(false), |_| ())
}

pub fn bytes(dir: &Path, file: &str) -> Vec<u8> {
    fs::read(dir.join(file)).unwrap_or_else(|e| panic!("{}: {e}", dir.join(file).display()))
}

/// The records without what depends on the clock and on other tests.
pub fn metrics(dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let mut record: Value = serde_json::from_str(line).unwrap();
            for key in ["tokens_per_second", "peak_memory_bytes"] {
                record.as_object_mut().unwrap().remove(key);
            }
            record
        })
        .collect()
}

/// The names in a directory, sorted.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The final adapter and the records are those of `expected`, byte for byte.
#[track_caller]
pub fn assert_same_end(found: &Path, expected: &Path) {
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        assert!(
            bytes(found, file) == bytes(expected, file),
            "{file} differs"
        );
    }
    assert_eq!(metrics(found), metrics(expected));
}

/// `qlora train` with the flags of a run, each a key and a value.
pub fn command(flags: &[(&str, &str)]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("qlora"));
    command.arg("train").stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    for (key, value) in flags {
        command.args([format!("--{key}"), value.to_string()]);
    }
    command
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Sends a signal to a process that was started here.
pub fn signal(child: &Child, signal: i32) {
    // SAFETY: the process is a child that was not waited for, so its id is still its own.
    let status = unsafe { libc::kill(child.id() as libc::pid_t, signal) };
    assert_eq!(status, 0);
}

/// Waits until the run in `dir` has written so many records.
#[track_caller]
pub fn wait_for_records(dir: &Path, count: usize) {
    let lines = || fs::read_to_string(dir.join("metrics.jsonl")).map_or(0, |t| t.lines().count());
    wait_until("records", || lines() >= count);
}

#[track_caller]
pub fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < Duration::from_secs(120), "no {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
