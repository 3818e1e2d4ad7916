//! `qlora eval`: how well a model, with or without an adapter, predicts the rows of a data file and answers the questions of
//! MMLU.

mod mmlu;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::ArgGroup;
use clap::builder::RangedU64ValueParser;
use indicatif::{ProgressBar, ProgressStyle};
use qlora::data::Dataset;
use qlora::infer::{Evaluation, LogProbs, evaluate, evaluate_ensemble};
use qlora::model::Decoder;
use qlora::store::AtomicFile;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value};

use self::mmlu::{MmluArgs, Questions};
use super::{EnsembleArgs, ModelArgs, RowFlags};

/// The arguments of `qlora eval`.
#[derive(Debug, clap::Args)]
#[command(group(ArgGroup::new("rows").args(["data", "mmlu"]).required(true).multiple(true)))]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// Rows to predict: what `train` takes as a data set; rows with `input_ids` are taken as they are
    #[arg(long, value_name = "DATA")]
    data: Option<PathBuf>,

    #[command(flatten)]
    mmlu: MmluArgs,

    /// Write the log-probability of every token of --data: f32 [T-1] per row i, named logprobs.i
    #[arg(long, value_name = "OUT.safetensors", requires = "data")]
    logprobs: Option<PathBuf>,

    /// Also evaluate ensembles of N models with masked adapters (LoRA Dropout), such as 1,4,8; --logprobs has those of the
    /// largest
    #[arg(
        long,
        value_name = "N,N",
        value_delimiter = ',',
        value_parser = RangedU64ValueParser::<usize>::new().range(1..)
    )]
    ensemble: Vec<usize>,

    #[command(flatten)]
    masks: EnsembleArgs,

    #[command(flatten)]
    of_rows: RowFlags,

    /// Evaluate only the first rows, and of each file of MMLU the first questions
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

pub fn run(mut args: Args) -> anyhow::Result<()> {
    // First, so that a path that cannot be written costs no evaluation.
    let log_probs_file = args.logprobs.as_ref().map(AtomicFile::create).transpose()?;
    args.model.find()?;
    let sizes = ensemble_sizes(&args.ensemble);
    let ensemble = sizes.last().map(|&models| {
        let adapter = args.model.adapter.as_deref();
        args.masks.ensemble(adapter, models)
    });
    let ensemble = ensemble.transpose()?;
    let tokenizer = || args.model.tokenizer();
    let questions = args.mmlu.read(args.max_eval_samples, tokenizer)?;
    let model = args.model.load()?;
    let data = args.data.as_deref();
    let dataset = data.map(|path| rows(&args, path, &model)).transpose()?;
    let (plain, of_ensemble) = match (&args.logprobs, &ensemble) {
        (None, _) => (LogProbs::Omit, LogProbs::Omit),
        (Some(_), None) => (LogProbs::EveryToken, LogProbs::Omit),
        (Some(_), Some(_)) => (LogProbs::Omit, LogProbs::EveryToken),
    };
    let passes = 1 + u64::from(ensemble.is_some());
    let rows =
        dataset.as_ref().map_or(0, Dataset::len) + questions.as_ref().map_or(0, Questions::len);
    let progress = ProgressBar::new(passes * rows as u64).with_style(ProgressStyle::with_template(
        "{bar:40} {pos}/{len} rows, {eta} left",
    )?);
    let mut log_probs = BTreeMap::new();
    let mut on_row = |row, row_log_probs: Option<Vec<f32>>| {
        log_probs.extend(row_log_probs.map(|values| (format!("logprobs.{row}"), values)));
        progress.inc(1);
        Ok(())
    };
    let on_answers = |answers| progress.inc(answers as u64);
    let name = || data.map_or_else(String::new, |path| path.display().to_string());
    // The adapter as it is, then the ensembles.
    let mut of_models = vec![Measures::default()];
    if let Some(dataset) = &dataset {
        let found = evaluate(&model, dataset.examples(), plain, &mut on_row);
        of_models[0].data = Some(found.with_context(name)?);
    }
    if let Some(questions) = &questions {
        of_models[0].mmlu = questions.measure(&model, on_answers)?;
    }
    if let Some(ensemble) = &ensemble {
        let of = (ensemble, &sizes[..]);
        let mut of_sizes: Vec<_> = sizes.iter().map(|&models| Measures::of(models)).collect();
        if let Some(dataset) = &dataset {
            let found = evaluate_ensemble(&model, of, dataset.examples(), of_ensemble, &mut on_row);
            for (measures, found) in of_sizes.iter_mut().zip(found.with_context(name)?) {
                measures.data = Some(found);
            }
        }
        if let Some(questions) = &questions {
            let found = questions.measure_ensemble(&model, of, on_answers)?;
            for (measures, found) in of_sizes.iter_mut().zip(found) {
                measures.mmlu = found;
            }
        }
        of_models.extend(of_sizes);
    }
    progress.finish_and_clear();
    if let Some(file) = log_probs_file {
        let path = file.path().display().to_string();
        write_log_probs(file, &log_probs)?;
        eprintln!("log-probabilities: {path}");
    }
    if args.json {
        outln!("{}", report(&of_models)?);
    } else {
        print(of_models);
    }
    Ok(())
}

