//! A GGUF file in memory: mapped, its metadata read by candle, its tensors as numbers.
//!
//! Source: `docs/gguf.md` of ggml.

use std::io::Cursor;
use std::panic;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};
use candle_core::{DType, Device};
use rayon::prelude::*;
use serde_json::{Value as Json, json};

use super::mapping::{Mapping, aligned};
use crate::quant::DenseTensor;
use crate::{Error, Result};

/// Elements that are dequantized by a task: whole blocks of every type.
const TASK_ELEMENTS: usize = 1 << 16;

/// A mapped GGUF file, all of whose tensors lie within it.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    /// The mapping behind the header.
    data: Bytes,
    content: Content,
}

/// How a tensor is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// `q4_k`, `f16`, ...
    pub type_name: String,
    pub parameters: usize,
    pub nbytes: usize,
}

impl GgufFile {
    /// Maps the file at `path`, which must not be changed while it is mapped.
    ///
    /// # Errors
    /// [`Error::Malformed`] if it is no GGUF file, truncated, or one of several parts.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (map, _) = Mapping::open(path)?;
        let content = read_content(map.all())
            .map_err(|reason| Error::malformed(path, format!("cannot be read: {reason}")))?;
        let start = usize::try_from(content.tensor_data_offset);
        let start = start.map_or(map.all().len(), |start| start.min(map.all().len()));
        let file = Self {
            path: path.to_path_buf(),
            data: map.bytes_from(start),
            content,
        };
        if let Some(parts) = file.value("split.count").and_then(|v| v.to_u64().ok())
            && parts > 1
        {
            let reason =
                format!("is one of {parts} parts; put them together with llama-gguf-split --merge");
            return Err(Error::malformed(path, reason));
        }
        for (name, info) in &file.content.tensor_infos {
            file.bytes(info)
                .map_err(|reason| Error::malformed(path, format!("tensor `{name}` {reason}")))?;
        }
        Ok(file)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    /// The metadata under `key`; an integer or a float of whatever width is a number.
    pub fn json(&self, key: &str) -> Option<Json> {
        self.value(key).map(json_of)
    }

    /// The text under `key`.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.value(key)?.to_string().ok().map(String::as_str)
    }

    /// The keys of the metadata, sorted.
    pub fn keys(&self) -> Vec<&str> {
        sorted(self.content.metadata.keys())
    }

    /// The names of the tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        sorted(self.content.tensor_infos.keys())
    }

    pub fn contains(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// How a tensor is stored.
    pub fn stored(&self, name: &str) -> Option<StoredTensor> {
        let info = self.content.tensor_infos.get(name)?;
        Some(StoredTensor {
            type_name: format!("{:?}", info.ggml_dtype)
                .to_lowercase()
                .replace('k', "_k"),
            parameters: info.shape.elem_count(),
            nbytes: self.bytes(info).ok()?.len(),
        })
    }

    /// A tensor of real numbers: a slice of the mapping where it is stored in f32, f16 or bf16. A quantized one is dequantized
    /// to f16, whose rounding is far below that of its own, or to f32 where a value is too large for that.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::TensorMismatch`] for a type that candle does not dequantize.
    pub fn tensor(&self, name: &str) -> Result<DenseTensor> {
        let found = self.content.tensor_infos.get(name);
        let found = found.and_then(|info| Some((info, self.bytes(info).ok()?)));
        let (info, data) = found.ok_or_else(|| Error::MissingTensor {
            path: self.path.clone(),
            tensor: name.to_string(),
        })?;
        let shape = info.shape.dims().to_vec();
        let dtype = match info.ggml_dtype {
            GgmlDType::F32 => DType::F32,
            GgmlDType::F16 => DType::F16,
            GgmlDType::BF16 => DType::BF16,
            quantized => {
                let values = dequantize(quantized, &data).map_err(|_| Error::TensorMismatch {
                    tensor: name.to_string(),
                    expected: "a type that is read here".into(),
                    found: format!("{quantized:?} in {}", self.path.display()),
                })?;
                let values = DenseTensor::from_f32_vec(shape, values);
                return Ok(values.to_dtype(name, DType::F16).unwrap_or(values));
            }
        };
        Ok(DenseTensor {
            dtype,
            shape,
            data: aligned(data, dtype.size_in_bytes()),
        })
    }

    /// The error says why there are none.
    fn bytes(&self, info: &TensorInfo) -> Result<Bytes, &'static str> {
        const TOO_LARGE: &str = "has a size that no file has";
        let block = info.ggml_dtype.block_size();
        let columns = info.shape.dims().last().copied().unwrap_or(1);
        if !columns.is_multiple_of(block) {
            return Err("has rows that are no whole blocks of its type");
        }
        let mut sizes = info.shape.dims().iter();
        let elements = sizes.try_fold(1usize, |product, size| product.checked_mul(*size));
        let blocks = elements.ok_or(TOO_LARGE)? / block;
        let nbytes = blocks.checked_mul(info.ggml_dtype.type_size());
        let start = usize::try_from(info.offset).map_err(|_| TOO_LARGE)?;
        let end = nbytes.and_then(|nbytes| start.checked_add(nbytes));
        match end.ok_or(TOO_LARGE)? {
            end if end <= self.data.len() => Ok(self.data.slice(start..end)),
            _ => Err("lies behind the end of the file; download or copy it again"),
        }
    }
}

