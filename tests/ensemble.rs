//! The test-time ensemble of LoRA Dropout: the mean of the probabilities of models whose adapters are masked by hand here.

mod emulated;
mod reference_case;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use emulated::placement_test;
use predicates::prelude::*;
use predicates::str::contains;
use qlora::IGNORE_INDEX;
use qlora::data::Example;
use qlora::device::Placement;
use qlora::infer::{
    Ensemble, Evaluation, GenerateOptions, LogProbs, Sampler, SamplingOptions, Session,
    evaluate_ensemble,
};
use qlora::model::{Decoder, MatrixDropout};
use qlora::ops::matrix_dropout;
use qlora::quant::DenseTensor;
use qlora::store::{Adapter, Checkpoint, MatrixDropoutScale, MatrixDropoutSettings};
use reference_case::{ReferenceCase, floats, largest_difference, sequences, values};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const P: f64 = 0.3;
const SEED: u64 = 11;

fn ensemble(models: usize) -> Ensemble {
    Ensemble::new(P, SEED, models).unwrap()
}

/// The case's model with its adapter multiplied by the masks of a model of the ensemble.
fn masked_by_hand(case: &ReferenceCase, model: usize) -> Decoder {
    let checkpoint = Checkpoint::open(&case.dir).unwrap();
    let mut decoder = Decoder::load(&checkpoint, None, &Placement::cpu()).unwrap();
    let mut adapter = Adapter::read(case.dir.join("adapter")).unwrap();
    let masks = MatrixDropout::ensemble(P, SEED, model + 1).unwrap();
    for (layer, module) in decoder.config().linears() {
        let (d_out, d_in) = decoder.config().linear_shape(module);
        let masks = masks.masks(layer, module as usize, model);
        let (columns, rows) = matrix_dropout::reference(&masks, d_in, d_out).unwrap();
        let path = decoder.config().linear_path(layer, module);
        for (factor, mask) in [("lora_A", columns), ("lora_B", rows)] {
            let name = format!("base_model.model.{path}.{factor}.weight");
            let tensor = adapter.tensors.get_mut(&name).unwrap();
            let cols = tensor.shape[1];
            let mask: Vec<f64> = mask.flatten_all().unwrap().to_vec1().unwrap();
            let masked: Vec<f32> = tensor
                .to_f32_vec()
                .iter()
                .enumerate()
                .map(|(i, value)| {
                    let feature = if factor == "lora_A" {
                        i % cols
                    } else {
                        i / cols
                    };
                    value * mask[feature] as f32
                })
                .collect();
            *tensor = DenseTensor::from_f32(tensor.shape.clone(), &masked);
        }
    }
    decoder.load_adapter(&adapter).unwrap();
    decoder
}

/// The mean of the models' probabilities for each row of a batch, `[N][V]`.
fn mean_probabilities(case: &ReferenceCase, models: usize) -> Vec<Vec<f64>> {
    let batch = case.batch();
    let mut mean = Vec::new();
    for model in 0..models {
        let logits = masked_by_hand(case, model)
            .logits(sequences(&batch))
            .unwrap();
        let vocab = logits.dim(1).unwrap();
        for (row, logits) in values(&logits).chunks_exact(vocab).enumerate() {
            let total: f64 = logits.iter().map(|z| f64::from(*z).exp()).sum();
            if model == 0 {
                mean.push(vec![0.0; vocab]);
            }
            for (mean, z) in mean[row].iter_mut().zip(logits) {
                *mean += f64::from(*z).exp() / total / models as f64;
            }
        }
    }
    mean
}

fn evaluated(
    case: &ReferenceCase,
    at: &Placement,
    sizes: &[usize],
) -> (Vec<Evaluation>, Vec<Vec<f32>>) {
    let decoder = case.decoder_at(at);
    let ensemble = ensemble(*sizes.last().unwrap());
    let mut log_probs = Vec::new();
    let evaluations = evaluate_ensemble(
        &decoder,
        (&ensemble, sizes),
        &case.examples,
        LogProbs::EveryToken,
        |row, values| {
            assert_eq!(row, log_probs.len());
            log_probs.push(values.unwrap());
            Ok(())
        },
    );
    (evaluations.unwrap(), log_probs)
}

