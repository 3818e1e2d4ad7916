//! What dropout does to a small model that overfits: the demo's model, trained on a few noisy rows without dropout, with
//! dropout on the adapters' inputs, and with dropout on their matrices, which also makes an ensemble.
//!
//! ```text
//! cargo run --release --example dropout_experiment > table.md
//! ```
//!
//! A row is one of the demo's: a sentence about a shipment, and its record as JSON. Each field of a record is, by a chance of
//! [`NOISE`], that of another row, in training and held out alike, so that a model can know how sure it may be. A seed chooses
//! rows, noise, initialization, order and masks. The table has means and standard deviations over the seeds.

use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use qlora::data::{Example, SplitMix64};
use qlora::device::Placement;
use qlora::infer::{Ensemble, Evaluation, LogProbs, evaluate, evaluate_ensemble};
use qlora::quant::QuantizeOptions;
use qlora::store::{Existing, QuantizeJob, quantize};
use qlora::train::{TrainConfig, Trainer};
use serde_json::{Value, json};

const SEEDS: u64 = 5;
const TRAINING_ROWS: usize = 96;
/// The chance of a field to be that of another row.
const NOISE: f64 = 0.2;
const STEPS: i64 = 120;
const BATCH: usize = 16;
const MATRIX_DROPOUT: f64 = 0.5;
/// Sizes of the ensembles.
const MODELS: [usize; 3] = [1, 4, 8];
const FIELDS: [&str; 4] = ["who", "count", "item", "to"];

/// A way to train.
struct Method {
    name: &'static str,
    lora_dropout: f64,
    lora_matrix_dropout: f64,
}

const METHODS: [Method; 4] = [
    method("no dropout", 0.0, 0.0),
    method("`lora_dropout` 0.05", 0.05, 0.0),
    method("`lora_dropout` 0.1", 0.1, 0.0),
    method("`lora_matrix_dropout` 0.5", 0.0, MATRIX_DROPOUT),
];

const fn method(name: &'static str, lora_dropout: f64, lora_matrix_dropout: f64) -> Method {
    Method {
        name,
        lora_dropout,
        lora_matrix_dropout,
    }
}

/// A line of the table: a model's name, and what it was measured at with each seed.
struct Line {
    name: String,
    measured: Vec<Measured>,
}

/// On the training rows and on those held out.
struct Measured {
    train: Evaluation,
    heldout: Evaluation,
}

