//! One safetensors file in memory: mapped, its header checked, its tensors handed out as slices of the mapping.
//!
//! Layout: u64 header length, JSON header, tensor bytes; offsets count from the end of the header.
//! Source: the safetensors format (`safetensors` crate, which parses and validates the header).

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use candle_core::DType;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};

use super::file_watch::WatchedFile;
use super::mapping::{Mapping, aligned};
use super::safetensors_writer::{not_floats, read_float};
use crate::quant::DenseTensor;
use crate::{Error, Result};

/// A mapped safetensors file.
#[derive(Debug)]
pub struct MappedFile {
    watched: WatchedFile,
    map: Mapping,
    /// The mapping behind the header.
    data: Bytes,
    header: Metadata,
}

impl MappedFile {
    /// Maps the file at `path`, which must not be changed while it is mapped: [`Checkpoint::watch`] tells whether it was,
    /// and [`mapped_path_at`] which file a SIGBUS comes from.
    ///
    /// [`Checkpoint::watch`]: super::Checkpoint::watch
    /// [`mapped_path_at`]: super::mapped_path_at
    ///
    /// # Errors
    /// [`Error::Malformed`] if it is empty or truncated, or its header does not cover its bytes exactly once.
    pub fn open(path: &Path) -> Result<Self> {
        let (map, file) = Mapping::open(path)?;
        let (header_bytes, header) = SafeTensors::read_metadata(map.all()).map_err(|error| {
            Error::malformed(
                path,
                format!("is not a complete safetensors file: {error}; download or copy it again"),
            )
        })?;
        let data = map.bytes_from(size_of::<u64>() + header_bytes);
        Ok(Self {
            watched: WatchedFile::new(path, file)?,
            map,
            data,
            header,
        })
    }

    pub fn path(&self) -> &Path {
        self.map.path()
    }

    /// The names of its tensors, in the order of their bytes.
    pub fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    /// The header's `__metadata__`.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.header
            .metadata()
            .as_ref()?
            .get(key)
            .map(String::as_str)
    }

    /// Type, shape and place of a tensor.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.header.info(name).ok_or_else(|| Error::MissingTensor {
            path: self.path().to_path_buf(),
            tensor: name.to_string(),
        })
    }

    /// All tensors by name.
    ///
    /// # Errors
    /// Those of [`tensor`](Self::tensor).
    pub fn tensors(&self) -> Result<BTreeMap<String, DenseTensor>> {
        let named = |name: String| {
            let tensor = self.tensor(&name)?;
            Ok((name, tensor))
        };
        self.names().into_iter().map(named).collect()
    }

    /// All tensors by name, codes of 8 bits among them.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] for one that is neither u8, bf16, f16 nor f32.
    pub fn tensors_and_codes(&self) -> Result<BTreeMap<String, DenseTensor>> {
        let named = |name: String| {
            let info = self.info(&name)?;
            let tensor = match info.dtype {
                Dtype::U8 => DenseTensor {
                    dtype: DType::U8,
                    shape: info.shape.clone(),
                    data: self.bytes(&name)?,
                },
                _ => self.tensor(&name)?,
            };
            Ok((name, tensor))
        };
        self.names().into_iter().map(named).collect()
    }

    /// The bytes of a tensor, whatever its type.
    pub fn bytes(&self, name: &str) -> Result<Bytes> {
        let (start, end) = self.info(name)?.data_offsets;
        Ok(self.data.slice(start..end))
    }

    /// Gives the memory of a tensor's pages back; they are read from the file again when they are touched.
    pub fn release(&self, name: &str) -> Result<()> {
        let (start, end) = self.info(name)?.data_offsets;
        let offset = self.header_bytes() + start;
        self.map.release(offset..offset + end - start)
    }

    pub(super) fn watched(&self) -> &WatchedFile {
        &self.watched
    }

    /// The whole file.
    pub(super) fn all_bytes(&self) -> &[u8] {
        self.map.all()
    }

    /// How many bytes stand before those of the tensors.
    pub(super) fn header_bytes(&self) -> usize {
        self.all_bytes().len() - self.data.len()
    }

    /// A tensor of real numbers, aligned for its type: a slice of the mapping, or a copy where the file misaligned it.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::TensorMismatch`] if it is not bf16, f16 or f32.
    pub fn tensor(&self, name: &str) -> Result<DenseTensor> {
        let info = self.info(name)?;
        let dtype = read_float(info.dtype).ok_or_else(|| {
            not_floats(
                name,
                format!("{:?} in {}", info.dtype, self.path().display()),
            )
        })?;
        Ok(DenseTensor {
            dtype,
            shape: info.shape.clone(),
            data: aligned(self.bytes(name)?, dtype.size_in_bytes()),
        })
    }
}
