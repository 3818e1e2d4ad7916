//! A base weight, quantized or dense, behind one set of reads.

use std::ops::Range;

use super::{DenseTensor, FrozenWeight, Params4bit};
use crate::Result;

/// Rows of a tile that are fetched ahead: they lie too far apart for the processor to guess.
const ROWS_AHEAD: usize = 8;

impl FrozenWeight {
    /// `[out, in]`.
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::Quantized(Params4bit { shape, .. }) | Self::Dense(DenseTensor { shape, .. }) => {
                shape
            }
        }
    }

    /// The rows of the weight.
    pub fn out_features(&self) -> usize {
        self.shape().first().copied().unwrap_or(1)
    }

    /// The columns of the weight.
    pub fn in_features(&self) -> usize {
        self.shape().iter().skip(1).product()
    }

    /// The bytes that the weight occupies.
    pub fn nbytes(&self) -> usize {
        match self {
            Self::Quantized(weight) => weight.nbytes(),
            Self::Dense(weight) => weight.data.len(),
        }
    }

    /// Checks that the parts of the weight belong together.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`](crate::Error::TensorMismatch) with the weight's `name`.
    pub fn validate(&self, name: &str) -> Result<()> {
        match self {
            Self::Quantized(weight) => weight.validate(name),
            Self::Dense(weight) => weight.validate(name),
        }
    }

    /// Reads the flat elements `start..start + out.len()` in f32, on the calling thread.
    ///
    /// # Panics
    /// If the range leaves the weight, or the weight is not [valid](Self::validate).
    pub fn read_range(&self, start: usize, out: &mut [f32]) {
        match self {
            Self::Quantized(weight) => weight.dequantize_range(start, out),
            Self::Dense(weight) => weight.read_range(start, out),
        }
    }

    /// Reads a tile in f32, on the calling thread.
    ///
    /// # Shapes
    /// `out: [rows, cols]`, row-major.
    ///
    /// # Panics
    /// If the tile leaves the weight, `out` has another size, or the weight is not [valid](Self::validate).
    pub fn read_tile(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let (out_features, in_features) = (self.out_features(), self.in_features());
        assert!(
            rows.end <= out_features && cols.end <= in_features,
            "tile {rows:?} x {cols:?} lies in [{out_features}, {in_features}]"
        );
        assert_eq!(
            out.len(),
            rows.len() * cols.len(),
            "the output has the tile's shape"
        );
        if out.is_empty() {
            return;
        }
        if cols.len() == in_features {
            return self.read_range(rows.start * in_features, out);
        }
        let last = rows.end - 1;
        for (row, out) in rows.zip(out.chunks_exact_mut(cols.len())) {
            let ahead = last.min(row + ROWS_AHEAD) * in_features + cols.start;
            self.prefetch(ahead, cols.len());
            self.read_range(row * in_features + cols.start, out);
        }
    }

    /// Asks for the bytes of the flat elements `start..start + len` to be fetched into the cache.
    fn prefetch(&self, start: usize, len: usize) {
        let (data, bits) = match self {
            Self::Quantized(weight) => (&weight.packed, 4),
            Self::Dense(weight) => (&weight.data, 8 * weight.dtype.size_in_bytes()),
        };
        #[cfg(target_arch = "x86_64")]
        for line in data[start * bits / 8..(start + len) * bits / 8].chunks(64) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: every x86-64 has the instruction, and it reads nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
        }
    }
}
