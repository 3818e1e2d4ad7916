//! Training runs: against torch's AdamW on the same 4-bit weights, and against themselves with other threads and batches.

mod reference_case;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use qlora::device::{ComputeDtype, Placement};
use qlora::train::schedule::SchedulerType;
use qlora::train::{Outcome, TrainConfig, Trainer};
use reference_case::{ReferenceCase, TRAINED_CASES, decoder_with_adapter, relative_error, values};
use serde_json::Value;

/// The run that the case's `train/` records.
fn config(case: &ReferenceCase, output_dir: &Path) -> TrainConfig {
    let run = case.dir.join("train");
    let args: Value =
        serde_json::from_slice(&std::fs::read(run.join("args.json")).unwrap()).unwrap();
    let number = |key: &str| args[key].as_f64().unwrap();
    assert_eq!(args["lr_scheduler_type"], "cosine");
    assert_eq!(args["shuffle"], false);
    TrainConfig {
        model_name_or_path: case.dir.clone(),
        adapter: Some(run.join("init_adapter")),
        output_dir: output_dir.to_path_buf(),
        dataset: run.join("data.jsonl").into(),
        shuffle: false,
        per_device_train_batch_size: number("per_device_train_batch_size") as usize,
        gradient_accumulation_steps: number("gradient_accumulation_steps") as usize,
        max_steps: number("max_steps") as i64,
        learning_rate: number("learning_rate"),
        lr_scheduler_type: SchedulerType::Cosine,
        warmup_steps: number("warmup_steps") as usize,
        weight_decay: number("weight_decay"),
        max_grad_norm: number("max_grad_norm"),
        adam_beta1: number("adam_beta1"),
        adam_beta2: number("adam_beta2"),
        adam_epsilon: number("adam_epsilon"),
        ..TrainConfig::default()
    }
}

/// A new adapter of rank 4 on all linear layers of `case`, trained on its rows in shuffled order.
fn seeded_config(case: &ReferenceCase, output_dir: &Path) -> TrainConfig {
    TrainConfig {
        adapter: None,
        lora_r: Some(4),
        lora_alpha: Some(8.0),
        shuffle: true,
        max_steps: 6,
        seed: 5,
        ..config(case, output_dir)
    }
}

fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.unwrap().install(f)
}

fn run(config: TrainConfig) -> PathBuf {
    let dir = config.output_dir.clone();
    let placement = Placement::open(config.device, config.compute_dtype).unwrap();
    let outcome = Trainer::new(config, &placement)
        .unwrap()
        .run(&AtomicBool::new(false), |_| ());
    assert_eq!(outcome.unwrap(), Outcome::Finished);
    dir
}

fn json_lines(path: PathBuf) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn assert_near(found: &Value, expected: &Value, tolerance: f64, what: &str) {
    let (found, expected) = (found.as_f64().unwrap(), expected.as_f64().unwrap());
    let error = (found - expected).abs();
    assert!(
        error <= tolerance * expected.abs(),
        "{what}: {found} instead of {expected}"
    );
}

#[test]
fn twenty_steps_are_those_of_torch() {
    for name in TRAINED_CASES {
        let case = ReferenceCase::read(name);
        let out = tempfile::tempdir().unwrap();
        let dir = run(config(&case, out.path()));
        let found = json_lines(dir.join("metrics.jsonl"));
        let found: Vec<_> = found
            .iter()
            .filter(|record| record.get("loss").is_some())
            .collect();
        let expected = json_lines(case.dir.join("train/log.jsonl"));
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            let what = |key| format!("{name} step {} {key}", expected["step"]);
            assert_eq!(found["step"], expected["step"]);
            assert_near(&found["loss"], &expected["loss"], 1e-4, &what("loss"));
            assert_near(
                &found["grad_norm"],
                &expected["grad_norm"],
                1e-3,
                &what("grad_norm"),
            );
            assert_near(
                &found["learning_rate"],
                &expected["learning_rate"],
                1e-12,
                &what("learning_rate"),
            );
        }
        let trained = decoder_with_adapter(&case.dir, &dir, &Placement::cpu());
        let reference = decoder_with_adapter(
            &case.dir,
            &case.dir.join("train/adapter"),
            &Placement::cpu(),
        );
        let start = decoder_with_adapter(
            &case.dir,
            &case.dir.join("train/init_adapter"),
            &Placement::cpu(),
        );
        let mut compared = 0;
        for (((tensor, found), (_, expected)), (_, start)) in trained
            .trainables()
            .zip(reference.trainables())
            .zip(start.trainables())
        {
            let (found, expected, start) = (
                values(&found.value),
                values(&expected.value),
                values(&start.value),
            );
            assert!(
                relative_error(&expected, &start) > 0.01,
                "{name} {tensor} did not move"
            );
            let error = relative_error(&found, &expected);
            assert!(error < 1e-3, "{name} {tensor}: {error}");
            compared += 1;
        }
        assert_eq!(compared, 2 * 7 * 2, "{name}");
    }
}