/// Why it cannot be read is the error.
fn read_content(file: &[u8]) -> Result<Content, String> {
    if !file.starts_with(b"GGUF") {
        return Err("it does not begin with GGUF".into());
    }
    // candle divides by an alignment that the file says, which may be 0.
    let read = panic::catch_unwind(|| Content::read(&mut Cursor::new(file)));
    match read {
        Ok(Ok(content)) => Ok(content),
        // Where the environment asks for backtraces, the message has one.
        Ok(Err(candle_core::Error::WithBacktrace { inner, .. })) => Err(inner.to_string()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("its header makes no sense".into()),
    }
}

/// The values of whole blocks.
fn dequantize(dtype: GgmlDType, blocks: &Bytes) -> candle_core::Result<Vec<f32>> {
    // What candle makes blocks of by a cast: they have members of 2 and of 4 bytes.
    let blocks = aligned(blocks.clone(), align_of::<f32>());
    let mut values = vec![0f32; blocks.len() / dtype.type_size() * dtype.block_size()];
    let task_bytes = TASK_ELEMENTS / dtype.block_size() * dtype.type_size();
    let tasks = values.par_chunks_mut(TASK_ELEMENTS);
    tasks
        .zip(blocks.par_chunks(task_bytes))
        .try_for_each(|(values, blocks)| {
            let tensor = qtensor_from_ggml(dtype, blocks, vec![values.len()], &Device::Cpu)?;
            values.copy_from_slice(&tensor.dequantize(&Device::Cpu)?.to_vec1::<f32>()?);
            candle_core::Result::Ok(())
        })?;
    Ok(values)
}

fn json_of(value: &Value) -> Json {
    match value {
        Value::U8(value) => json!(value),
        Value::I8(value) => json!(value),
        Value::U16(value) => json!(value),
        Value::I16(value) => json!(value),
        Value::U32(value) => json!(value),
        Value::I32(value) => json!(value),
        Value::U64(value) => json!(value),
        Value::I64(value) => json!(value),
        Value::F32(value) => shortest_json(*value),
        Value::F64(value) => json!(value),
        Value::Bool(value) => json!(value),
        Value::String(value) => json!(value),
        Value::Array(values) => values.iter().map(json_of).collect(),
    }
}

/// A number with no more digits than tell it from its neighbours in f32.
pub(crate) fn shortest_json(value: f32) -> Json {
    json!(value.to_string().parse::<f64>().ok())
}

fn sorted<'a>(names: impl Iterator<Item = &'a String>) -> Vec<&'a str> {
    let mut names: Vec<&str> = names.map(String::as_str).collect();
    names.sort_unstable();
    names
}
