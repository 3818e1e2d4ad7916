//! A Hugging Face checkpoint to a 4-bit one that transformers loads, tensor by tensor.

use std::path::PathBuf;

use super::atomic_dir::Existing;
use super::checkpoint::Checkpoint;
use super::model_dir::{ModelDir, Quantization, WeightQuantizer, WriteProgress, WriteReport};
use crate::quant::{DenseTensor, Params4bit, QuantizeOptions};
use crate::{Error, Result};

/// What to quantize, where to, and how.
#[derive(Debug, Clone)]
pub struct QuantizeJob {
    pub source: PathBuf,
    pub destination: PathBuf,
    pub existing: Existing,
    pub options: QuantizeOptions,
    pub max_shard_bytes: u64,
}

/// Writes the 4-bit model directory `job.destination`, which appears when it is complete.
///
/// Memory stays near the size of the largest tensor, whatever the model's: pages that were read are given back.
///
/// # Errors
/// [`Error::Malformed`] if the source is already quantized, has no linear layer, or the destination may not be written;
/// [`Error::NonFinite`] for a weight with a NaN or an infinity; those of [`Checkpoint::open`].
pub fn quantize(job: &QuantizeJob, progress: impl FnMut(WriteProgress)) -> Result<WriteReport> {
    quantize_with(job, &mut Nearest, progress)
}

/// Every weight becomes the nearest that 4 bits can say.
struct Nearest;

impl WeightQuantizer for Nearest {
    fn quantize(
        &mut self,
        name: &str,
        weight: &DenseTensor,
        options: QuantizeOptions,
    ) -> Result<Params4bit> {
        Params4bit::quantize(name, weight, options)
    }
}

/// [`quantize`] with weights that `quantizer` makes; it may write more into the directory.
///
/// # Errors
/// Those of [`quantize`] and of `quantizer`.
pub fn quantize_with(
    job: &QuantizeJob,
    quantizer: &mut dyn WeightQuantizer,
    progress: impl FnMut(WriteProgress),
) -> Result<WriteReport> {
    let checkpoint = Checkpoint::open(&job.source)?;
    check_source(&checkpoint)?;
    let dir = ModelDir {
        generation_config: None,
        origin: &job.source,
        config: checkpoint.config().clone(),
        destination: &job.destination,
        existing: job.existing,
        max_shard_bytes: job.max_shard_bytes,
    };
    let quantization = Quantization {
        quantizer,
        options: job.options,
    };
    dir.write(&checkpoint, Some(quantization), progress)
}

fn check_source(checkpoint: &Checkpoint) -> Result<()> {
    let field = checkpoint.config().get("quantization_config");
    match checkpoint.is_quantized() || field.is_some_and(|field| !field.is_null()) {
        true => Err(Error::malformed(
            checkpoint.dir(),
            "is already quantized, use it as it is",
        )),
        false => Ok(()),
    }
}
