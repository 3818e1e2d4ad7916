//! `qlora demo`: the whole job on a small model of our own, offline: quantize, train, export, and ask before and after.
//!
//! It calls what `qlora quantize`, `qlora train`, `qlora export` and `qlora generate` call. The model, the rows and the configuration are
//! those of `examples/demo`, which are part of the program.

mod answers;
mod files;
mod loss_curve;
mod report;

use std::path::{Path, PathBuf};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use qlora::data::Tokenizer;
use qlora::device::{DeviceKind, Placement};
use qlora::export::Merged;
use qlora::model::Decoder;
use qlora::quant::QuantizeOptions;
use qlora::store::{Adapter, Checkpoint, Existing, QuantizeJob, WriteReport, quantize};
use qlora::train::{Outcome, TrainConfig, Trainer};

use super::Interrupted;
use answers::{Question, answer_all};
use files::DemoFiles;
use report::{Report, Training};

/// The arguments of `qlora demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to write the model, the adapter and the report
    #[arg(long, value_name = "DIR", default_value = "qlora-demo")]
    out: PathBuf,

    /// cpu or cuda
    #[arg(long, value_name = "NAME", default_value = "cpu", value_parser = super::model_args::parse_device)]
    device: DeviceKind,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let started = Instant::now();
    let placement = Placement::open(args.device, None)?;
    let files = DemoFiles::write(&args.out)?;
    let quantized = quantize_base(&files)?;

    let tokenizer = Tokenizer::from_dir(&files.quantized)?;
    let questions = Question::read_all(&files.heldout)?;
    let mut model = Decoder::load(&Checkpoint::open(&files.quantized)?, None, &placement)?;
    let before = answer_all(&model, &tokenizer, &questions, "asking before")?;

    let training = train(&files, args.device, &placement)?;

    model.load_adapter(&Adapter::read(&files.adapter)?)?;
    let after = answer_all(&model, &tokenizer, &questions, "asking after")?;

    export(&files)?;
    let exported = Decoder::load(&Checkpoint::open(&files.merged)?, None, &placement)?;
    let of_export = answer_all(&exported, &tokenizer, &questions, "asking the export")?;

    let loss_curve = args.out.join("loss.svg");
    loss_curve::write(&loss_curve, &training)?;
    let report = Report {
        questions: &questions,
        before: &before,
        after: &after,
        exported: &of_export,
        quantized,
        training: &training,
        files: &files,
        loss_curve: &loss_curve,
        seconds: started.elapsed().as_secs_f64(),
    };
    let path = args.out.join("report.md");
    report.write_markdown(&path)?;
    if args.json {
        outln!("{}", report.json(&path));
    } else {
        out!("{}", report.text(&path));
    }
    Ok(())
}

fn quantize_base(files: &DemoFiles) -> anyhow::Result<WriteReport> {
    let job = QuantizeJob {
        source: files.base.clone(),
        destination: files.quantized.clone(),
        existing: Existing::Replace,
        options: QuantizeOptions::default(),
        max_shard_bytes: u64::MAX,
    };
    eprintln!(
        "quantizing {} to NF4 with double quantization",
        job.source.display()
    );
    Ok(quantize(&job, |_| ())?)
}

/// Runs `qlora train` with the files' configuration.
fn train(files: &DemoFiles, device: DeviceKind, placement: &Placement) -> anyhow::Result<Training> {
    let text = |path: &Path| path.display().to_string();
    let overrides = [
        ("model_name_or_path", text(&files.quantized)),
        ("dataset", text(&files.train)),
        ("eval_dataset", text(&files.heldout)),
        ("output_dir", text(&files.adapter)),
        ("device", device.name().to_string()),
    ]
    .map(|(key, value)| (key.to_string(), value));
    let config = TrainConfig::load(Some(&files.config), &overrides)?;
    let mut trainer = Trainer::new(config, placement)?;
    let started = Instant::now();
    if let Outcome::Stopped(checkpoint) = super::train::train(&mut trainer)? {
        return Err(Interrupted(format!("; saved {}", checkpoint.display())).into());
    }
    let seconds = started.elapsed().as_secs_f64();
    Training::read(&files.adapter.join("metrics.jsonl"), seconds)
}

/// Merges the adapter into the 4-bit model, as `qlora export --to merged`.
fn export(files: &DemoFiles) -> anyhow::Result<()> {
    let (checkpoint, adapter) = (
        Checkpoint::open(&files.quantized)?,
        Adapter::read(&files.adapter)?,
    );
    let merged = Merged::new(checkpoint, Some(&adapter), None, None)?;
    let dir = merged.model_dir(&files.merged, Existing::Replace, u64::MAX);
    dir.write(&merged, None, |_| ())?;
    Ok(())
}

fn progress_bar(length: usize, message: &'static str) -> anyhow::Result<ProgressBar> {
    let style = ProgressStyle::with_template("{msg:24} {bar:40} {pos}/{len}, {eta} left")?;
    Ok(ProgressBar::new(length as u64)
        .with_style(style)
        .with_message(message))
}
