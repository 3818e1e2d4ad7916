//! What `qlora train` does when the world fails under it: one line that names the thing, status 1, and nothing lost.

mod tiny_run;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Output};
use std::sync::atomic::AtomicBool;

use qlora::train::{Event, TrainConfig};
use tiny_run::{
    assert_same_end, command, config, model, names, resumed, run, signal, stderr, text, trainer,
    wait_for_records, wait_until,
};

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    /// A copy of a small model, so that a test can break it.
    fn new() -> Self {
        let bench = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::create_dir(bench.model()).unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(model().join(file), bench.model().join(file)).unwrap();
        }
        bench
    }

    fn model(&self) -> PathBuf {
        self.dir.path().join("model")
    }

    fn weights(&self) -> PathBuf {
        self.model().join("model.safetensors")
    }

    fn output(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// A run that goes on until it is stopped.
    fn start(&self) -> Child {
        let data = model().join("train/data.jsonl");
        command(&[
            ("model_name_or_path", text(&self.model())),
            ("dataset", text(&data)),
            ("output_dir", text(&self.output())),
            ("lora_r", "2"),
            ("gradient_accumulation_steps", "2"),
            ("max_steps", "1000000"),
            ("save_steps", "1000000"),
        ])
        .spawn()
        .unwrap()
    }

    fn config(&self) -> TrainConfig {
        TrainConfig {
            model_name_or_path: self.model(),
            ..config(&self.output())
        }
    }
}

#[track_caller]
fn error_line(output: &Output) -> String {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let errors: Vec<&str> = text.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{text}");
    errors[0].to_string()
}

#[test]
fn a_base_file_that_is_truncated_under_the_run_is_named() {
    for bytes in [0, 4096] {
        let bench = Bench::new();
        let child = bench.start();
        wait_for_records(&bench.output(), 2);
        let file = fs::OpenOptions::new().write(true).open(bench.weights());
        file.unwrap().set_len(bytes).unwrap();
        let error = error_line(&child.wait_with_output().unwrap());
        for part in [
            "model.safetensors",
            "became shorter",
            "resume_from_checkpoint",
        ] {
            assert!(error.contains(part), "{error}");
        }
        assert!(!bench.output().join("adapter_model.safetensors").exists());
    }
}

#[test]
fn a_base_file_that_is_changed_under_the_run_is_named_and_nothing_is_saved_of_it() {
    let bench = Bench::new();
    let good = fs::read(bench.weights()).unwrap();
    let whole = tempfile::tempdir().unwrap();
    run(TrainConfig {
        output_dir: whole.path().to_path_buf(),
        ..bench.config()
    })
    .unwrap();

    let changes_at_step_7 = |event: Event<'_>| {
        if let Event::Step(record) = event
            && record.step == 7
        {
            use std::io::{Seek, Write};
            let file = fs::OpenOptions::new().write(true).open(bench.weights());
            let mut file = file.unwrap();
            file.seek(std::io::SeekFrom::Start(good.len() as u64 / 2))
                .unwrap();
            file.write_all(&[1; 64]).unwrap();
        }
    };
    let mut changed = trainer(bench.config()).unwrap();
    let error = changed.run(&AtomicBool::new(false), changes_at_step_7);
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("model.safetensors") && error.contains("was changed while it was mapped"),
        "{error}"
    );
    let checkpoints = ["checkpoint-5", "config.toml", "metrics.jsonl"];
    assert_eq!(names(&bench.output()), checkpoints);
    drop(changed);

    let error = run(resumed(bench.config())).unwrap_err().to_string();
    assert!(error.contains("the base model changed"), "{error}");
    fs::write(bench.weights(), good).unwrap();
    run(resumed(bench.config())).unwrap();
    assert_same_end(&bench.output(), whole.path());
}

#[test]
fn a_second_run_in_a_directory_is_told_who_is_there_and_a_killed_one_does_not_block() {
    let bench = Bench::new();
    let mut first = bench.start();
    wait_for_records(&bench.output(), 1);
    let error = error_line(&bench.start().wait_with_output().unwrap());
    let owner = format!("process {} on ", first.id());
    for part in ["output_dir", &owner, "run.lock"] {
        assert!(error.contains(part), "{error}");
    }
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(bench.output().join("run.lock").exists());

    let records = || tiny_run::metrics(&bench.output()).len();
    let before = records();
    let third = bench.start();
    wait_until("new records", || {
        bench.output().join("metrics.jsonl").exists() && records() != before
    });
    signal(&third, libc::SIGTERM);
    let output = third.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(!bench.output().join("run.lock").exists());
}

#[test]
fn a_full_disk_under_the_metrics_is_named() {
    let bench = Bench::new();
    fs::create_dir(bench.output()).unwrap();
    let metrics = bench.output().join("metrics.jsonl");
    std::os::unix::fs::symlink("/dev/full", &metrics).unwrap();
    let error = error_line(&bench.start().wait_with_output().unwrap());
    assert!(
        error.contains("metrics.jsonl") && error.contains("No space left"),
        "{error}"
    );
}

/// Runs in a directory that is limited to so many kilobytes a file, which stands in for a disk that becomes full.
#[test]
fn a_disk_that_is_full_stops_the_run_and_the_rest_is_done_when_there_is_room() {
    let whole = tempfile::tempdir().unwrap();
    run(config(whole.path())).unwrap();
    let dir = tempfile::tempdir().unwrap();
    run(TrainConfig {
        max_steps: 5,
        ..config(dir.path())
    })
    .unwrap();
    let config_file = dir.path().join("config.toml");
    let limited = |kilobytes: u32| {
        let mut shell = std::process::Command::new("bash");
        let script = format!("ulimit -f {kilobytes}; trap '' XFSZ; exec \"$0\" \"$@\"");
        shell.args(["-c", &script]);
        shell.arg(assert_cmd::cargo::cargo_bin("qlora"));
        shell.arg("train").arg(&config_file);
        shell.args(["--max_steps", "20", "--resume_from_checkpoint", "true"]);
        shell.output().unwrap()
    };
    let error = error_line(&limited(8));
    assert!(error.contains("checkpoint-10"), "{error}");
    let left = names(dir.path());
    assert!(left.contains(&"checkpoint-5".to_string()), "{left:?}");
    assert!(
        !left.iter().any(|name| name.contains("checkpoint-10")),
        "{left:?}"
    );
    let output = limited(1 << 20);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_same_end(dir.path(), whole.path());
}

#[test]
fn a_directory_that_is_removed_under_the_run_has_the_state_again() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("run");
    let removes_at_step_7 = |event: Event<'_>| {
        if let Event::Step(record) = event
            && record.step == 7
        {
            fs::remove_dir_all(&output).unwrap();
        }
    };
    let mut trainer = trainer(config(&output)).unwrap();
    let error = trainer.run(&AtomicBool::new(false), removes_at_step_7);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("metrics.jsonl"), "{error}");
    assert_eq!(names(&output), ["checkpoint-10"]);

    let whole = tempfile::tempdir().unwrap();
    run(config(whole.path())).unwrap();
    run(resumed(config(&output))).unwrap();
    let adapter = |dir: &Path| tiny_run::bytes(dir, "adapter_model.safetensors");
    assert_eq!(adapter(&output), adapter(whole.path()));
}

#[test]
fn a_directory_that_cannot_be_written_to_is_named_before_a_step_is_done() {
    // Nobody can make a directory there, whoever runs the test.
    let output = Path::new("/proc/qlora-run");
    let error = run(config(output)).unwrap_err().to_string();
    assert!(error.contains("/proc/qlora-run"), "{error}");
}
