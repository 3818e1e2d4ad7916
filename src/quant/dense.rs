//! Dense weights as stored: little-endian bf16, f16 or f32 bytes at any alignment, widened to f32 when read.

use bytes::Bytes;
use candle_core::DType;
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use super::{DenseTensor, isa::Isa};
use crate::{Error, Result};

/// Elements that a thread converts at a time.
const CHUNK: usize = 1 << 16;

impl DenseTensor {
    /// An f32 tensor with a copy of `values`, row-major.
    pub fn from_f32(shape: Vec<usize>, values: &[f32]) -> Self {
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self {
            dtype: DType::F32,
            shape,
            data,
        }
    }

    /// An f32 tensor of `values`, row-major, which are not copied.
    pub fn from_f32_vec(shape: Vec<usize>, values: Vec<f32>) -> Self {
        Self {
            dtype: DType::F32,
            shape,
            data: Bytes::from_owner(Values(values)),
        }
    }

    /// A bf16 tensor with a copy of `values`, row-major.
    pub fn from_bf16(shape: Vec<usize>, values: &[bf16]) -> Self {
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self {
            dtype: DType::BF16,
            shape,
            data,
        }
    }

    /// An f16 tensor with a copy of `values`, row-major.
    pub fn from_f16(shape: Vec<usize>, values: &[f16]) -> Self {
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self {
            dtype: DType::F16,
            shape,
            data,
        }
    }

    /// The number of elements of a valid tensor.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Checks that the type is a float and that `data` has exactly the bytes of `shape`.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] with the tensor's `name`.
    pub fn validate(&self, name: &str) -> Result<()> {
        let mismatch = |expected: String, found: String| Error::TensorMismatch {
            tensor: name.to_owned(),
            expected,
            found,
        };
        if !matches!(self.dtype, DType::F32 | DType::BF16 | DType::F16) {
            return Err(mismatch(
                "bf16, f16 or f32".to_owned(),
                self.dtype.as_str().to_owned(),
            ));
        }
        let nbytes = checked_numel(&self.shape)
            .and_then(|n| n.checked_mul(self.dtype.size_in_bytes()))
            .ok_or_else(|| {
                mismatch(
                    "a shape that fits in memory".to_owned(),
                    format!("{:?}", self.shape),
                )
            })?;
        if self.data.len() != nbytes {
            return Err(mismatch(
                format!(
                    "{nbytes} bytes for {} {:?}",
                    self.dtype.as_str(),
                    self.shape
                ),
                format!("{} bytes", self.data.len()),
            ));
        }
        Ok(())
    }

    /// The same numbers in f32; the bytes are shared where they are that already.
    pub fn to_f32(&self) -> Self {
        match self.dtype {
            DType::F32 => self.clone(),
            _ => Self::from_f32(self.shape.clone(), &self.to_f32_vec()),
        }
    }

    /// The numbers in `dtype`, bf16, f16 or f32, to nearest even; the bytes are shared where they are that already.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] with the tensor's `name` for a number that is not finite in `dtype`.
    pub fn to_dtype(&self, name: &str, dtype: DType) -> Result<Self> {
        if self.dtype == dtype {
            return Ok(self.clone());
        }
        let mut values = vec![0f32; self.numel()];
        let mut bytes = vec![0u8; values.len() * dtype.size_in_bytes()];
        let chunks = values.par_chunks_mut(CHUNK);
        let chunks = chunks.zip(bytes.par_chunks_mut(CHUNK * dtype.size_in_bytes()));
        chunks
            .enumerate()
            .try_for_each(|(chunk, (values, bytes))| {
                self.read_range(chunk * CHUNK, values);
                write_floats(values, dtype, bytes).map_err(|at| Error::TensorMismatch {
                    tensor: name.to_owned(),
                    expected: format!("numbers that {} can hold", dtype.as_str()),
                    found: values[at].to_string(),
                })
            })?;
        Ok(Self {
            dtype,
            shape: self.shape.clone(),
            data: bytes.into(),
        })
    }

    /// All elements, widened to f32.
    pub fn to_f32_vec(&self) -> Vec<f32> {
        let mut values = vec![0f32; self.numel()];
        self.read_range(0, &mut values);
        values
    }

