//! Writes a model directory that transformers loads, tensor by tensor: shards, their index, the config, and the files that
//! lie beside the weights it is made of.
//!
//! Where it is quantized, that is the linear layers of the decoder; everything else is stored as the source says. In a shard
//! the dense tensors come first, widest type first, so that each is aligned; the JSON states, whose length is any, come last.

mod plan;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use bytes::Bytes;
use serde_json::{Value, json};

use super::atomic::AtomicFile;
use super::atomic_dir::{AtomicDir, Existing, expect_replaceable};
use super::bitsandbytes::{self, dtype_name};
use super::checkpoint::{Checkpoint, INDEX_FILE, SINGLE_FILE};
use super::safetensors_writer::{SafetensorsWriter, TensorSpec};
use super::tensor_names::vision_part;
use crate::quant::{DenseTensor, DoubleQuant, Params4bit, QuantizeOptions};
use crate::{Error, Result};
use plan::{PlannedTensor, plan};

/// How a model generates where nothing else is said.
pub const GENERATION_CONFIG_FILE: &str = "generation_config.json";

/// Files beside the weights that are larger are not copied.
const MAX_COPIED_BYTES: u64 = 128 << 20;

/// Weights in any format: the source's are replaced, others would be those of another model.
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

/// The tensors that a model is written from, each asked for once.
pub trait TensorSource {
    /// Names, shapes, and the types that they are to be stored in.
    ///
    /// # Errors
    /// Why they cannot be told.
    fn specs(&self) -> Result<Vec<TensorSpec>>;

    /// The bytes of a tensor, as its spec says.
    ///
    /// # Errors
    /// Why it cannot be made.
    fn bytes(&self, spec: &TensorSpec) -> Result<Bytes>;

    /// A tensor as exact as it is known, to be quantized or converted.
    ///
    /// # Errors
    /// Why it cannot be made.
    fn tensor(&self, name: &str) -> Result<DenseTensor>;

    /// Gives back what a tensor, which has been written, holds in memory.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn release(&self, name: &str) -> Result<()>;
}

/// The tensors as stored.
impl TensorSource for Checkpoint {
    fn specs(&self) -> Result<Vec<TensorSpec>> {
        let spec = |name: &str| {
            let info = self.file(name)?.info(name)?;
            Ok(TensorSpec::new(name, info.dtype, info.shape.clone()))
        };
        self.names().map(spec).collect()
    }

    fn bytes(&self, spec: &TensorSpec) -> Result<Bytes> {
        self.file(&spec.name)?.bytes(&spec.name)
    }

    fn tensor(&self, name: &str) -> Result<DenseTensor> {
        Self::tensor(self, name)
    }

    fn release(&self, name: &str) -> Result<()> {
        self.file(name)?.release(name)
    }
}

/// Makes the 4-bit weights of a model: each once, in the order they are written.
pub trait WeightQuantizer {
    /// Comes first. `dir` is where the model is written, under a name that is not yet its own; `weights` come in this order.
    ///
    /// # Errors
    /// Why it cannot be done.
    #[allow(unused_variables, reason = "most have nothing to begin")]
    fn begin(&mut self, dir: &Path, weights: &[TensorSpec]) -> Result<()> {
        Ok(())
    }

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
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

/// A model directory to be written.
#[derive(Debug, Clone)]
pub struct ModelDir<'a> {
    /// The model directory whose tokenizer and other files go along. It is not written to.
    pub origin: &'a Path,
    /// `config.json`, without a word on quantization.
    pub config: Value,
    /// `generation_config.json` in place of the origin's.
    pub generation_config: Option<Value>,
    pub destination: &'a Path,
    pub existing: Existing,
    pub max_shard_bytes: u64,
}

/// How the linear layers of a model are quantized.
pub struct Quantization<'a> {
    pub quantizer: &'a mut dyn WeightQuantizer,
    pub options: QuantizeOptions,
}

/// How far it has come, after each tensor.
#[derive(Debug, Clone, Copy)]
pub struct WriteProgress<'a> {
    pub tensor: &'a str,
    /// Of the source's tensors.
    pub done_bytes: u64,
    pub total_bytes: u64,
}

/// What was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct WriteReport {
    pub quantized_tensors: usize,
    pub copied_tensors: usize,
    pub source_bytes: u64,
    pub written_bytes: u64,
    pub shards: usize,
}

