//! `qlora verify export`: whether an exported model predicts what the model with its adapter predicts.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::builder::RangedU64ValueParser;
use qlora::IGNORE_INDEX;
use qlora::data::{Example, SplitMix64};
use qlora::device::Placement;
use qlora::export::{GgufBase, GgufModel, config_in_llama_cpp, is_gguf_adapter, read_gguf_adapter};
use qlora::infer::{Agreement, agreement};
use qlora::model::Decoder;
use qlora::store::{Checkpoint, GgufFile};
use serde_json::json;

use crate::commands::export::{GGUF_FILE, MODELFILE};
use crate::commands::{ModelArgs, RowFlags, note};

/// Rows of random tokens, where no data is given.
const RANDOM_ROWS: usize = 4;
const RANDOM_ROW_TOKENS: usize = 64;

/// An export may be this far from the model with its adapter, as a share of how far that is from the model without it.
const KEPT_KL_SHARE: f64 = 0.5;
/// Below this, in nats, an adapter changes nothing that could be kept: then only rounding is looked at.
const NO_CHANGE_KL: f64 = 1e-9;
/// What rounding may do, in nats.
const ROUNDING_KL: f64 = 1e-3;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What `qlora export` wrote: a model directory or a GGUF file, of whatever type llama.cpp has made of it
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

    #[command(flatten)]
    of_rows: RowFlags,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(mut args: Args) -> anyhow::Result<()> {
    if args.model.adapter.is_none() {
        bail!("give --adapter, the one that was exported");
    }
    args.model.find()?;
    let reference = args.model.load()?;
    let without = args.model.load_base(reference.placement())?;
    let (exported, differences) = args.read_again(reference.placement())?;
    let rows = rows(&args, &reference)?;
    let found = agreement(&reference, [&exported, &without], rows);
    let [exported, without] = found.with_context(|| args.exported.display().to_string())?;
    // Not where it is NaN.
    let is_kept = match without.kl <= NO_CHANGE_KL {
        true => exported.kl <= ROUNDING_KL,
        false => exported.kl <= KEPT_KL_SHARE * without.kl,
    };
    if args.json {
        let report = json!({
            "exported": exported,
            "without_adapter": without,
            "differences": differences,
            "same": is_kept && differences.is_empty(),
        });
        outln!("{report}");
    } else {
        print(&exported, &without);
        differences.iter().for_each(|line| outln!("{line}"));
    }
    match (is_kept, differences.is_empty()) {
        (true, true) => Ok(()),
        (true, false) => bail!(
            "{}: does not have the tokenizer of {}",
            args.exported.display(),
            args.model.model.display()
        ),
        (false, _) => bail!(
            "{}: does not predict what {} with {} does",
            args.exported.display(),
            args.model.model.display(),
            args.model.adapter.unwrap_or_default().display()
        ),
    }
}

impl Args {
    /// The model that was exported, and where its file says something else than it should.
    fn read_again(&self, placement: &Placement) -> anyhow::Result<(Decoder, Vec<String>)> {
        let beside_modelfile = self.exported.join(GGUF_FILE);
        let file = match self.exported.join(MODELFILE).is_file() {
            true => &beside_modelfile,
            false => &self.exported,
        };
        if file.is_dir() {
            let checkpoint = Checkpoint::open(file)?;
            return Ok((Decoder::load(&checkpoint, None, placement)?, Vec::new()));
        }
        let checkpoint = Checkpoint::open(&self.model.model)?;
        let base = GgufBase {
            config: checkpoint.config(),
            dir: checkpoint.dir(),
            name: "",
        };
        let file = GgufFile::open(file)?;
        if is_gguf_adapter(&file) {
            // On a file of the base.
            let config = config_in_llama_cpp(&base)?;
            let quantize = self.model.quantization();
            let mut decoder = Decoder::from_source(&checkpoint, config, quantize, placement)?;
            decoder.load_adapter(&read_gguf_adapter(&file, base)?)?;
            return Ok((decoder, Vec::new()));
        }
        let model = GgufModel::new(file, base)?;
        let differences = match model.tokenizer_differences(&base) {
            Err(error @ (qlora::Error::UnsupportedModel { .. } | qlora::Error::Io { .. })) => {
                note(&format!("its tokenizer is not compared: {error}"));
                Vec::new()
            }
            found => found?,
        };
        let decoder = Decoder::from_source(&model, model.config().clone(), None, placement)?;
        Ok((decoder, differences))
    }
}

fn print(exported: &Agreement, without: &Agreement) {
    outln!(
        "{:<26}{:>14}{:>18}{:>26}",
        "",
        "KL (nats)",
        "same top token",
        "largest logit difference"
    );
    for (name, agreement) in [("exported", exported), ("model without adapter", without)] {
        outln!(
            "{name:<26}{:>14.6}{:>16.2} %{:>26.4}",
            agreement.kl,
            100.0 * agreement.same_top_token,
            agreement.largest_logit_difference
        );
    }
    outln!(
        "from the model with its adapter, over {} tokens",
        exported.tokens
    );
}

fn rows(args: &Args, model: &Decoder) -> anyhow::Result<Vec<Example>> {
    let vocab_size = model.config().vocab_size;
    let Some(data) = &args.data else {
        return Ok(random_rows(vocab_size));
    };
    let tokenizer = args.model.tokenizer()?;
    let dataset = args
        .of_rows
        .load(data, Some(args.rows), tokenizer, vocab_size)?;
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