    /// Widens the flat elements `start..start + out.len()` to f32, exactly.
    ///
    /// # Panics
    /// If the range leaves the tensor, or the type is not one that [`validate`](Self::validate) accepts.
    pub fn read_range(&self, start: usize, out: &mut [f32]) {
        let size = self.dtype.size_in_bytes();
        let bytes = &self.data[start * size..(start + out.len()) * size];
        match self.dtype {
            DType::F32 => read_f32(bytes, out),
            DType::BF16 => read_bf16(bytes, out),
            DType::F16 => match Isa::detect() {
                // SAFETY: `Isa` says that the processor has the instructions.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => unsafe { read_f16_avx512(bytes, out) },
                _ => read_f16(bytes, out),
            },
            other => panic!("a {} tensor is not a dense weight", other.as_str()),
        }
    }
}

/// Writes the little-endian bytes of `values` in `dtype`, bf16, f16 or f32, to nearest even. The error is the place of the first
/// that is not finite then.
///
/// # Panics
/// If `bytes` has another length.
pub(crate) fn write_floats(values: &[f32], dtype: DType, bytes: &mut [u8]) -> Result<(), usize> {
    match dtype {
        DType::BF16 => write_each(values, bytes, |v| {
            let v = bf16::from_f32(v);
            (v.to_le_bytes(), v.is_finite())
        }),
        DType::F16 => write_each(values, bytes, |v| {
            let v = f16::from_f32(v);
            (v.to_le_bytes(), v.is_finite())
        }),
        _ => write_each(values, bytes, |v| (v.to_le_bytes(), v.is_finite())),
    }
}

/// Writes each value as `stored` gives it, with whether it is finite then.
fn write_each<const BYTES: usize>(
    values: &[f32],
    bytes: &mut [u8],
    stored: impl Fn(f32) -> ([u8; BYTES], bool),
) -> Result<(), usize> {
    assert_eq!(
        bytes.len(),
        BYTES * values.len(),
        "every value has its bytes"
    );
    let places = bytes.as_chunks_mut().0.iter_mut();
    for (at, (&value, bytes)) in values.iter().zip(places).enumerate() {
        let is_finite;
        (*bytes, is_finite) = stored(value);
        if !is_finite {
            return Err(at);
        }
    }
    Ok(())
}

/// What owns the memory of an f32 tensor.
struct Values(Vec<f32>);

impl AsRef<[u8]> for Values {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// The product of `shape`, unless it overflows.
pub(super) fn checked_numel(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}

fn read_f32(bytes: &[u8], out: &mut [f32]) {
    let (values, _) = bytes.as_chunks();
    for (out, &value) in out.iter_mut().zip(values) {
        *out = f32::from_le_bytes(value);
    }
}

fn read_bf16(bytes: &[u8], out: &mut [f32]) {
    let (values, _) = bytes.as_chunks();
    for (out, &value) in out.iter_mut().zip(values) {
        *out = f32::from_bits(u32::from(u16::from_le_bytes(value)) << 16);
    }
}

fn read_f16(bytes: &[u8], out: &mut [f32]) {
    let (values, _) = bytes.as_chunks();
    let mut aligned = [f16::ZERO; 256];
    for (out, values) in out
        .chunks_mut(aligned.len())
        .zip(values.chunks(aligned.len()))
    {
        let aligned = &mut aligned[..values.len()];
        for (aligned, &value) in aligned.iter_mut().zip(values) {
            *aligned = f16::from_le_bytes(value);
        }
        aligned.convert_to_f32_slice(out);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn read_f16_avx512(bytes: &[u8], out: &mut [f32]) {
    use std::arch::x86_64::{_mm256_loadu_si256, _mm512_cvtph_ps, _mm512_storeu_ps};

    let (groups, rest) = out.as_chunks_mut::<16>();
    let (bytes, rest_bytes) = bytes.split_at(groups.len() * 32);
    for (out, bytes) in groups.iter_mut().zip(bytes.as_chunks::<32>().0) {
        // SAFETY: reads the 32 bytes of one array and writes the 16 values of the other, at any alignment.
        unsafe {
            let values = _mm256_loadu_si256(bytes.as_ptr().cast());
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_cvtph_ps(values));
        }
    }
    read_f16(rest_bytes, rest);
}
