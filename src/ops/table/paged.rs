//! A frozen table in host memory, of which some words at a time are on the device.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::super::paged::{self, PagedTensor, Pager, Purpose};
use crate::Result;
use crate::quant::FrozenWeight;

/// Bytes of the words that visit the device together: enough for the bus to be at its speed.
const VISIT_BYTES: usize = 8 << 20;

/// The rows of all words in bf16 in pinned memory of the host, `[V, D]`, and slots on the device for those that visit it.
#[derive(Debug)]
pub struct PagedTable {
    values: PagedTensor,
    pager: Mutex<Pager>,
    words: usize,
    width: usize,
    /// Words that visit the device together.
    together: usize,
}

impl PagedTable {
    /// Copies `table` to pinned memory.
    ///
    /// # Errors
    /// [`Error::OutOfDeviceMemory`](crate::Error::OutOfDeviceMemory) where the slots do not fit, and what the driver of `device`
    /// reports.
    pub fn new(table: &FrozenWeight, device: &Device) -> Result<Self> {
        let together = words_together(table.out_features(), table.in_features());
        Self::visiting(table, together, device)
    }

    /// The same with so many words that visit the device together.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn visiting(table: &FrozenWeight, together: usize, device: &Device) -> Result<Self> {
        let (words, width) = (table.out_features(), table.in_features());
        let values = PagedTensor::zeros(words * width, DType::BF16, device)?;
        values.with_bytes(0..words * width, |bytes| {
            let rows = bytes.par_chunks_exact_mut(2 * width).enumerate();
            rows.for_each_init(
                || vec![0.0; width],
                |row, (word, bytes)| {
                    table.read_tile(word..word + 1, 0..width, row);
                    for (bytes, &value) in bytes.chunks_exact_mut(2).zip(&*row) {
                        bytes.copy_from_slice(&bf16::from_f32(value).to_ne_bytes());
                    }
                },
            );
        })?;
        let slot = [(DType::BF16, together * width)];
        Ok(Self {
            values,
            pager: Mutex::new(Pager::new(&slot, device)?),
            words,
            width,
            together,
        })
    }

    /// Its words and the width of a row.
    pub(super) fn dims(&self) -> (usize, usize) {
        (self.words, self.width)
    }

    pub(super) fn device(&self) -> &Device {
        self.values.device()
    }

    /// Bytes of the slots for a table of this size.
    pub fn slot_bytes(words: usize, width: usize) -> u64 {
        (paged::SLOTS * 2 * words_together(words, width) * width) as u64
    }

    /// Gives `f` the rows of some words after others, in order, to be used by what it queues; the next ones come meanwhile.
    ///
    /// # Shapes
    /// `[words, D]` in bf16.
    pub(super) fn for_each_visit(
        &self,
        mut f: impl FnMut(Range<usize>, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let mut pager = self.pager.lock().unwrap_or_else(PoisonError::into_inner);
        let starts = (0..self.words).step_by(self.together);
        let visits = starts.map(|start| {
            let words = start..self.words.min(start + self.together);
            let values = words.start * self.width..words.end * self.width;
            (words, vec![(&self.values, values)])
        });
        pager.for_each(Purpose::Read, visits, |words, tensors| {
            let rows = tensors[0].reshape((words.len(), self.width))?;
            f(words, &rows)
        })
    }
}

/// Words that visit the device together, of a table of this size.
fn words_together(words: usize, width: usize) -> usize {
    (VISIT_BYTES / (2 * width)).clamp(1, words.max(1))
}
