//! A GGUF file, version 3, written tensor by tensor: never more than some rows of them in memory.
//!
//! Layout, little-endian: `GGUF`, u32 version, u64 tensors, u64 keys; the keys with their values; name, dimensions (the
//! fastest first), type and offset of each tensor; their data, each aligned to 32 bytes. A text is its u64 length and UTF-8.

use std::io::{self, Write};
use std::path::Path;

use rayon::prelude::*;

use super::tensor_type::{TensorType, TooLarge};
use crate::quant::DenseTensor;
use crate::store::AtomicFile;
use crate::{Error, Result};

const VERSION: u32 = 3;
const ALIGNMENT: usize = 32;
/// Elements that are converted together.
const ELEMENTS_AT_ONCE: usize = 1 << 20;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Texts(Vec<String>),
}

/// The keys of a file with their values, in their order.
#[derive(Debug, Default)]
pub(super) struct Metadata(Vec<(String, Value)>);

impl Metadata {
    pub(super) fn add(&mut self, key: impl Into<String>, value: Value) {
        self.0.push((key.into(), value));
    }

    pub(super) fn add_u32(&mut self, key: impl Into<String>, value: u32) {
        self.add(key, Value::U32(value));
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    pub(super) fn add_text(&mut self, key: impl Into<String>, text: &str) {
        self.add(key, Value::Text(text.into()));
    }
}

/// A tensor that a file is to have.
#[derive(Debug, Clone)]
pub(super) struct TensorInfo {
    pub name: String,
    /// A matrix or a vector.
    pub shape: Vec<usize>,
    pub tensor_type: TensorType,
}

impl TensorInfo {
    fn nbytes(&self) -> usize {
        self.tensor_type.nbytes(self.shape.iter().product())
    }
}

/// What is done to a tensor's values before they are stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Change {
    /// Rows (or elements of a vector) are reordered by [`rotary_row`](super::tensor_names::rotary_row) of heads this large.
    pub rotary_head_dim: Option<usize>,
    pub factor: f32,
    /// Added to what the factor gives.
    pub offset: f32,
}

impl Change {
    pub(super) const NONE: Self = Self {
        rotary_head_dim: None,
        factor: 1.0,
        offset: 0.0,
    };

    /// The tensor that is stored as `stored`, in its own type but for an offset; not for a factor.
    pub(super) fn undo(self, stored: DenseTensor) -> DenseTensor {
        if self.offset != 0.0 {
            let values = stored.to_f32_vec().into_iter();
            let values: Vec<f32> = values.map(|value| value - self.offset).collect();
            return DenseTensor::from_f32(stored.shape, &values);
        }
        if self.rotary_head_dim.is_none() {
            return stored;
        }
        let row_bytes = stored.data.len() / stored.shape[0];
        let mut data = vec![0; stored.data.len()];
        for (row, bytes) in stored.data.chunks_exact(row_bytes).enumerate() {
            data[self.source_row(row) * row_bytes..][..row_bytes].copy_from_slice(bytes);
        }
        DenseTensor {
            data: data.into(),
            ..stored
        }
    }

    /// The row of the source that comes at `row`.
    fn source_row(self, row: usize) -> usize {
        match self.rotary_head_dim {
            Some(head_dim) => super::tensor_names::rotary_row(row, head_dim),
            None => row,
        }
    }
}

/// A GGUF file being written; it appears under its name with [`finish`](Self::finish).
#[derive(Debug)]
pub(super) struct GgufWriter {
    file: AtomicFile,
    /// Those that are yet to come, the next one last.
    pending: Vec<TensorInfo>,
    written_bytes: u64,
}

impl GgufWriter {
    /// Starts the file at `path`, which is to hold `tensors`, in that order.
    pub(super) fn create(
        path: &Path,
        metadata: &Metadata,
        mut tensors: Vec<TensorInfo>,
    ) -> Result<Self> {
        let mut header = header(metadata, &tensors);
        pad(&mut header);
        tensors.reverse();
        let mut writer = Self {
            file: AtomicFile::create(path)?,
            pending: tensors,
            written_bytes: 0,
        };
        writer.put(&header).map_err(Error::io(path))?;
        Ok(writer)
    }

    /// The bytes of the tensors that are yet to come.
    pub(super) fn pending_bytes(&self) -> u64 {
        let pending = self.pending.iter();
        pending.map(|info| info.nbytes() as u64).sum()
    }

