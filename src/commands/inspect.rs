//! `qlora inspect`: what is in a data file, a model or an adapter.
//!
//! A data file is shown as training would see it: token ids, and which of them carry loss.

mod dataset;
mod weights;

use std::io::{BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use qlora::data::{Dataset, DatasetFormat, LoadOptions, Tokenizer, load};
use serde_json::{Value, json};

use dataset::{Marks, View};

/// How many rows are shown when nothing is said.
const DEFAULT_ROWS: usize = 3;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A data file (.jsonl or .json), a model directory or an adapter directory
    #[arg(value_name = "PATH")]
    path: PathBuf,

    /// Model directory whose tokenizer and chat template a data file is read with
    #[arg(
        long,
        value_name = "DIR",
        alias = "model-name-or-path",
        alias = "model_name_or_path"
    )]
    model: Option<PathBuf>,

    /// Format of the data file: tokenized, alpaca, input-output or messages; detected if not given
    #[arg(
        long = "dataset_format",
        value_name = "FORMAT",
        alias = "dataset-format"
    )]
    dataset_format: Option<DatasetFormat>,

    /// Cut rows to this many tokens
    #[arg(long = "max_seq_len", value_name = "N", alias = "max-seq-len")]
    max_seq_len: Option<usize>,

    /// Cut the source of alpaca and input-output rows
    #[arg(long = "source_max_len", value_name = "N", alias = "source-max-len", default_value_t = LoadOptions::default().source_max_len)]
    source_max_len: usize,

    /// Cut the target of alpaca and input-output rows
    #[arg(long = "target_max_len", value_name = "N", alias = "target-max-len", default_value_t = LoadOptions::default().target_max_len)]
    target_max_len: usize,

    /// Loss on the source too
    #[arg(long = "train_on_source", alias = "train-on-source", num_args = 0..=1, value_name = "BOOL", default_missing_value = "true", default_value_t = false, hide_possible_values = true)]
    train_on_source: bool,

    /// Rows to show [default: 3, or all with --json]
    #[arg(long, value_name = "N")]
    rows: Option<usize>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    if args.path.is_dir() {
        let contents = weights::Contents::read(&args.path)?;
        return if args.json {
            print_json(&contents.json())
        } else {
            print_text(&contents.text())
        };
    }
    if args.path.extension().is_some_and(|e| e == "safetensors") {
        bail!("{}: give the directory it lies in", args.path.display());
    }
    inspect_dataset(&args)
}

fn inspect_dataset(args: &Args) -> anyhow::Result<()> {
    let tokenizer = args.model.as_ref().map(Tokenizer::from_dir).transpose()?;
    let options = LoadOptions {
        format: args.dataset_format,
        source_max_len: args.source_max_len,
        target_max_len: args.target_max_len,
        max_seq_len: args.max_seq_len,
        train_on_source: args.train_on_source.into(),
        vocab_size: args.model.as_deref().map(vocab_size).transpose()?.flatten(),
        ..LoadOptions::default()
    };
    let dataset = load(&args.path, &options, tokenizer.as_ref())?;
    if args.json {
        let rows = args.rows.unwrap_or(usize::MAX);
        return print_json(&dataset_json(&args.path, &dataset, rows));
    }
    let view = View {
        path: &args.path,
        dataset: &dataset,
        tokenizer: tokenizer.as_ref(),
        max_seq_len: args.max_seq_len,
        rows: args.rows.unwrap_or(DEFAULT_ROWS),
        marks: marks(),
    };
    print_text(&view.to_string())
}

/// Colours on a terminal unless `NO_COLOR` is set to anything (no-color.org).
fn marks() -> Marks {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if std::io::stdout().is_terminal() && !no_color {
        Marks::Colours
    } else {
        Marks::Quotes
    }
}

/// The model's own number of embeddings; `None` for a directory that has a tokenizer only.
fn vocab_size(model: &Path) -> anyhow::Result<Option<usize>> {
    let path = model.join("config.json");
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let config: Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    let vocab_size = config["vocab_size"].as_u64();
    Ok(vocab_size.and_then(|size| usize::try_from(size).ok()))
}

fn dataset_json(path: &Path, dataset: &Dataset, rows: usize) -> Value {
    let examples = dataset.examples.iter().take(rows);
    let rows: Vec<Value> = examples
        .map(|example| json!({"input_ids": example.input_ids, "labels": example.labels}))
        .collect();
    json!({
        "path": path,
        "dataset_format": dataset.format,
        "detected": dataset.detected,
        "stats": dataset.stats,
        "rows": rows,
    })
}

fn print_json(value: &Value) -> anyhow::Result<()> {
    let mut out = BufWriter::new(std::io::stdout().lock());
    serde_json::to_writer(&mut out, value)?;
    writeln!(out)?;
    Ok(out.flush()?)
}

fn print_text(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}
