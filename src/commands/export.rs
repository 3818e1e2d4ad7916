//! `qlora export`: a trained adapter for other programs, merged into its model or in the files of llama.cpp.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use candle_core::DType;
use clap::ValueEnum;
use indicatif::DecimalBytes;
use qlora::export::{Merged, MergedQuantizer};
use qlora::quant::QuantizeOptions;
use qlora::store::{
    Adapter, Checkpoint, Existing, Initialization, ModelDir, Quantization, RelativeTo, WriteReport,
};
use serde_json::json;

use super::note;
use super::quantize::{parse_bytes, parse_quant_type, progress_bar};
use qlora::quant::QuantType;

/// Hand an adapter over to other programs: merged into its model, or for llama.cpp
#[derive(Debug, clap::Args)]
pub struct Args {
    /// PEFT adapter directory
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,

    /// What to write
    #[arg(long, value_name = "WHAT")]
    to: Target,

    /// Where to; it appears when it is complete
    #[arg(long, value_name = "PATH")]
    out: PathBuf,

    /// Model directory below the adapter, 4-bit or not; unset: the one that the adapter's config names
    #[arg(long, alias = "model", value_name = "DIR")]
    base: Option<PathBuf>,

    /// bf16, f16 or f32; unset: what the model had before it was quantized
    #[arg(long, value_name = "NAME")]
    dtype: Option<Dtype>,

    /// Merge into weights as training took them, where they are not in 4 bits yet: nf4 or fp4
    #[arg(long = "quant_type", alias = "quant-type", value_name = "TYPE", value_parser = parse_quant_type)]
    quant_type: Option<QuantType>,

    /// Largest file of weights, such as 500MB, 4GB or 4GiB
    #[arg(long, alias = "max_shard_size", value_name = "SIZE", default_value = "4GB", value_parser = parse_bytes)]
    max_shard_size: u64,

    /// Replace what is at --out, if it is of the kind that is written
    #[arg(long)]
    overwrite: bool,

    /// Print what was done as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Target {
    /// A model directory as transformers reads it, with the adapter in its weights
    Merged,
    /// The same in 4 bits, as bitsandbytes has it: what the adapter changed is rounded to what 4 bits can say
    #[value(name = "merged-4bit")]
    Merged4bit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Dtype {
    Bf16,
    F16,
    F32,
}

impl From<Dtype> for DType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Bf16 => Self::BF16,
            Dtype::F16 => Self::F16,
            Dtype::F32 => Self::F32,
        }
    }
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let adapter = Adapter::read(&args.adapter)?;
    let base = match &args.base {
        Some(base) => base.clone(),
        None => named_base(&adapter, &args.adapter)?,
    };
    expect_its_base(&args.adapter, &base)?;
    let merged = merge(&args, &adapter, &base)?;
    let report = write_directory(&args, &merged)?;
    let rounding = merged.rounding_error();
    if args.json {
        let mut json = serde_json::to_value(report)?;
        json["base"] = json!(base);
        json["rounding_error"] = json!(rounding);
        println!("{json}");
        return Ok(());
    }
    println!(
        "{}: {} with {} merged into it, {}",
        args.out.display(),
        base.display(),
        args.adapter.display(),
        DecimalBytes(report.written_bytes),
    );
    if let Some(rounding) = rounding {
        println!(
            "rounding moves its weights by {:.2} % of what the adapter does",
            100.0 * rounding
        );
    }
    Ok(())
}

/// The model that the adapter was trained on, by its config.
fn named_base(adapter: &Adapter, dir: &Path) -> anyhow::Result<PathBuf> {
    let Some(base) = &adapter.config.base_model_name_or_path else {
        bail!(
            "{}: does not name its model; give --base DIR",
            dir.display()
        );
    };
    match Path::new(base).is_dir() {
        true => Ok(base.into()),
        false => bail!(
            "{}: was trained on {base}, which is not a directory here; give --base DIR",
            dir.display()
        ),
    }
}

/// Refuses weights that the adapter is not a change of.
fn expect_its_base(adapter: &Path, base: &Path) -> anyhow::Result<()> {
    let Some(record) = Initialization::read(adapter)? else {
        return Ok(());
    };
    let is_initialized = Initialization::of_model(base)?.is_some();
    match (record.adapter_is_relative_to, is_initialized) {
        (RelativeTo::InitializedBase, false) => bail!(
            "{}: belongs to the 4-bit weights that were made with it ({}) and not to {}; \
             adapter_for_original_model in its run directory does",
            adapter.display(),
            record.initialized_base,
            base.display()
        ),
        (RelativeTo::OriginalModel, true) => bail!(
            "{}: belongs to the original model ({}) and not to {}",
            adapter.display(),
            record.original_model,
            base.display()
        ),
        _ => Ok(()),
    }
}

fn merge(args: &Args, adapter: &Adapter, base: &Path) -> anyhow::Result<Merged> {
    let checkpoint = Checkpoint::open(base)?;
    if args.quant_type.is_none() && !checkpoint.is_quantized() {
        note(&format!(
            "{}: not in 4 bits and taken as stored; --quant_type nf4 takes it as training does",
            base.display()
        ));
    }
    let quantize = args.quant_type.map(|quant_type| QuantizeOptions {
        quant_type,
        ..QuantizeOptions::default()
    });
    Merged::new(checkpoint, adapter, quantize, args.dtype.map(DType::from)).with_context(|| {
        format!(
            "{}: does not fit {}",
            args.adapter.display(),
            base.display()
        )
    })
}

fn write_directory(args: &Args, merged: &Merged) -> anyhow::Result<WriteReport> {
    let dir = ModelDir {
        origin: merged.origin(),
        config: merged.config_json(),
        destination: &args.out,
        existing: match args.overwrite {
            true => Existing::Replace,
            false => Existing::Refuse,
        },
        max_shard_bytes: args.max_shard_size,
    };
    let mut quantizer = MergedQuantizer(merged);
    let quantization = (args.to == Target::Merged4bit).then_some(Quantization {
        options: merged.quantize_options(),
        quantizer: &mut quantizer,
    });
    let bar = progress_bar()?;
    let report = dir.write(merged, quantization, |progress| {
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.done_bytes);
        bar.set_message(progress.tensor.to_string());
    })?;
    bar.finish_and_clear();
    Ok(report)
}