#[test]
fn an_ensemble_has_the_mean_of_the_probabilities_of_its_models() {
    let case = ReferenceCase::read("llama_odd");
    let sizes = [1, 2, 4];
    let (evaluations, log_probs) = evaluated(&case, &Placement::cpu(), &sizes);
    let labels = case.batch().labels;
    for (&size, found) in sizes.iter().zip(&evaluations) {
        let mean = mean_probabilities(&case, size);
        let (mut loss, mut correct, mut tokens) = (0.0, 0, 0);
        for (mean, &label) in mean.iter().zip(&labels) {
            if label == IGNORE_INDEX {
                continue;
            }
            let likeliest = (0..mean.len()).max_by(|&a, &b| mean[a].total_cmp(&mean[b]));
            loss -= mean[label as usize].ln();
            correct += usize::from(likeliest == Some(label as usize));
            tokens += 1;
        }
        assert_eq!(found.tokens, tokens);
        assert!(
            (found.loss - loss / tokens as f64).abs() < 1e-5,
            "{size}: {found:?}"
        );
        assert!((found.perplexity - found.loss.exp()).abs() < 1e-9);
        assert_eq!(found.token_accuracy, correct as f64 / tokens as f64);
        assert!((0.0..1.0).contains(&found.ece));
    }
    assert!(evaluations[0].loss != evaluations[2].loss);

    let mean = mean_probabilities(&case, 4);
    let mut rows = mean.iter();
    for (Example { input_ids, .. }, found) in case.examples.iter().zip(&log_probs) {
        let of_example: Vec<_> = rows.by_ref().take(input_ids.len()).collect();
        let expected: Vec<f32> = of_example
            .iter()
            .zip(&input_ids[1..])
            .map(|(mean, &next)| mean[next as usize].ln() as f32)
            .collect();
        assert!(largest_difference(found, &expected) < 1e-5);
    }
}

#[test]
fn a_smaller_ensemble_is_the_beginning_of_a_larger_one() {
    let case = ReferenceCase::read("qwen3");
    let (several, _) = evaluated(&case, &Placement::cpu(), &[1, 3]);
    let (one, _) = evaluated(&case, &Placement::cpu(), &[1]);
    assert_eq!(several[0], one[0]);
}

#[test]
fn sizes_that_do_not_ascend_to_the_ensemble_are_refused() {
    let case = ReferenceCase::read("qwen3");
    let decoder = case.decoder();
    for sizes in [&[][..], &[0, 2], &[2, 1], &[1, 1, 2], &[1]] {
        let of = (&ensemble(2), sizes);
        let refused =
            evaluate_ensemble(&decoder, of, &case.examples, LogProbs::Omit, |_, _| Ok(()));
        assert!(refused.unwrap_err().to_string().contains("ensemble"));
    }
}

placement_test!(an_ensemble_on_a_device_is_that_of_the_cpu, |placement| {
    let case = ReferenceCase::read("qwen3");
    let (expected, _) = evaluated(&case, &Placement::cpu(), &[1, 2]);
    let (found, _) = evaluated(&case, placement, &[1, 2]);
    for (found, expected) in found.iter().zip(&expected) {
        let off = (found.loss - expected.loss).abs();
        assert!(off < 0.01 * expected.loss, "{found:?} and {expected:?}");
    }
});

#[test]
fn an_ensemble_writes_what_its_mean_says_token_by_token() {
    let case = ReferenceCase::read("llama_gqa");
    let (models, new_tokens) = (3, 5);
    let members: Vec<_> = (0..models)
        .map(|model| masked_by_hand(&case, model))
        .collect();
    let mut text = case.prompt.clone();
    for _ in 0..new_tokens {
        let positions: Vec<u32> = (0..text.len() as u32).collect();
        let mut mean = vec![0f64; 256];
        for member in &members {
            let sequences = qlora::model::Sequences {
                input_ids: &text,
                positions: &positions,
                cu_seqlens: &[0, text.len()],
            };
            let logits = values(&member.logits(sequences).unwrap());
            let last = &logits[logits.len() - mean.len()..];
            let total: f64 = last.iter().map(|z| f64::from(*z).exp()).sum();
            for (mean, z) in mean.iter_mut().zip(last) {
                *mean += f64::from(*z).exp() / total;
            }
        }
        let likeliest = (0..mean.len()).max_by(|&a, &b| mean[a].total_cmp(&mean[b]));
        text.push(likeliest.unwrap() as u32);
    }
    let options = GenerateOptions {
        max_new_tokens: new_tokens,
        stop_ids: Vec::new(),
    };
    let decoder = case.decoder();
    let written = |ensemble: Option<&Ensemble>| {
        let mut session = Session::new(&decoder, text.len(), ensemble).unwrap();
        let mut greedy = Sampler::new(SamplingOptions::default()).unwrap();
        let go_on = |_| ControlFlow::Continue(());
        let generated = session.write(&case.prompt, &options, &mut greedy, go_on);
        generated.unwrap().ids
    };
    let found = written(Some(&ensemble(models)));
    assert_eq!(found, text[case.prompt.len()..]);
    assert_ne!(found, written(None));
}

fn qlora(command: &str, case: &ReferenceCase, arguments: &[&str]) -> Command {
    let mut run = Command::new(assert_cmd::cargo::cargo_bin!("qlora"));
    run.arg(command).arg("--model").arg(&case.dir);
    run.args(arguments);
    run
}

/// Rows of the case, and a copy of its adapter that says how it was masked.
fn files(case: &ReferenceCase, dir: &Path) -> (String, String) {
    let rows = case.examples.iter();
    let lines =
        rows.map(|e| json!({"input_ids": e.input_ids, "labels": e.labels}).to_string() + "\n");
    let data = dir.join("rows.jsonl");
    std::fs::write(&data, lines.collect::<String>()).unwrap();
    let adapter = dir.join("adapter");
    Adapter::read(case.dir.join("adapter"))
        .unwrap()
        .write(&adapter)
        .unwrap();
    let settings = MatrixDropoutSettings {
        p: P,
        scale: MatrixDropoutScale::Inverse,
        seed: SEED,
    };
    MatrixDropoutSettings::write(Some(&settings), &adapter).unwrap();
    let text = |path: PathBuf| path.display().to_string();
    (text(data), text(adapter))
}

