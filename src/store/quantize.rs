//! A Hugging Face checkpoint to a 4-bit one that transformers loads, tensor by tensor.
//!
//! The linear layers of the decoder are quantized, everything else is copied as stored. In a shard the dense tensors come
//! first, widest type first, so that each is aligned; the JSON states, whose length is any, come last.

mod plan;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::atomic::AtomicFile;
use super::atomic_dir::{AtomicDir, Existing};
use super::bitsandbytes;
use super::checkpoint::{Checkpoint, INDEX_FILE, SINGLE_FILE};
use super::safetensors_writer::{SafetensorsWriter, TensorSpec};
use crate::quant::{DenseTensor, DoubleQuant, Params4bit, QuantizeOptions};
use crate::{Error, Result};
use plan::{PlannedTensor, plan};

/// Files beside the weights that are larger are not copied.
const MAX_COPIED_BYTES: u64 = 128 << 20;

/// Weights in any format: the source's are replaced, others would be those of the unquantized model.
const WEIGHT_SUFFIXES: [&str; 9] = [
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".partial",
];

/// What to quantize, where to, and how.
#[derive(Debug, Clone)]
pub struct QuantizeJob {
    pub source: PathBuf,
    pub destination: PathBuf,
    pub existing: Existing,
    pub options: QuantizeOptions,
    pub max_shard_bytes: u64,
}

/// How far it has come, after each tensor.
#[derive(Debug, Clone, Copy)]
pub struct QuantizeProgress<'a> {
    pub tensor: &'a str,
    /// Of the source's tensors.
    pub done_bytes: u64,
    pub total_bytes: u64,
}

/// What was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct QuantizeReport {
    pub quantized_tensors: usize,
    pub copied_tensors: usize,
    pub source_bytes: u64,
    pub written_bytes: u64,
    pub shards: usize,
}

/// Writes the 4-bit model directory `job.destination`, which appears when it is complete.
///
/// Memory stays near the size of the largest tensor, whatever the model's: pages that were read are given back.
///
/// # Errors
/// [`Error::Malformed`] if the source is already quantized, has no linear layer, or the destination may not be written;
/// [`Error::NonFinite`] for a weight with a NaN or an infinity; those of [`Checkpoint::open`].
pub fn quantize(
    job: &QuantizeJob,
    progress: impl FnMut(QuantizeProgress),
) -> Result<QuantizeReport> {
    quantize_with(job, &mut Nearest, progress)
}

/// Makes the 4-bit weights of a model: each once, in the order they are written.
pub trait WeightQuantizer {
    /// Comes first. `dir` is where the model is written, under a name that is not yet its own; `weights` come in this order.
    ///
    /// # Errors
    /// Why it cannot be done.
    fn begin(&mut self, dir: &Path, weights: &[TensorSpec]) -> Result<()>;

    /// The 4-bit weight `name` of the model, made of the source's.
    ///
    /// # Errors
    /// Those of [`Params4bit::quantize`].
    fn quantize(
        &mut self,
        name: &str,
        weight: &DenseTensor,
        options: QuantizeOptions,
    ) -> Result<Params4bit>;

    /// Comes last, before the model gets its name.
    ///
    /// # Errors
    /// Why it could not be done.
    fn finish(&mut self) -> Result<()>;
}

/// Every weight becomes the nearest that 4 bits can say.
struct Nearest;

impl WeightQuantizer for Nearest {
    fn begin(&mut self, _: &Path, _: &[TensorSpec]) -> Result<()> {
        Ok(())
    }

    fn quantize(
        &mut self,
        name: &str,
        weight: &DenseTensor,
        options: QuantizeOptions,
    ) -> Result<Params4bit> {
        Params4bit::quantize(name, weight, options)
    }

    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

/// [`quantize`] with weights that `quantizer` makes; it may write more into the directory.
///
/// # Errors
/// Those of [`quantize`] and of `quantizer`.
pub fn quantize_with(
    job: &QuantizeJob,
    quantizer: &mut dyn WeightQuantizer,
    mut progress: impl FnMut(QuantizeProgress),
) -> Result<QuantizeReport> {
    let checkpoint = Checkpoint::open(&job.source)?;
    check_source(&checkpoint)?;
    check_destination(job)?;
    let shards = plan(&checkpoint, job)?;
    let dir = AtomicDir::create(&job.destination, job.existing)?;
    let weights: Vec<TensorSpec> = shards
        .iter()
        .flatten()
        .filter(|tensor| tensor.is_quantized())
        .map(|tensor| tensor.source.clone())
        .collect();
    quantizer.begin(dir.path(), &weights)?;
    let mut run = Run {
        checkpoint: &checkpoint,
        quantizer,
        options: job.options,
        report: QuantizeReport::default(),
        source_bytes_done: 0,
    };
    let total_bytes = shards
        .iter()
        .flatten()
        .map(|tensor| tensor.source.nbytes() as u64)
        .sum();
    let mut weight_map = BTreeMap::new();
    for (place, shard) in shards.iter().enumerate() {
        let file_name = shard_name(place, shards.len());
        run.write_shard(&dir.path().join(&file_name), shard, |tensor, done_bytes| {
            progress(QuantizeProgress {
                tensor,
                done_bytes,
                total_bytes,
            });
        })?;
        let specs = shard.iter().flat_map(|tensor| &tensor.written);
        weight_map.extend(specs.map(|spec| (spec.name.clone(), file_name.clone())));
    }
    let report = QuantizeReport {
        source_bytes: total_bytes,
        shards: shards.len(),
        ..run.report
    };
    if shards.len() > 1 {
        let metadata = json!({ "total_size": report.written_bytes });
        write_json(
            &dir.path().join(INDEX_FILE),
            &json!({ "metadata": metadata, "weight_map": weight_map }),
        )?;
    }
    copy_other_files(&job.source, dir.path())?;
    write_json(
        &dir.path().join("config.json"),
        &quantized_config(&checkpoint, &shards, job.options)?,
    )?;
    run.quantizer.finish()?;
    dir.commit()?;
    Ok(report)
}

struct Run<'a> {
    checkpoint: &'a Checkpoint,
    quantizer: &'a mut dyn WeightQuantizer,
    options: QuantizeOptions,
    report: QuantizeReport,
    source_bytes_done: u64,
}

