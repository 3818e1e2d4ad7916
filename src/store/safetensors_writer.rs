//! Writes a safetensors file tensor by tensor: never more than one of them in memory.
//!
//! The space for the header is kept free first, from the specs; the header is written last and padded with spaces, as the
//! format allows. Layout: u64 header length, JSON header, tensor bytes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

use candle_core::DType;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::atomic::AtomicFile;
use crate::quant::DenseTensor;
use crate::{Error, Result};

/// A multiple of this makes the first tensor aligned for every type.
const HEADER_ALIGNMENT: usize = 8;

/// The types of real numbers, as they are read and as they are stored.
const FLOAT_TYPES: [(DType, Dtype); 3] = [
    (DType::F32, Dtype::F32),
    (DType::BF16, Dtype::BF16),
    (DType::F16, Dtype::F16),
];

/// Name, type and shape of a tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl TensorSpec {
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: Vec<usize>) -> Self {
        Self {
            name: name.into(),
            dtype,
            shape,
        }
    }

    /// Of real numbers.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] for a `dtype` that is neither bf16, f16 nor f32.
    pub fn of_floats(name: impl Into<String>, dtype: DType, shape: Vec<usize>) -> Result<Self> {
        let name = name.into();
        match stored_float(dtype) {
            Some(dtype) => Ok(Self { name, dtype, shape }),
            None => Err(not_floats(name, dtype.as_str())),
        }
    }

    /// What its real numbers are read as.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] if they are neither bf16, f16 nor f32.
    pub fn float_type(&self) -> Result<DType> {
        read_float(self.dtype).ok_or_else(|| not_floats(&self.name, format!("{:?}", self.dtype)))
    }

    pub fn nbytes(&self) -> usize {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize()).div_ceil(8)
    }
}

/// A safetensors file being written; it appears under its name with [`finish`](Self::finish).
#[derive(Debug)]
pub struct SafetensorsWriter {
    file: AtomicFile,
    header_bytes: usize,
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, TensorInfo)>,
    data_bytes: usize,
}

impl SafetensorsWriter {
    /// Starts the file at `path`, which is to hold the tensors `planned`, in that order. A tensor may turn out smaller.
    pub fn create(
        path: impl AsRef<Path>,
        planned: &[TensorSpec],
        metadata: BTreeMap<String, String>,
    ) -> Result<Self> {
        let mut writer = Self {
            file: AtomicFile::create(path)?,
            header_bytes: 0,
            metadata,
            tensors: Vec::with_capacity(planned.len()),
            data_bytes: 0,
        };
        for spec in planned {
            writer.place(spec);
        }
        writer.header_bytes = writer.header()?.len().next_multiple_of(HEADER_ALIGNMENT);
        writer.tensors.clear();
        writer.data_bytes = 0;
        let start = (size_of::<u64>() + writer.header_bytes) as u64;
        writer.io(|file| file.seek(SeekFrom::Start(start)).map(drop))?;
        Ok(writer)
    }