#[test]
fn eval_prints_each_size_and_writes_the_log_probabilities_of_the_largest() {
    let case = ReferenceCase::read("qwen3");
    let dir = tempfile::tempdir().unwrap();
    let (data, adapter) = files(&case, dir.path());
    let out = dir.path().join("out.safetensors");
    let given = ["--data", &data, "--adapter", &adapter];
    let output = qlora("eval", &case, &given)
        .args(["--ensemble", "3,1", "--json", "--logprobs"])
        .arg(&out)
        .assert()
        .success();
    let report: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    let (expected, log_probs) = evaluated(&case, &Placement::cpu(), &[1, 3]);
    let ensembles = report["ensembles"].as_array().unwrap();
    assert_eq!(ensembles.len(), 2);
    for ((found, expected), models) in ensembles.iter().zip(&expected).zip([1, 3]) {
        assert_eq!(found["models"], models);
        assert_eq!(found["loss"], expected.loss);
        assert_eq!(found["ece"], expected.ece);
    }
    // The adapter as it is comes first, under the names it always has.
    let loss = report["loss"].as_f64().unwrap();
    assert!((loss - f64::from(case.loss)).abs() < 1e-5);
    let bytes = std::fs::read(&out).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for (row, expected) in log_probs.iter().enumerate() {
        assert!(floats(&tensors, &format!("logprobs.{row}")) == *expected);
    }

    let output = qlora("eval", &case, &given)
        .args(["--ensemble", "1,3"])
        .assert()
        .success();
    let text = String::from_utf8(output.get_output().stdout.clone()).unwrap();
    let heads: Vec<&str> = text.lines().map(|line| line[..13].trim()).collect();
    assert_eq!(
        heads,
        ["", "plain adapter", "ensemble of 1", "ensemble of 3"]
    );
}

#[test]
fn an_ensemble_of_nothing_masked_is_refused_with_the_reason() {
    let case = ReferenceCase::read("qwen3");
    let dir = tempfile::tempdir().unwrap();
    let (data, adapter) = files(&case, dir.path());
    let plain = case.dir.join("adapter").display().to_string();
    for (command, of) in [
        ("eval", ["--data", &data]),
        ("generate", ["--prompt", "w1"]),
    ] {
        let refused = |arguments: &[&str]| qlora(command, &case, &of).args(arguments).assert();
        let without = refused(&["--ensemble", "2"]).code(1).stdout("");
        without.stderr(contains("--ensemble: masks an adapter; give --adapter"));
        let not_trained = refused(&["--ensemble", "2", "--adapter", &plain]).code(1);
        not_trained.stderr(
            contains(&plain)
                .and(contains("was not trained with lora_matrix_dropout"))
                .and(contains("--lora_matrix_dropout P")),
        );
        refused(&["--adapter", &adapter, "--lora_matrix_dropout", "0.5"]).code(2);
        refused(&["--adapter", &adapter, "--ensemble", "0"]).failure();
        let all = [
            "--adapter",
            &plain,
            "--ensemble",
            "2",
            "--lora_matrix_dropout",
            "1",
        ];
        refused(&all).code(1).stderr(contains("less than 1"));
    }
    // With a probability of its own, a plain adapter makes an ensemble; the file's seed and p are those of the flags.
    let run = |adapter: &str, flags: &[&str]| {
        let given = [
            "--data",
            &data,
            "--adapter",
            adapter,
            "--ensemble",
            "2",
            "--json",
        ];
        let output = qlora("eval", &case, &given).args(flags).assert().success();
        output.get_output().stdout.clone()
    };
    let flags = ["--lora_matrix_dropout", "0.3", "--ensemble_seed", "11"];
    assert!(run(&plain, &flags) == run(&adapter, &[]));
    assert!(run(&adapter, &["--ensemble_seed", "12"]) != run(&adapter, &[]));
}

#[test]
fn a_file_beside_the_adapter_that_cannot_be_is_named() {
    let case = ReferenceCase::read("qwen3");
    let dir = tempfile::tempdir().unwrap();
    let (data, adapter) = files(&case, dir.path());
    for text in [
        "{}",
        r#"{"lora_matrix_dropout": 1.0, "lora_matrix_dropout_scale": "inverse", "seed": 1}"#,
        r#"{"lora_matrix_dropout": 0.5, "lora_matrix_dropout_scale": "half", "seed": 1}"#,
        r#"{"lora_matrix_dropout": 0.5, "lora_matrix_dropout_scale": "none", "seed": 1, "more": 2}"#,
    ] {
        std::fs::write(Path::new(&adapter).join("lora_matrix_dropout.json"), text).unwrap();
        let given = ["--data", &data, "--adapter", &adapter, "--ensemble", "2"];
        let refused = qlora("eval", &case, &given).assert().code(1);
        refused.stderr(contains("lora_matrix_dropout.json: "));
    }
}
