//! A matrix with a row for each word of a vocabulary, that of the embedding or of the head: frozen, or trained.

mod paged;

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::cpu::{Read, read};
use super::gemm::{Mat, Rhs, Window};
use super::launcher::Launcher;
use super::weight::Weight;
use crate::device::ComputeDtype;
use crate::{Error, Result};

pub use paged::PagedTable;

/// The rows of all words, `[V, D]`.
#[derive(Debug, Clone, Copy)]
pub enum Table<'a> {
    Frozen(&'a Weight),
    /// Frozen, for kernels, but on the host.
    Paged(&'a PagedTable),
    /// As the optimizer leaves it: f32 on the CPU, bf16 for kernels. With the type of products on the CPU.
    Trained(&'a Tensor, ComputeDtype),
}

impl<'a> From<&'a Weight> for Table<'a> {
    fn from(weight: &'a Weight) -> Self {
        Self::Frozen(weight)
    }
}

impl<'a> Table<'a> {
    /// Its words and the width of a row.
    pub(super) fn dims(self) -> Result<(usize, usize)> {
        match self {
            Self::Frozen(weight) => Ok((weight.out_features(), weight.in_features())),
            Self::Paged(table) => Ok(table.dims()),
            Self::Trained(values, _) => Ok(values.dims2()?),
        }
    }

    /// The device that kernels read it on; `None` where it is on the host.
    pub(super) fn device(self) -> Option<&'a Device> {
        match self {
            Self::Frozen(weight) => weight.device(),
            Self::Paged(table) => Some(table.device()),
            Self::Trained(values, _) => {
                Launcher::of("table", values).ok()?.map(|_| values.device())
            }
        }
    }

    /// What kernels read, in bf16, where all of it is on the device.
    pub(super) fn dense(self, launcher: &Launcher) -> Result<Tensor> {
        match self {
            Self::Frozen(weight) => weight.dense(launcher),
            Self::Paged(_) => Err(on_the_host("table")),
            Self::Trained(values, _) => Ok(values.clone()),
        }
    }

    /// Whether only a part of it is on the device at a time.
    pub(super) fn is_paged(self) -> bool {
        matches!(self, Self::Paged(_))
    }

    /// Gives `f` the rows of some words after others, in order and in bf16: all at once where they are on the device.
    pub(super) fn for_each_part(
        self,
        launcher: &Launcher,
        mut f: impl FnMut(Range<usize>, &Tensor) -> Result<()>,
    ) -> Result<()> {
        match self {
            Self::Paged(table) => table.for_each_visit(f),
            Self::Frozen(_) | Self::Trained(..) => {
                let rows = self.dense(launcher)?;
                f(0..rows.dim(0)?, &rows)
            }
        }
    }

    /// What the CPU reads.
    pub(super) fn on_cpu(self, op: &'static str) -> Result<CpuTable<'a>> {
        Ok(match self {
            Self::Frozen(weight) => CpuTable::Frozen(weight),
            Self::Paged(_) => return Err(on_the_host(op)),
            Self::Trained(values, compute_dtype) => {
                let (words, width) = values.dims2()?;
                CpuTable::Trained {
                    values: read(op, values)?,
                    words,
                    width,
                    compute_dtype,
                }
            }
        })
    }
}

fn on_the_host(op: &'static str) -> Error {
    Error::Shape {
        op,
        expected: "a table whose rows are all there".into(),
        found: "one that visits the device in parts".into(),
    }
}

/// A table in host memory.
pub(super) enum CpuTable<'a> {
    Frozen(&'a Weight),
    Trained {
        values: Read<'a>,
        words: usize,
        width: usize,
        compute_dtype: ComputeDtype,
    },
}

impl CpuTable<'_> {
    /// Of products with it.
    pub(super) fn compute_dtype(&self) -> ComputeDtype {
        match self {
            Self::Frozen(weight) => weight.compute_dtype(),
            Self::Trained { compute_dtype, .. } => *compute_dtype,
        }
    }

    pub(super) fn words(&self) -> usize {
        match self {
            Self::Frozen(weight) => weight.out_features(),
            Self::Trained { words, .. } => *words,
        }
    }

    pub(super) fn width(&self) -> usize {
        match self {
            Self::Frozen(weight) => weight.in_features(),
            Self::Trained { width, .. } => *width,
        }
    }

    /// Copies the row of a word.
    pub(super) fn read_row(&self, word: usize, row: &mut [f32]) {
        match self {
            Self::Frozen(weight) => weight.read_tile(word..word + 1, 0..row.len(), row),
            Self::Trained { values, width, .. } => {
                row.copy_from_slice(&values[word * width..][..*width])
            }
        }
    }

    /// Columns of the rows of some words, as the right-hand side of a product: `[words, cols]`.
    pub(super) fn part(&self, words: Range<usize>, cols: Range<usize>) -> Rhs<'_> {
        match self {
            Self::Frozen(weight) => Rhs::Weight(Window {
                weight,
                outs: words,
                ins: cols,
            }),
            Self::Trained { values, width, .. } => {
                let rows = Mat::new(values, self.words(), *width).rows(words);
                rows.cols(cols).into()
            }
        }
    }

    /// The transposed rows of some words: `[D, words]`.
    pub(super) fn transposed(&self, words: Range<usize>) -> Rhs<'_> {
        match self {
            Self::Frozen(weight) => Rhs::Transposed(Window {
                weight,
                outs: words,
                ins: 0..weight.in_features(),
            }),
            Self::Trained { values, width, .. } => {
                let rows = Mat::new(values, self.words(), *width).rows(words);
                rows.t().into()
            }
        }
    }
}
