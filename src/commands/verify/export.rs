//! `qlora verify export`: whether an exported model predicts what the model with its adapter predicts.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::builder::RangedU64ValueParser;
use qlora::IGNORE_INDEX;
use qlora::data::{Example, LoadOptions, SplitMix64, Unlabelled, data_files, load_files};
use qlora::infer::{Agreement, agreement};
use qlora::model::Decoder;
use qlora::store::Checkpoint;
use serde_json::json;

use crate::commands::{ModelArgs, data_sources};

/// Rows of random tokens, where no data is given.
const RANDOM_ROWS: usize = 4;
const RANDOM_ROW_TOKENS: usize = 64;

/// An export may be this far from the model with its adapter, as a share of how far that is from the model without it.
const KEPT_KL_SHARE: f64 = 0.5;
/// Or this far, in nats: where an adapter changes next to nothing, rounding changes more.
const KEPT_KL: f64 = 1e-3;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model directory that `qlora export` wrote
    #[arg(value_name = "EXPORTED")]
    exported: PathBuf,

    #[command(flatten)]
    model: ModelArgs,

    /// Rows to compare on: what `train` takes as a data set; unset: random tokens
    #[arg(long, value_name = "DATA")]
    data: Option<PathBuf>,

    /// Take only the first rows of --data
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    rows: usize,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    if args.model.adapter.is_none() {
        bail!("give --adapter, the one that was exported");
    }
    if args.exported.is_file() {
        bail!(
            "{}: is a file; only model directories are read again",
            args.exported.display()
        );
    }
    let reference = args.model.load()?;
    let without = args.model.load_base(reference.placement())?;
    let checkpoint = Checkpoint::open(&args.exported)?;
    let exported = Decoder::load(&checkpoint, None, reference.placement())?;
    let rows = rows(&args, &reference)?;
    let found = agreement(&reference, [&exported, &without], rows);
    let [exported, without] = found.with_context(|| args.exported.display().to_string())?;
    // Not where it is NaN.
    let is_kept = exported.kl <= KEPT_KL.max(KEPT_KL_SHARE * without.kl);
    if args.json {
        let report = json!({ "exported": exported, "without_adapter": without, "same": is_kept });
        println!("{report}");
    } else {
        print(&exported, &without);
    }
    match is_kept {
        true => Ok(()),
        false => bail!(
            "{}: does not predict what {} with {} does",
            args.exported.display(),
            args.model.model.display(),
            args.model.adapter.unwrap_or_default().display()
        ),
    }
}

fn print(exported: &Agreement, without: &Agreement) {
    println!(
        "{:<26}{:>14}{:>18}{:>26}",
        "", "KL (nats)", "same top token", "largest logit difference"
    );
    for (name, agreement) in [("exported", exported), ("model without adapter", without)] {
        println!(
            "{name:<26}{:>14.6}{:>16.2} %{:>26.4}",
            agreement.kl,
            100.0 * agreement.same_top_token,
            agreement.largest_logit_difference
        );
    }
    println!(
        "from the model with its adapter, over {} tokens",
        exported.tokens
    );
}

fn rows(args: &Args, model: &Decoder) -> anyhow::Result<Vec<Example>> {
    let vocab_size = model.config().vocab_size;
    let Some(data) = &args.data else {
        return Ok(random_rows(vocab_size));
    };
    let options = LoadOptions {
        max_samples: Some(args.rows),
        vocab_size: Some(vocab_size),
        unlabelled: Unlabelled::Keep,
        ..LoadOptions::default()
    };
    let files = data_files(data_sources::resolve(data)?)?;
    let dataset = load_files(&files, &options, args.model.tokenizer()?.as_ref())?;
    Ok(dataset.examples().collect())
}

fn random_rows(vocab_size: usize) -> Vec<Example> {
    let mut random = SplitMix64::new(0);
    let row = |line| Example {
        input_ids: (0..RANDOM_ROW_TOKENS)
            .map(|_| random.below(vocab_size as u64) as u32)
            .collect(),
        labels: vec![IGNORE_INDEX; RANDOM_ROW_TOKENS],
        line,
    };
    (1..=RANDOM_ROWS).map(row).collect()
}