#[test]
fn how_a_batch_is_divided_does_not_matter() {
    for name in TRAINED_CASES {
        let case = ReferenceCase::read(name);
        let out = tempfile::tempdir().unwrap();
        let step = |micro_batch, accumulation| {
            let mut trainer = Trainer::new(
                TrainConfig {
                    per_device_train_batch_size: micro_batch,
                    gradient_accumulation_steps: accumulation,
                    ..config(&case, out.path())
                },
                &Placement::cpu(),
            )
            .unwrap();
            let record = trainer.step().unwrap();
            let grads: Vec<_> = trainer
                .decoder()
                .trainables()
                .map(|(name, t)| (name, values(&t.grad)))
                .collect();
            (record, grads)
        };
        let (whole, whole_grads) = step(16, 1);
        for (micro_batch, accumulation) in [(1, 16), (4, 4)] {
            let (divided, grads) = step(micro_batch, accumulation);
            let error = (divided.loss - whole.loss).abs() / whole.loss;
            assert!(
                error < 1e-6,
                "{name}: loss {} and {}",
                divided.loss,
                whole.loss
            );
            let joined = |grads: &[(String, Vec<f32>)]| {
                grads.iter().flat_map(|g| g.1.clone()).collect::<Vec<_>>()
            };
            let error = relative_error(&joined(&grads), &joined(&whole_grads));
            assert!(
                error < 1e-6,
                "{name}: gradient, {micro_batch} x {accumulation}: {error}"
            );
            for ((tensor, found), (_, expected)) in grads.iter().zip(&whole_grads) {
                // f32 rounding in the sums over attention: 1.01e-6 was seen in one tensor.
                let error = relative_error(found, expected);
                assert!(
                    error < 2e-6,
                    "{name} {tensor}, {micro_batch} x {accumulation}: {error}"
                );
            }
        }
    }
}

#[test]
fn a_seed_gives_the_same_bytes_with_any_number_of_threads() {
    for name in TRAINED_CASES {
        let case = ReferenceCase::read(name);
        for dtype in [ComputeDtype::F32, ComputeDtype::Bf16] {
            let adapter = |threads, seed| {
                let out = tempfile::tempdir().unwrap();
                let config = TrainConfig {
                    seed,
                    compute_dtype: Some(dtype),
                    ..seeded_config(&case, out.path())
                };
                let dir = with_threads(threads, || run(config));
                std::fs::read(dir.join("adapter_model.safetensors")).unwrap()
            };
            let one = adapter(1, 5);
            assert!(adapter(1, 5) == one, "{name} {dtype:?}: one thread twice");
            for threads in [2, 40] {
                assert!(
                    adapter(threads, 5) == one,
                    "{name} {dtype:?}: {threads} threads"
                );
            }
            assert!(adapter(1, 6) != one, "{name} {dtype:?}: another seed");
        }
    }
}

#[test]
fn recomputing_trains_the_bits_of_keeping() {
    for name in TRAINED_CASES {
        let case = ReferenceCase::read(name);
        let adapter = |gradient_checkpointing| {
            let out = tempfile::tempdir().unwrap();
            let dir = run(TrainConfig {
                gradient_checkpointing: Some(gradient_checkpointing),
                ..seeded_config(&case, out.path())
            });
            std::fs::read(dir.join("adapter_model.safetensors")).unwrap()
        };
        assert!(adapter(true) == adapter(false), "{name}");
    }
}

#[test]
fn every_adapter_tensor_gets_a_gradient_and_moves() {
    for name in reference_case::CASES {
        let case = ReferenceCase::read(name);
        let out = tempfile::tempdir().unwrap();
        // A starts with B = 0, so it has no gradient in the first step.
        let data = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/engine/qwen3/train/data.jsonl");
        let mut trainer = Trainer::new(
            TrainConfig {
                model_name_or_path: case.dir.clone(),
                output_dir: out.path().to_path_buf(),
                dataset: data.into(),
                lora_r: Some(4),
                gradient_accumulation_steps: 2,
                max_steps: 3,
                ..TrainConfig::default()
            },
            &Placement::cpu(),
        )
        .unwrap();
        let start: Vec<_> = trainer
            .decoder()
            .trainables()
            .map(|(_, t)| values(&t.value))
            .collect();
        let linears = trainer.decoder().linears().count();
        assert_eq!(start.len(), 2 * linears, "{name}");
        for _ in 0..2 {
            trainer.step().unwrap();
        }
        for ((tensor, trainable), start) in trainer.decoder().trainables().zip(start) {
            assert!(
                values(&trainable.grad).iter().any(|g| *g != 0.0),
                "{name} {tensor} has no gradient"
            );
            assert!(
                values(&trainable.value) != start,
                "{name} {tensor} did not move"
            );
        }
    }
}