    /// Writes a whole file of `tensors`, in f32 and in the order of their names.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_f32(
        path: impl AsRef<Path>,
        tensors: &BTreeMap<String, DenseTensor>,
        metadata: BTreeMap<String, String>,
    ) -> Result<()> {
        let spec = |(name, tensor): (&String, &DenseTensor)| {
            TensorSpec::new(name, Dtype::F32, tensor.shape.clone())
        };
        let specs: Vec<TensorSpec> = tensors.iter().map(spec).collect();
        let mut file = Self::create(path, &specs, metadata)?;
        for (spec, tensor) in specs.iter().zip(tensors.values()) {
            file.append(spec, &f32_bytes(tensor))?;
        }
        file.finish()
    }

    /// Appends a tensor.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] if `data` is not as long as the shape says or the name was written before.
    pub fn append(&mut self, spec: &TensorSpec, data: &[u8]) -> Result<()> {
        let mismatch = |expected: String, found: String| Error::TensorMismatch {
            tensor: spec.name.clone(),
            expected,
            found,
        };
        if data.len() != spec.nbytes() {
            return Err(mismatch(
                format!("{} bytes", spec.nbytes()),
                format!("{} bytes", data.len()),
            ));
        }
        if self.tensors.iter().any(|(name, _)| *name == spec.name) {
            return Err(mismatch(
                "one tensor of this name".into(),
                "a second one".into(),
            ));
        }
        self.place(spec);
        self.io(|file| file.write_all(data))
    }

    /// Leaves room for a tensor that reads as zeros and takes no space on disk, where the file system can.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn leave_hole(&mut self, spec: &TensorSpec) -> Result<()> {
        self.place(spec);
        let end = (size_of::<u64>() + self.header_bytes + self.data_bytes) as u64;
        self.io(|file| file.skip_to(end))
    }

    /// Writes the header and gives the file its name.
    ///
    /// # Errors
    /// [`Error::Malformed`] if more was written than planned, or in another order and the header does not fit.
    pub fn finish(mut self) -> Result<()> {
        let mut header = self.header()?;
        if header.len() > self.header_bytes {
            let reason = format!(
                "has a header of {} bytes, planned were {}",
                header.len(),
                self.header_bytes
            );
            return Err(Error::malformed(self.file.path(), reason));
        }
        header.resize(self.header_bytes, b' ');
        let length = (header.len() as u64).to_le_bytes();
        self.io(|file| {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&length)?;
            file.write_all(&header)
        })?;
        self.file.commit()
    }

    fn place(&mut self, spec: &TensorSpec) {
        let end = self.data_bytes + spec.nbytes();
        let info = TensorInfo {
            dtype: spec.dtype,
            shape: spec.shape.clone(),
            data_offsets: (self.data_bytes, end),
        };
        self.tensors.push((spec.name.clone(), info));
        self.data_bytes = end;
    }

    fn header(&self) -> Result<Vec<u8>> {
        header(&self.tensors, &self.metadata)
            .map_err(|error| Error::malformed(self.file.path(), error.to_string()))
    }

    fn io(&mut self, write: impl FnOnce(&mut AtomicFile) -> io::Result<()>) -> Result<()> {
        let result = write(&mut self.file);
        result.map_err(Error::io(self.file.path()))
    }
}

fn header(
    tensors: &[(String, TensorInfo)],
    metadata: &BTreeMap<String, String>,
) -> serde_json::Result<Vec<u8>> {
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), serde_json::to_value(metadata)?);
    }
    for (name, info) in tensors {
        header.insert(name.clone(), serde_json::to_value(info)?);
    }
    serde_json::to_vec(&header)
}

/// Writes a whole file of `tensors` to `out`, as they are and in the order of their names, from its first byte to its last.
///
/// # Errors
/// Those of `out`, and one for a type that safetensors does not have.
pub fn write_tensors(
    out: &mut dyn Write,
    tensors: &BTreeMap<String, DenseTensor>,
    metadata: &BTreeMap<String, String>,
) -> io::Result<()> {
    let mut infos = Vec::with_capacity(tensors.len());
    let mut start = 0;
    for (name, tensor) in tensors {
        let end = start + tensor.data.len();
        let info = TensorInfo {
            dtype: stored_type(tensor.dtype)?,
            shape: tensor.shape.clone(),
            data_offsets: (start, end),
        };
        infos.push((name.clone(), info));
        start = end;
    }
    let mut header = header(&infos, metadata)?;
    header.resize(header.len().next_multiple_of(HEADER_ALIGNMENT), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    tensors
        .values()
        .try_for_each(|tensor| out.write_all(&tensor.data))
}

pub(super) fn not_floats(tensor: impl Into<String>, found: impl Into<String>) -> Error {
    Error::TensorMismatch {
        tensor: tensor.into(),
        expected: "bf16, f16 or f32".into(),
        found: found.into(),
    }
}

fn stored_type(dtype: DType) -> io::Result<Dtype> {
    match dtype {
        DType::U8 => Ok(Dtype::U8),
        _ => stored_float(dtype).ok_or_else(|| {
            let name = dtype.as_str();
            io::Error::other(format!("a tensor of type {name} cannot be stored"))
        }),
    }
}

/// How real numbers are stored; `None` for another type.
fn stored_float(dtype: DType) -> Option<Dtype> {
    let known = FLOAT_TYPES.iter().find(|(read, _)| *read == dtype);
    known.map(|(_, stored)| *stored)
}

/// What real numbers are read as; `None` for another type.
pub(super) fn read_float(dtype: Dtype) -> Option<DType> {
    let known = FLOAT_TYPES.iter().find(|(_, stored)| *stored == dtype);
    known.map(|(read, _)| *read)
}

/// The little-endian f32 of a tensor; 16-bit types widen exactly.
fn f32_bytes(tensor: &DenseTensor) -> Cow<'_, [u8]> {
    match tensor.dtype {
        DType::F32 => tensor.data.as_ref().into(),
        _ => {
            let values = tensor.to_f32_vec();
            values.into_iter().flat_map(f32::to_le_bytes).collect()
        }
    }
}