/// What was measured of one model.
#[derive(Default)]
struct Measures {
    /// Models of an ensemble; `None` for the adapter as it is.
    models: Option<usize>,
    data: Option<Evaluation>,
    /// By name; empty without `--mmlu`.
    mmlu: Map<String, Value>,
}

impl Measures {
    fn of(models: usize) -> Self {
        Self {
            models: Some(models),
            ..Self::default()
        }
    }

    fn name(&self) -> String {
        match self.models {
            None => "plain adapter".to_string(),
            Some(models) => format!("ensemble of {models}"),
        }
    }

    fn report(&self) -> serde_json::Result<Map<String, Value>> {
        let mut report = Map::new();
        if let Some(Value::Object(data)) = self.data.map(serde_json::to_value).transpose()? {
            report.extend(data);
        }
        report.extend(self.mmlu.clone());
        report.extend(
            self.models
                .map(|models| ("models".to_string(), models.into())),
        );
        Ok(report)
    }
}

/// Each size once, in ascending order.
fn ensemble_sizes(given: &[usize]) -> Vec<usize> {
    let mut sizes = given.to_vec();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

fn rows(args: &Args, path: &Path, model: &Decoder) -> anyhow::Result<Dataset> {
    let vocab_size = model.config().vocab_size;
    let tokenizer = args.model.tokenizer()?;
    let dataset = args
        .of_rows
        .load(path, args.max_eval_samples, tokenizer, vocab_size)?;
    eprintln!(
        "{}: {} rows, {}",
        path.display(),
        dataset.len(),
        dataset.detected
    );
    Ok(dataset)
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

/// The measures of the adapter as it is, and under `ensembles` those of each size.
fn report(of_models: &[Measures]) -> serde_json::Result<Value> {
    let mut reports = of_models.iter().map(Measures::report);
    let mut report = reports.next().transpose()?.unwrap_or_default();
    let ensembles: Vec<_> = reports.collect::<serde_json::Result<_>>()?;
    if !ensembles.is_empty() {
        report.insert("ensembles".into(), ensembles.into());
    }
    Ok(report.into())
}

fn print(of_models: Vec<Measures>) {
    let data = of_models
        .iter()
        .filter_map(|model| Some((model.name(), model.data?)));
    match &data.collect::<Vec<_>>()[..] {
        [] => {}
        [(_, evaluation)] => print_measures(evaluation),
        several => print_table(several),
    }
    let mmlu = of_models
        .into_iter()
        .map(|model| (model.name(), model.mmlu));
    mmlu::print_table(&mmlu.collect::<Vec<_>>());
}

fn print_measures(evaluation: &Evaluation) {
    outln!("loss            {:.6}", evaluation.loss);
    outln!("perplexity      {:.4}", evaluation.perplexity);
    outln!("token_accuracy  {:.4}", evaluation.token_accuracy);
    outln!("ece             {:.4}", evaluation.ece);
    outln!("tokens          {}", evaluation.tokens);
}

fn print_table(of_models: &[(String, Evaluation)]) {
    outln!(
        "{:<14}{:>10}{:>12}{:>16}{:>8}{:>10}",
        "",
        "loss",
        "perplexity",
        "token_accuracy",
        "ece",
        "tokens"
    );
    for (name, evaluation) in of_models {
        let Evaluation {
            loss,
            perplexity,
            token_accuracy,
            ece,
            tokens,
        } = evaluation;
        outln!(
            "{name:<14}{loss:>10.6}{perplexity:>12.4}{token_accuracy:>16.4}{ece:>8.4}{tokens:>10}"
        );
    }
}
