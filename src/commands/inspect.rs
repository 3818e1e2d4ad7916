//! `qlora inspect`: what is in a data file, a model, an adapter or a GGUF file.
//!
//! A data file is shown as training would see it: token ids, and which of them carry loss.

mod approximation;
mod dataset;
mod html;
mod weights;

use std::io::{BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use qlora::data::{Tokenizer, data_files};
use qlora::store::{ADAPTER_CONFIG_FILE, AtomicFile, text_config};
use qlora::train::{BatchPlan, RunData, TrainConfig};
use serde_json::Value;

use super::{DataFlags, models};
use approximation::Approximation;
use dataset::{Marks, View};

/// How many rows are shown when nothing is said.
const DEFAULT_ROWS: usize = 3;
const DEFAULT_HTML_ROWS: usize = 100;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Data as `train` takes it (a file, a directory of files, a name), a model or adapter directory, or a GGUF file
    #[arg(value_name = "PATH")]
    path: PathBuf,

    /// Model whose tokenizer and chat template a data file is read with, its directory or its name on the Hugging Face hub
    #[arg(
        long,
        value_name = "DIR",
        alias = "model-name-or-path",
        alias = "model_name_or_path"
    )]
    model: Option<PathBuf>,

    /// Rows to show [default: 3; 100 with --html, all with --json]
    #[arg(long, value_name = "N")]
    rows: Option<usize>,

    /// Of a 4-bit model: the model it was made of, a directory or a name on the hub, to say how far its weights are from that
    #[arg(long, value_name = "DIR", conflicts_with_all = ["model", "rows", "html"])]
    original: Option<PathBuf>,

    /// With --original: take the 4-bit weights together with this adapter
    #[arg(long, value_name = "DIR", requires = "original")]
    adapter: Option<PathBuf>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,

    /// Write a page for the browser instead
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    html: Option<PathBuf>,

    #[command(flatten)]
    data: DataFlags,
}

pub fn run(mut args: Args) -> anyhow::Result<()> {
    if let Some(model) = &mut args.model {
        *model = models::tokenizer_dir(model)?;
    }
    if let Some(original) = &args.original {
        let original = models::model_dir(original)?;
        let adapter = args.adapter.as_deref().map(models::adapter_dir);
        let adapter = adapter.transpose()?;
        let measured = Approximation::measure(&args.path, &original, adapter.as_deref())?;
        return if args.json {
            print_json(&measured.json())
        } else {
            print_text(&measured.text())
        };
    }
    let has = |name: &str| args.path.join(name).exists();
    let is_weights = weights::is_gguf(&args.path) || has("config.json") || has(ADAPTER_CONFIG_FILE);
    if is_weights || (args.path.is_dir() && data_files(&args.path).is_err()) {
        if args.html.is_some() {
            bail!("--html is for data, which {} is not", args.path.display());
        }
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
    let mut config = TrainConfig::load_partial(None, &args.data.overrides)?;
    config.dataset = args.path.clone().into();
    super::data_sources::prepare(&mut config)?;
    let mut tokenizer = args.model.as_ref().map(Tokenizer::from_dir).transpose()?;
    if let Some(tokenizer) = &mut tokenizer {
        config.settle_date(tokenizer);
    }
    let vocab_size = args.model.as_deref().map(vocab_size).transpose()?.flatten();
    let data = RunData::load(&config, tokenizer.as_ref(), vocab_size)?;
    let plan = BatchPlan::of(&data, &config);
    let view = |rows: usize| View {
        path: &args.path,
        data: &data,
        plan: &plan,
        tokenizer: tokenizer.as_ref(),
        config: &config,
        rows: args.rows.unwrap_or(rows),
    };
    if let Some(path) = &args.html {
        AtomicFile::write(path, html::page(&view(DEFAULT_HTML_ROWS)))?;
        return print_text(&format!("{}\n", path.display()));
    }
    if args.json {
        return print_json(&view(usize::MAX).json());
    }
    print_text(&view(DEFAULT_ROWS).text(marks()))
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
    let vocab_size = text_config(&config)["vocab_size"].as_u64();
    Ok(vocab_size.and_then(|size| usize::try_from(size).ok()))
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