fn main() -> anyhow::Result<()> {
    let started = Instant::now();
    let dir = tempfile::tempdir()?;
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo");
    let model = dir.path().join("base-nf4");
    let job = QuantizeJob {
        source: demo.join("base"),
        destination: model.clone(),
        existing: Existing::Refuse,
        options: QuantizeOptions::default(),
        max_shard_bytes: u64::MAX,
    };
    quantize(&job, |_| ())?;
    let train_rows = read_rows(&demo.join("train.jsonl"))?;
    let heldout_rows = read_rows(&demo.join("heldout.jsonl"))?;
    let (train, heldout) = (
        dir.path().join("train.jsonl"),
        dir.path().join("heldout.jsonl"),
    );

    let mut lines: Vec<Line> = Vec::new();
    for seed in 0..SEEDS {
        let mut random = SplitMix64::new(seed);
        let chosen = &shuffled(&train_rows, &mut random)[..TRAINING_ROWS];
        write_with_noise(chosen, &mut random, &train)?;
        write_with_noise(&heldout_rows, &mut random, &heldout)?;
        for method in &METHODS {
            let config = TrainConfig {
                model_name_or_path: model.clone(),
                dataset: train.clone().into(),
                eval_dataset: Some(heldout.clone()),
                output_dir: dir.path().join("run"),
                ..config(&demo, method, seed)?
            };
            for (name, measured) in measured(config, method)? {
                eprintln!(
                    "seed {seed}, {name}: train {:.3}, held out {:.3}",
                    measured.train.loss, measured.heldout.loss
                );
                match lines.iter_mut().find(|line| line.name == name) {
                    Some(line) => line.measured.push(measured),
                    None => lines.push(Line {
                        name,
                        measured: vec![measured],
                    }),
                }
            }
        }
    }
    print_table(&lines);
    eprintln!("{:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// The demo's configuration, but for what this is about.
fn config(demo: &Path, method: &Method, seed: u64) -> anyhow::Result<TrainConfig> {
    let config = TrainConfig::load_partial(Some(&demo.join("config.toml")), &[])?;
    Ok(TrainConfig {
        lora_dropout: Some(method.lora_dropout),
        lora_matrix_dropout: Some(method.lora_matrix_dropout),
        per_device_train_batch_size: BATCH,
        max_steps: STEPS,
        seed,
        data_seed: seed,
        ..config
    })
}

/// Trains, and measures the adapter and the ensembles that its masks make.
fn measured(config: TrainConfig, method: &Method) -> anyhow::Result<Vec<(String, Measured)>> {
    let mut trainer = Trainer::new(config, &Placement::cpu())?;
    while trainer.steps_done() < trainer.total_steps() {
        trainer.step()?;
    }
    let train: Vec<Example> = trainer.data().train_examples().collect();
    let heldout = trainer.data().eval_examples();
    let heldout: Vec<Example> = heldout.context("no rows are held out")?.collect();
    let plain = |rows: &[Example]| evaluate(trainer.decoder(), rows, LogProbs::Omit, |_, _| Ok(()));
    let adapter = Measured {
        train: plain(&train)?,
        heldout: plain(&heldout)?,
    };
    let mut all = vec![(method.name.to_string(), adapter)];
    if method.lora_matrix_dropout > 0.0 {
        let largest = MODELS[MODELS.len() - 1];
        let seed = trainer.config().seed;
        let ensemble = Ensemble::new(method.lora_matrix_dropout, seed, largest)?;
        let of_ensemble = |rows: &[Example]| {
            let of = (&ensemble, &MODELS[..]);
            let decoder = trainer.decoder();
            evaluate_ensemble(decoder, of, rows, LogProbs::Omit, |_, _| Ok(()))
        };
        let measures = of_ensemble(&train)?.into_iter().zip(of_ensemble(&heldout)?);
        for ((train, heldout), models) in measures.zip(MODELS) {
            let name = format!("{}, ensemble of {models}", method.name);
            all.push((name, Measured { train, heldout }));
        }
    }
    Ok(all)
}

/// The conversations of a file of the demo.
fn read_rows(path: &Path) -> anyhow::Result<Vec<Value>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let rows = text.lines().map(serde_json::from_str);
    rows.collect::<Result<_, _>>()
        .with_context(|| path.display().to_string())
}

fn shuffled(rows: &[Value], random: &mut SplitMix64) -> Vec<Value> {
    let mut rows = rows.to_vec();
    for i in (1..rows.len()).rev() {
        let j = (random.uniform() * (i + 1) as f64) as usize;
        rows.swap(i, j);
    }
    rows
}

/// Writes the rows with fields of their records replaced by chance.
fn write_with_noise(rows: &[Value], random: &mut SplitMix64, path: &Path) -> anyhow::Result<()> {
    let records: Vec<Value> = rows.iter().map(record).collect();
    let mut text = String::new();
    for (row, record) in rows.iter().zip(&records) {
        let mut record = record.clone();
        for field in FIELDS {
            if random.uniform() < NOISE {
                let other = (random.uniform() * records.len() as f64) as usize;
                record[field] = records[other][field].clone();
            }
        }
        let answer = json!({"role": "assistant", "content": record.to_string()});
        let row = json!({"messages": [row["messages"][0], answer]});
        text += &format!("{row}\n");
    }
    std::fs::write(path, text).with_context(|| path.display().to_string())
}

/// The record that a row's answer is.
fn record(row: &Value) -> Value {
    let answer = row["messages"][1]["content"].as_str().unwrap_or_default();
    serde_json::from_str(answer).unwrap_or_default()
}

fn print_table(lines: &[Line]) {
    println!("| | training loss | held-out loss | held-out accuracy | held-out ECE |");
    println!("|---|---|---|---|---|");
    for Line { name, measured } in lines {
        let cell = |value: &dyn Fn(&Measured) -> f64| {
            let values: Vec<f64> = measured.iter().map(value).collect();
            let n = values.len() as f64;
            let mean = values.iter().sum::<f64>() / n;
            let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
            format!("{mean:.3} ± {:.3}", (squares / (n - 1.0)).sqrt())
        };
        println!(
            "| {name} | {} | {} | {} | {} |",
            cell(&|m| m.train.loss),
            cell(&|m| m.heldout.loss),
            cell(&|m| m.heldout.token_accuracy),
            cell(&|m| m.heldout.ece),
        );
    }
}