impl ModelDir<'_> {
    /// Writes the directory, which appears when it is complete.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the destination may not be written, or there is no linear layer to quantize; those of
    /// `source` and of the quantizer.
    pub fn write<'a>(
        &self,
        source: &'a dyn TensorSource,
        mut quantization: Option<Quantization<'a>>,
        mut progress: impl FnMut(WriteProgress),
    ) -> Result<WriteReport> {
        let kind = ("config.json", "a model directory");
        expect_replaceable(self.destination, self.existing, &[self.origin], kind)?;
        let options = quantization.as_ref().map(|q| q.options);
        let shards = plan(source, options, self)?;
        let dir = AtomicDir::create(self.destination, self.existing)?;
        if let Some(Quantization { quantizer, .. }) = &mut quantization {
            let tensors = shards.iter().flatten();
            let weights = tensors.filter(|tensor| tensor.is_quantized());
            let weights: Vec<_> = weights.map(|tensor| tensor.source.clone()).collect();
            quantizer.begin(dir.path(), &weights)?;
        }
        let sizes = shards.iter().flatten();
        let total_bytes = sizes.map(|tensor| tensor.source.nbytes() as u64).sum();
        let mut run = Run {
            source,
            quantization,
            report: WriteReport::default(),
            source_bytes_done: 0,
        };
        let mut weight_map = BTreeMap::new();
        for (place, shard) in shards.iter().enumerate() {
            let file_name = shard_name(place, shards.len());
            run.write_shard(&dir.path().join(&file_name), shard, |tensor, done_bytes| {
                progress(WriteProgress {
                    tensor,
                    done_bytes,
                    total_bytes,
                });
            })?;
            let specs = shard.iter().flat_map(|tensor| &tensor.written);
            weight_map.extend(specs.map(|spec| (spec.name.clone(), file_name.clone())));
        }
        let report = WriteReport {
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
        copy_other_files(self.origin, dir.path())?;
        if let Some(config) = &self.generation_config {
            write_json(&dir.path().join(GENERATION_CONFIG_FILE), config)?;
        }
        let config = match options {
            None => self.config.clone(),
            Some(options) => self.quantized_config(&shards, options)?,
        };
        write_json(&dir.path().join("config.json"), &config)?;
        if let Some(Quantization { quantizer, .. }) = run.quantization {
            quantizer.finish()?;
        }
        dir.commit()?;
        Ok(report)
    }

    /// The config with the description of the quantization that transformers looks for.
    fn quantized_config(
        &self,
        shards: &[Vec<PlannedTensor>],
        options: QuantizeOptions,
    ) -> Result<Value> {
        let mut config = self.config.clone();
        let first = shards.iter().flatten().find(|tensor| tensor.is_quantized());
        let dtype = match first {
            Some(tensor) => dtype_name(tensor.source.float_type()?),
            None => "float32",
        };
        let path = self.origin.join("config.json");
        let object = config
            .as_object_mut()
            .ok_or_else(|| Error::malformed(path, "is not a JSON object"))?;
        let quantization = json!({
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": bitsandbytes::quant_type_name(options.quant_type),
            "bnb_4bit_use_double_quant": options.double_quant == DoubleQuant::Yes,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": skipped_modules(shards),
            "llm_int8_threshold": 6.0,
            "load_in_4bit": true,
            "load_in_8bit": false,
            "quant_method": "bitsandbytes",
        });
        object.insert("quantization_config".to_string(), quantization);
        Ok(config)
    }
}

struct Run<'a> {
    source: &'a dyn TensorSource,
    quantization: Option<Quantization<'a>>,
    report: WriteReport,
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
            match &mut self.quantization {
                Some(Quantization { quantizer, options }) if tensor.is_quantized() => {
                    let params = quantizer.quantize(name, &self.source.tensor(name)?, *options)?;
                    let mut parts = bitsandbytes::tensors(name, &params);
                    states.extend(parts.pop());
                    for (spec, data) in parts {
                        self.append(&mut file, &spec, &data)?;
                    }
                    self.report.quantized_tensors += 1;
                }
                _ => {
                    let data = self.source.bytes(&tensor.source)?;
                    self.append(&mut file, &tensor.source, &data)?;
                    self.report.copied_tensors += 1;
                }
            }
            self.source.release(name)?;
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

/// What transformers is to leave in 16 bits beside what it would anyway; `null` where the model is a decoder alone.
fn skipped_modules(shards: &[Vec<PlannedTensor>]) -> Value {
    let tensors = shards.iter().flatten();
    let parts = tensors.filter_map(|tensor| vision_part(&tensor.source.name));
    let parts: BTreeSet<&str> = parts.collect();
    match parts.is_empty() {
        true => Value::Null,
        // A list takes the place of what it would leave by itself.
        false => {
            // Some programs have the parts without the model around them.
            let bare = parts.iter().filter_map(|part| part.strip_prefix("model."));
            let bare = bare.chain(["lm_head"]);
            parts.iter().copied().chain(bare).collect()
        }
    }
}

fn shard_name(place: usize, count: usize) -> String {
    match count {
        1 => SINGLE_FILE.to_string(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", place + 1),
    }
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
