//! `qlora quantize`: a Hugging Face checkpoint to a 4-bit one that transformers loads.

mod initialization;

use std::path::{Path, PathBuf};

use indicatif::DecimalBytes;
use qlora::model::DecoderConfig;
use qlora::quant::{DoubleQuant, QuantType, QuantizeOptions};
use qlora::store::{
    Checkpoint, Existing, INITIAL_ADAPTER, QuantizeJob, WriteProgress, quantize, quantize_with,
};
use qlora::train::config::ByteCount;
use serde_json::json;

use super::model_args::parse_quant_type;
use initialization::InitArgs;

/// Quantize a Hugging Face checkpoint to 4 bits
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model with safetensors in bf16, f16 or f32: its directory, or its name on the Hugging Face hub
    #[arg(value_name = "SRC")]
    source: PathBuf,

    /// Model directory to write; it appears when it is complete
    #[arg(value_name = "DST")]
    destination: PathBuf,

    /// The 4-bit code
    #[arg(long, alias = "quant_type", value_name = "nf4|fp4", default_value = "nf4", value_parser = parse_quant_type)]
    quant_type: QuantType,

    /// Keep the scale of each block in f32: 4.5 instead of 4.127 bits per weight
    #[arg(long, alias = "no_double_quant")]
    no_double_quant: bool,

    /// Weights that share one scale: a power of two from 32 to 4096
    #[arg(long, alias = "block_size", value_name = "N", default_value_t = 64)]
    block_size: usize,

    /// Largest file of weights, such as 500MB, 4GB or 4GiB
    #[arg(long, alias = "max_shard_size", value_name = "SIZE", default_value = "4GB", value_parser = parse_bytes)]
    max_shard_size: u64,

    /// Replace DST if it is a model directory
    #[arg(long)]
    overwrite: bool,

    /// Print what was done as one JSON object
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    init: InitArgs,
}

pub fn run(mut args: Args) -> anyhow::Result<()> {
    args.source = super::models::model_dir(&args.source)?;
    let model = check_model(&args.source)?;
    let initializing = args
        .init
        .quantizer(&model, &args.source, &args.destination)?;
    let job = QuantizeJob {
        source: args.source,
        destination: args.destination,
        existing: match args.overwrite {
            true => Existing::Replace,
            false => Existing::Refuse,
        },
        options: QuantizeOptions {
            quant_type: args.quant_type,
            block_size: args.block_size,
            double_quant: match args.no_double_quant {
                true => DoubleQuant::No,
                false => DoubleQuant::Yes,
            },
        },
        max_shard_bytes: args.max_shard_size,
    };
    let initial_adapter = initializing
        .is_some()
        .then(|| job.destination.join(INITIAL_ADAPTER));
    let report = with_progress(|show| match initializing {
        Some(mut quantizer) => quantize_with(&job, &mut quantizer, show),
        None => quantize(&job, show),
    })?;
    if args.json {
        let mut json = serde_json::to_value(report)?;
        if let Some(dir) = initial_adapter {
            json["initial_adapter"] = json!(dir);
        }
        outln!("{json}");
        return Ok(());
    }
    outln!(
        "{}: {} weights quantized, {} tensors copied, {} to {}",
        job.destination.display(),
        report.quantized_tensors,
        report.copied_tensors,
        DecimalBytes(report.source_bytes),
        DecimalBytes(report.written_bytes),
    );
    if let Some(dir) = initial_adapter {
        outln!("{}: the adapter that belongs to it", dir.display());
    }
    Ok(())
}

/// Refuses a model that could not be trained afterwards.
fn check_model(source: &Path) -> anyhow::Result<DecoderConfig> {
    let checkpoint = Checkpoint::open(source)?;
    let path = checkpoint.config_path();
    Ok(DecoderConfig::from_json(checkpoint.config(), &path)?)
}

/// Shows how far a writer has come.
pub(super) fn with_progress<T>(
    write: impl FnOnce(&mut dyn FnMut(WriteProgress)) -> qlora::Result<T>,
) -> anyhow::Result<T> {
    let bar = super::byte_progress_bar()?;
    let written = write(&mut |progress| {
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.done_bytes);
        bar.set_message(progress.tensor.to_string());
    })?;
    bar.finish_and_clear();
    Ok(written)
}

/// A number of bytes with a unit: decimal as in transformers' `max_shard_size` (`4GB`) or binary (`4GiB`).
pub(super) fn parse_bytes(text: &str) -> Result<u64, String> {
    match text.parse::<ByteCount>() {
        Ok(ByteCount(bytes)) if bytes > 0 => Ok(bytes),
        _ => Err("write it as 500MB, 4GB or 4GiB".to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::parse_bytes;

    #[test]
    fn sizes_have_decimal_and_binary_units() {
        assert_eq!(parse_bytes("4GB"), Ok(4_000_000_000));
        assert_eq!(parse_bytes("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_bytes("200kb"), Ok(200_000));
        for wrong in ["", "GB", "4 parsecs", "0", "-1GB", "1e3"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }
}
