//! `qlora eval`: how well a model, with or without an adapter, predicts the rows of a data file.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::builder::RangedU64ValueParser;
use indicatif::{ProgressBar, ProgressStyle};
use qlora::data::{DatasetFormat, LoadOptions, TrainOnSource, Unlabelled, data_files, load_files};
use qlora::infer::{Evaluation, LogProbs, evaluate};
use qlora::store::AtomicFile;
use safetensors::tensor::{Dtype, TensorView};

use super::ModelArgs;

/// The arguments of `qlora eval`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// Rows to predict: what `train` takes as a data set; rows with `input_ids` are taken as they are
    #[arg(long, value_name = "DATA")]
    data: PathBuf,

    /// Write the log-probability of every token: f32 [T-1] per row i, named logprobs.i
    #[arg(long, value_name = "OUT.safetensors")]
    logprobs: Option<PathBuf>,

    /// What a row looks like; seen from the first row if not given
    #[arg(
        long = "dataset_format",
        alias = "dataset-format",
        value_name = "FORMAT"
    )]
    dataset_format: Option<DatasetFormat>,

    /// Cut rows after this many tokens
    #[arg(long = "max_seq_len", alias = "max-seq-len", value_name = "N")]
    max_seq_len: Option<usize>,

    /// Cut the source of rows with a source and a target
    #[arg(
        long = "source_max_len",
        alias = "source-max-len",
        value_name = "N",
        default_value_t = LoadOptions::default().source_max_len
    )]
    source_max_len: usize,

    /// Cut the target of rows with a source and a target; 256 if not given, and 128 for super-natural-instructions
    #[arg(long = "target_max_len", alias = "target-max-len", value_name = "N")]
    target_max_len: Option<usize>,

    /// Count the loss of the source too
    #[arg(long = "train_on_source", alias = "train-on-source", num_args = 0..=1, default_missing_value = "true", default_value_t = false)]
    train_on_source: bool,

    /// Evaluate only the first rows
    #[arg(
        long = "max_eval_samples",
        alias = "max-eval-samples",
        value_name = "N",
        value_parser = RangedU64ValueParser::<usize>::new().range(1..)
    )]
    max_eval_samples: Option<usize>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    // First, so that a path that cannot be written costs no evaluation.
    let log_probs_file = args.logprobs.as_ref().map(AtomicFile::create).transpose()?;
    let model = args.model.load()?;
    let options = LoadOptions {
        format: args.dataset_format,
        source_max_len: args.source_max_len,
        target_max_len: args.target_max_len,
        max_seq_len: args.max_seq_len,
        train_on_source: TrainOnSource::from(args.train_on_source),
        max_samples: args.max_eval_samples,
        vocab_size: Some(model.config().vocab_size),
        // Example i has to stay row i of the file.
        unlabelled: Unlabelled::Keep,
        ..LoadOptions::default()
    };
    let tokenizer = args.model.tokenizer()?;
    let files = data_files(super::data_sources::resolve(&args.data)?)?;
    let dataset = load_files(&files, &options, tokenizer.as_ref())?;
    eprintln!(
        "{}: {} rows, {}",
        args.data.display(),
        dataset.len(),
        dataset.detected
    );

    let wanted = match args.logprobs {
        Some(_) => LogProbs::EveryToken,
        None => LogProbs::Omit,
    };
    let progress = ProgressBar::new(dataset.len() as u64).with_style(ProgressStyle::with_template(
        "{bar:40} {pos}/{len} rows, {eta} left",
    )?);
    let mut log_probs = BTreeMap::new();
    let evaluation = evaluate(&model, dataset.examples(), wanted, |row, row_log_probs| {
        log_probs.extend(row_log_probs.map(|values| (format!("logprobs.{row}"), values)));
        progress.inc(1);
        Ok(())
    })
    .with_context(|| args.data.display().to_string())?;
    progress.finish_and_clear();
    if let Some(file) = log_probs_file {
        let path = file.path().display().to_string();
        write_log_probs(file, &log_probs)?;
        eprintln!("log-probabilities: {path}");
    }
    if args.json {
        println!("{}", serde_json::to_string(&evaluation)?);
    } else {
        print_table(&evaluation);
    }
    Ok(())
}

fn write_log_probs(mut file: AtomicFile, rows: &BTreeMap<String, Vec<f32>>) -> anyhow::Result<()> {
    let views = rows
        .iter()
        .map(|(name, values)| {
            let bytes = bytemuck::cast_slice(values);
            Ok((
                name,
                TensorView::new(Dtype::F32, vec![values.len()], bytes)?,
            ))
        })
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    let path = file.path().display().to_string();
    file.write_all(&safetensors::serialize(views, None)?)
        .context(path)?;
    Ok(file.commit()?)
}

fn print_table(evaluation: &Evaluation) {
    println!("loss            {:.6}", evaluation.loss);
    println!("perplexity      {:.4}", evaluation.perplexity);
    println!("token_accuracy  {:.4}", evaluation.token_accuracy);
    println!("ece             {:.4}", evaluation.ece);
    println!("tokens          {}", evaluation.tokens);
}
