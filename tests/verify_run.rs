//! `qlora verify run`: steps done again have the bits that the run left, with any number of threads.

mod tiny_run;

use std::fs;
use std::path::Path;
use std::process::Output;

use qlora::train::TrainConfig;
use serde_json::Value;
use tiny_run::{assert_same_end, bytes, config, run};

fn verify(dir: &Path, arguments: &[&str]) -> Output {
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("qlora"));
    command.args(["verify", "run"]).arg(dir).args(arguments);
    command.output().unwrap()
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn a_run_that_repeats_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    run(config(dir.path())).unwrap();
    let before = bytes(dir.path(), "metrics.jsonl");

    // From checkpoint-15 to checkpoint-20: 5 steps, an evaluation, adapter and moments, and the final adapter.
    let output = verify(dir.path(), &["--json"]);
    assert!(output.status.success(), "{output:?}");
    let found = report(&output);
    assert_eq!(
        (&found["first_step"], &found["last_step"]),
        (&16.into(), &20.into())
    );
    assert_eq!(found["records"], 6);
    let adapter = 2 * 7 * 2;
    assert_eq!(found["tensors"], adapter + 2 * adapter + adapter);

    let checkpoint = dir.path().join("checkpoint-5");
    let arguments = ["--checkpoint", checkpoint.to_str().unwrap(), "--steps", "2"];
    let output = verify(dir.path(), &arguments);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && text.contains("steps 6 to 7") && text.contains("the same bits"),
        "{text}"
    );
    assert_eq!(
        bytes(dir.path(), "metrics.jsonl"),
        before,
        "nothing is written"
    );
}

#[test]
fn a_run_without_two_checkpoints_is_replayed_from_its_start() {
    let dir = tempfile::tempdir().unwrap();
    run(TrainConfig {
        max_steps: 4,
        ..config(dir.path())
    })
    .unwrap();
    let found = report(&verify(dir.path(), &["--json"]));
    assert_eq!(
        (&found["from"], &found["last_step"]),
        (&Value::Null, &4.into())
    );
    assert_eq!(found["differences"], Value::Array(vec![]));
}

#[test]
fn a_record_and_a_tensor_that_are_otherwise_are_named() {
    let dir = tempfile::tempdir().unwrap();
    run(config(dir.path())).unwrap();
    let path = dir.path().join("metrics.jsonl");
    let metrics = fs::read_to_string(&path).unwrap();
    let line = metrics
        .lines()
        .find(|line| line.contains("\"step\":17,"))
        .unwrap();
    let mut record: Value = serde_json::from_str(line).unwrap();
    let loss = record["loss"].as_f64().unwrap();
    record["loss"] = Value::from(f64::from_bits(loss.to_bits() + 1));
    fs::write(&path, metrics.replace(line, &record.to_string())).unwrap();
    let adapter = dir.path().join("adapter_model.safetensors");
    let mut changed = fs::read(&adapter).unwrap();
    *changed.last_mut().unwrap() ^= 1;
    fs::write(&adapter, changed).unwrap();

    let output = verify(dir.path(), &["--json"]);
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("differs in 2 places"), "{stderr}");
    let differences = report(&output)["differences"].to_string();
    for part in ["step 17: loss is", "final adapter: `base_model.model"] {
        assert!(differences.contains(part), "{differences}");
    }
}

#[test]
fn a_run_is_done_again_with_its_own_threads_or_with_those_that_are_asked_for() {
    let (first, again) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run(TrainConfig {
        threads: Some(3),
        ..config(first.path())
    })
    .unwrap();
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("qlora"));
    command.arg("train").arg(first.path().join("config.toml"));
    let output = command.arg("--output_dir").arg(again.path()).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_same_end(again.path(), first.path());
    for arguments in [&[][..], &["--threads", "5"]] {
        let output = verify(again.path(), arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }
}

#[test]
fn any_number_of_threads_gives_the_same_adapter_and_records() {
    let whole = tempfile::tempdir().unwrap();
    let on = |threads: usize, dir: &Path| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(|| run(config(dir)).unwrap())
    };
    on(1, whole.path());
    for threads in [2, 3, 5, 8] {
        let dir = tempfile::tempdir().unwrap();
        on(threads, dir.path());
        assert_same_end(dir.path(), whole.path());
    }
}
