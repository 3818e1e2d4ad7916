//! A run that is killed at a hundred random moments and continued each time ends as one that never was.

mod tiny_run;

use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use qlora::data::SplitMix64;
use tiny_run::{assert_same_end, bytes, command, metrics, model, names, text};

const KILLS: usize = 100;
const STEPS: &str = "60";

/// When a process is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// So long after it was started.
    After(Duration),
    /// While a checkpoint is written, so long after its directory is there.
    WhileSaving(Duration),
    /// When a checkpoint has its name and the oldest one is still there.
    BeforeCleanup,
}

/// What is killed where, for the report.
#[derive(Debug, Default)]
struct Kills {
    all: usize,
    with_a_partial_checkpoint: usize,
    before_cleanup: usize,
    before_the_first_checkpoint: usize,
}

fn start(dir: &Path) -> Child {
    let resumes = checkpoints(dir) > 0;
    let data = model().join("train/data.jsonl");
    command(&[
        ("model_name_or_path", text(&model())),
        ("dataset", text(&data)),
        ("output_dir", text(dir)),
        ("eval_dataset_size", "4"),
        ("eval_steps", "20"),
        ("lora_r", "4"),
        ("learning_rate", "5e-3"),
        ("per_device_train_batch_size", "2"),
        ("gradient_accumulation_steps", "2"),
        ("max_steps", STEPS),
        ("save_steps", "3"),
        ("save_total_limit", "2"),
        ("lr_scheduler_type", "cosine"),
        (
            "resume_from_checkpoint",
            if resumes { "true" } else { "false" },
        ),
    ])
    .spawn()
    .unwrap()
}

fn count(dir: &Path, is: impl Fn(&str) -> bool) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_str().is_some_and(&is))
        .count()
}

fn checkpoints(dir: &Path) -> usize {
    count(dir, |name| name.starts_with("checkpoint-"))
}

fn partial_checkpoints(dir: &Path) -> usize {
    count(dir, |name| {
        name.starts_with(".checkpoint-") && name.ends_with(".partial")
    })
}

/// Waits for the moment; `false` if the process ended before.
fn wait_for(moment: Moment, child: &mut Child, dir: &Path) -> bool {
    let started = Instant::now();
    loop {
        let has_come = match moment {
            Moment::After(delay) => started.elapsed() >= delay,
            Moment::WhileSaving(_) => partial_checkpoints(dir) > 0,
            Moment::BeforeCleanup => checkpoints(dir) > 2,
        };
        if has_come {
            if let Moment::WhileSaving(delay) = moment {
                spin(delay);
            }
            return true;
        }
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(started.elapsed() < Duration::from_secs(300), "it hangs");
    }
}

/// A sleep is too coarse for moments within a write.
fn spin(delay: Duration) {
    let started = Instant::now();
    while started.elapsed() < delay {}
}

/// Runs to the end, with up to `limit` kills on the way, and adds them up.
fn run_with_kills(dir: &Path, limit: usize, next: &mut dyn FnMut() -> Moment, kills: &mut Kills) {
    for _ in 0..limit {
        let mut child = start(dir);
        let is_killed = wait_for(next(), &mut child, dir);
        if is_killed {
            child.kill().unwrap();
        }
        let output = child.wait_with_output().unwrap();
        if output.status.success() {
            return;
        }
        assert!(is_killed, "{}", tiny_run::stderr(&output));
        kills.all += 1;
        kills.with_a_partial_checkpoint += usize::from(partial_checkpoints(dir) > 0);
        kills.before_cleanup += usize::from(checkpoints(dir) > 2);
        kills.before_the_first_checkpoint += usize::from(checkpoints(dir) == 0);
    }
    let output = start(dir).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", tiny_run::stderr(&output));
}

#[test]
fn a_hundred_kills_leave_no_trace() {
    let whole = tempfile::tempdir().unwrap();
    let started = Instant::now();
    let output = start(whole.path()).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", tiny_run::stderr(&output));
    let duration = started.elapsed();
    assert_eq!(metrics(whole.path()).len(), 60 + 3);

    let mut random = SplitMix64::new(7);
    let mut share = move |of: Duration| of.mul_f64(random.below(1000) as f64 / 1000.0);
    let mut number = 0;
    let mut next = move || {
        number += 1;
        match number % 4 {
            0 => Moment::BeforeCleanup,
            1 => Moment::WhileSaving(share(Duration::from_millis(3))),
            _ => Moment::After(share(duration)),
        }
    };
    let mut kills = Kills::default();
    while kills.all < KILLS {
        let dir = tempfile::tempdir().unwrap();
        let limit = (KILLS - kills.all).min(25);
        run_with_kills(dir.path(), limit, &mut next, &mut kills);
        assert_same_end(dir.path(), whole.path());
        assert_eq!(
            names(dir.path()),
            names(whole.path()),
            "nothing is left over"
        );
        for file in [
            "optimizer.safetensors",
            "trainer_state.json",
            "manifest.json",
        ] {
            let file = format!("checkpoint-{STEPS}/{file}");
            assert!(
                bytes(dir.path(), &file) == bytes(whole.path(), &file),
                "{file} differs"
            );
        }
    }
    println!("{kills:?}, of runs of {duration:?}");
    assert!(kills.with_a_partial_checkpoint > 0, "{kills:?}");
    assert!(kills.before_cleanup > 0, "{kills:?}");
}