impl Run<'_> {
    fn write_shard(
        &mut self,
        path: &Path,
        shard: &[PlannedTensor],
        mut progress: impl FnMut(&str, u64),
    ) -> Result<()> {
        let specs = shard.iter().flat_map(|tensor| tensor.written.clone());
        let (states, mut specs): (Vec<TensorSpec>, Vec<TensorSpec>) =
            specs.partition(|spec| bitsandbytes::is_state(&spec.name));
        specs.extend(states);
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let mut file = SafetensorsWriter::create(path, &specs, metadata)?;
        let mut states = Vec::new();
        for tensor in shard {
            let name = &tensor.source.name;
            if tensor.is_quantized() {
                let weight = self.checkpoint.tensor(name)?;
                let params = self.quantizer.quantize(name, &weight, self.options)?;
                let mut parts = bitsandbytes::tensors(name, &params);
                states.extend(parts.pop());
                for (spec, data) in parts {
                    self.append(&mut file, &spec, &data)?;
                }
                self.report.quantized_tensors += 1;
            } else {
                let data = self.checkpoint.file(name)?.bytes(name)?;
                self.append(&mut file, &tensor.source, &data)?;
                self.report.copied_tensors += 1;
            }
            self.checkpoint.file(name)?.release(name)?;
            self.source_bytes_done += tensor.source.nbytes() as u64;
            progress(name, self.source_bytes_done);
        }
        for (spec, data) in states {
            self.append(&mut file, &spec, &data)?;
        }
        file.finish()
    }

    fn append(
        &mut self,
        file: &mut SafetensorsWriter,
        spec: &TensorSpec,
        data: &[u8],
    ) -> Result<()> {
        self.report.written_bytes += data.len() as u64;
        file.append(spec, data)
    }
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

/// Refuses to replace what is not a model directory, and the source itself or what it lies in.
fn check_destination(job: &QuantizeJob) -> Result<()> {
    let destination = &job.destination;
    if destination.symlink_metadata().is_err() {
        return Ok(());
    }
    let refuse = |reason: &str| Err(Error::malformed(destination, reason));
    if job.existing == Existing::Refuse {
        return refuse("already exists, choose another name or --overwrite");
    }
    let canonical = |path: &Path| path.canonicalize().map_err(Error::io(path));
    if canonical(&job.source)?.starts_with(canonical(destination)?) {
        return refuse("is or contains the source, choose another name");
    }
    match destination.join("config.json").is_file() {
        true => Ok(()),
        false => refuse("is not a model directory and will not be replaced"),
    }
}

fn shard_name(place: usize, count: usize) -> String {
    match count {
        1 => SINGLE_FILE.to_string(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", place + 1),
    }
}

/// The source's config with the description of the quantization that transformers looks for.
fn quantized_config(
    checkpoint: &Checkpoint,
    shards: &[Vec<PlannedTensor>],
    options: QuantizeOptions,
) -> Result<Value> {
    let mut config = checkpoint.config().clone();
    let first = shards.iter().flatten().find(|tensor| tensor.is_quantized());
    let dtype = match first {
        Some(tensor) => bitsandbytes::dtype_name(checkpoint.tensor(&tensor.source.name)?.dtype),
        None => "float32",
    };
    let object = config
        .as_object_mut()
        .ok_or_else(|| Error::malformed(checkpoint.config_path(), "is not a JSON object"))?;
    let quantization = json!({
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": bitsandbytes::quant_type_name(options.quant_type),
        "bnb_4bit_use_double_quant": options.double_quant == DoubleQuant::Yes,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": null,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    });
    object.insert("quantization_config".to_string(), quantization);
    Ok(config)
}

fn write_json(path: &Path, json: &impl serde::Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(json)
        .map_err(|error| Error::malformed(path, error.to_string()))?;
    text.push(b'\n');
    AtomicFile::write(path, text)
}

/// Copies what else is in the source: tokenizer, generation config, chat template, licence; no weights, no directories.
fn copy_other_files(source: &Path, destination: &Path) -> Result<()> {
    for entry in fs::read_dir(source).map_err(Error::io(source))? {
        let path = entry.map_err(Error::io(source))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        let metadata = fs::metadata(&path).map_err(Error::io(&path))?;
        let is_other = metadata.is_file()
            && metadata.len() <= MAX_COPIED_BYTES
            && !name.starts_with('.')
            && name != "config.json"
            && !name.ends_with(".index.json")
            && !WEIGHT_SUFFIXES.iter().any(|suffix| name.ends_with(suffix));
        if is_other {
            fs::copy(&path, destination.join(name)).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}
