//! `qlora verify`: whether what a run left can be made again, bit for bit, and whether what was exported predicts the same.

mod export;

use std::path::PathBuf;

use anyhow::bail;
use clap::builder::RangedU64ValueParser;
use qlora::train::{ReplayOptions, ReplayReport, TrainConfig, replay};

/// The arguments of `qlora verify`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Do steps of a run again from a checkpoint and compare records and tensors
    Run(RunArgs),
    /// Hold the predictions of an exported model against those of the model with its adapter
    Export(Box<export::Args>),
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    /// Run directory of `qlora train`
    dir: PathBuf,

    /// Checkpoint to begin at; unset: the newest one that has another after it, or the start of the run
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,

    /// Optimizer steps to do; unset: up to the next checkpoint
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    steps: Option<usize>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// `threads`: instead of what the configuration of the run says.
pub fn run(args: Args, threads: Option<usize>) -> anyhow::Result<()> {
    let args = match args.what {
        What::Run(args) => args,
        What::Export(args) => return super::on_threads(threads, || export::run(*args)),
    };
    let dir = ("output_dir".to_string(), args.dir.display().to_string());
    let config = TrainConfig::load(Some(&args.dir.join("config.toml")), &[dir])?;
    super::on_threads(threads.or(config.threads), || verify(args, config))
}

fn verify(args: RunArgs, mut config: TrainConfig) -> anyhow::Result<()> {
    super::models::restore(&mut config)?;
    if !config.model_name_or_path.exists() {
        bail!(
            "{}: its model, {}, is not there from here; start in the directory that the run was started in",
            args.dir.display(),
            config.model_name_or_path.display()
        );
    }
    let placement = super::open(config.device, config.compute_dtype)?;
    let options = ReplayOptions {
        checkpoint: args.checkpoint,
        steps: args.steps,
    };
    let report = replay(config, &options, &placement)?;
    if args.json {
        outln!("{}", serde_json::to_string(&report)?);
    } else {
        outln!("{}", told(&report));
    }
    match report.differences.len() {
        0 => Ok(()),
        1 => bail!("the replay differs in one place"),
        count => bail!("the replay differs in {count} places"),
    }
}

fn told(report: &ReplayReport) -> String {
    let from = match &report.from {
        Some(checkpoint) => checkpoint.display().to_string(),
        None => "the start".to_string(),
    };
    let mut lines = vec![format!(
        "steps {} to {} from {from}: {} records and {} tensors compared",
        report.first_step, report.last_step, report.records, report.tensors
    )];
    lines.extend(report.differences.clone());
    if report.differences.is_empty() {
        lines.push("the same bits".to_string());
    }
    lines.join("\n")
}