    /// Writes the next tensor.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] if it has another shape than announced, or a value that its type cannot hold.
    pub(super) fn write(&mut self, tensor: &DenseTensor, change: Change) -> Result<()> {
        let info = self.pending.pop().ok_or_else(|| Error::Shape {
            op: "gguf",
            expected: "no more tensors".into(),
            found: format!("{:?}", tensor.shape),
        })?;
        tensor.validate(&info.name)?;
        if tensor.shape != info.shape {
            return Err(Error::TensorMismatch {
                tensor: info.name,
                expected: format!("{:?}", info.shape),
                found: format!("{:?}", tensor.shape),
            });
        }
        // A vector is a column: its elements are reordered as the rows of a matrix are.
        let columns = info.shape.get(1).copied().unwrap_or(1);
        let encode = |values: &mut Vec<f32>, row: usize| {
            tensor.read_range(change.source_row(row) * columns, values);
            if (change.factor, change.offset) != (1.0, 0.0) {
                let changed = |x: f32| x * change.factor + change.offset;
                values.iter_mut().for_each(|x| *x = changed(*x));
            }
            let mut bytes = Vec::with_capacity(info.tensor_type.nbytes(columns));
            let encoded = info.tensor_type.encode(values, &mut bytes);
            encoded.map_err(|TooLarge(at)| too_large(&info, [row, at], values[at]))?;
            Ok(bytes)
        };
        let rows_at_once = ELEMENTS_AT_ONCE.div_ceil(columns);
        for first in (0..info.shape[0]).step_by(rows_at_once) {
            let rows = first..info.shape[0].min(first + rows_at_once);
            let rows = rows.into_par_iter();
            let encoded = rows.map_init(|| vec![0f32; columns], encode);
            for bytes in encoded.collect::<Result<Vec<_>>>()? {
                self.put(&bytes).map_err(Error::io(self.file.path()))?;
            }
        }
        let end = info.nbytes();
        let padding = [0; ALIGNMENT];
        let padding = &padding[..end.next_multiple_of(ALIGNMENT) - end];
        self.put(padding).map_err(Error::io(self.file.path()))
    }

    /// Gives the file its name, with all tensors in it, and tells its length in bytes.
    pub(super) fn finish(self) -> Result<u64> {
        if let Some(missing) = self.pending.last() {
            return Err(Error::MissingTensor {
                path: self.file.path().to_path_buf(),
                tensor: missing.name.clone(),
            });
        }
        self.file.commit()?;
        Ok(self.written_bytes)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written_bytes += bytes.len() as u64;
        self.file.write_all(bytes)
    }
}

fn too_large(info: &TensorInfo, [row, column]: [usize; 2], value: f32) -> Error {
    let stored = info.tensor_type.name();
    let hint = match info.tensor_type {
        TensorType::F32 => "",
        _ => "; a wider type such as f32 may hold it",
    };
    Error::TensorMismatch {
        tensor: info.name.clone(),
        expected: format!("finite values that {stored} can hold{hint}"),
        found: format!("{value} at [{row}, {column}]"),
    }
}

fn header(metadata: &Metadata, tensors: &[TensorInfo]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.0.len() as u64).to_le_bytes());
    for (key, value) in &metadata.0 {
        put_text(&mut out, key);
        put_value(&mut out, value);
    }
    let mut offset = 0;
    for info in tensors {
        put_text(&mut out, &info.name);
        out.extend((info.shape.len() as u32).to_le_bytes());
        for size in info.shape.iter().rev() {
            out.extend((*size as u64).to_le_bytes());
        }
        out.extend(info.tensor_type.id().to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset += info.nbytes().next_multiple_of(ALIGNMENT);
    }
    out
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// The type's number, then the value; of an array, the type of its elements and their number.
fn put_value(out: &mut Vec<u8>, value: &Value) {
    const I32: u32 = 5;
    const F32: u32 = 6;
    const TEXT: u32 = 8;
    fn start_array(out: &mut Vec<u8>, element: u32, len: usize) {
        out.extend(9u32.to_le_bytes());
        out.extend(element.to_le_bytes());
        out.extend((len as u64).to_le_bytes());
    }
    match value {
        Value::U32(value) => {
            out.extend(4u32.to_le_bytes());
            out.extend(value.to_le_bytes());
        }
        Value::F32(value) => {
            out.extend(F32.to_le_bytes());
            out.extend(value.to_le_bytes());
        }
        Value::Bool(value) => {
            out.extend(7u32.to_le_bytes());
            out.push(u8::from(*value));
        }
        Value::Text(text) => {
            out.extend(TEXT.to_le_bytes());
            put_text(out, text);
        }
        Value::I32s(values) => {
            start_array(out, I32, values.len());
            values.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
        Value::F32s(values) => {
            start_array(out, F32, values.len());
            values.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
        Value::Texts(texts) => {
            start_array(out, TEXT, texts.len());
            texts.iter().for_each(|text| put_text(out, text));
        }
    }
}
