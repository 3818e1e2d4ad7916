//! Dropout on an adapter's matrices (LoRA Dropout): input features are dropped from A, whole columns of it, and output
//! features from B, whole rows. The rank is never touched.
//!
//! With masks `m_A: [in]` and `m_B: [out]` of 0 and 1, where a 1 has probability 1 - p, the adapter computes with
//! `A' = A m_A` and `B' = m_B B`, and its output is multiplied by `1/(1-p)` for each of the two, so that its mean is that of
//! the plain adapter. An entry of `B' A'` is zero with probability `2p - p^2`. Backward: `dA += dA' m_A`, `dB += m_B dB'`.
//!
//! Masks are those of [`dropout`](super::dropout), for a vector of features: made again wherever they are needed, from
//! (seed, optimizer step, micro-batch), instance, layer, module, factor and feature. `cuda/matrix_dropout.cu` makes the same.
//!
//! Source: arXiv:2404.09610.

use candle_core::{DType, Tensor};

use super::cpu::{self, expect_dims, read};
use super::dropout::{Dropout, Mask};
use super::launcher::{Launcher, Operand, expect_dtype};
use crate::Result;

const OP: &str = "matrix_dropout";
/// Elements that a thread of the kernels takes at a time.
const PER_THREAD: usize = 8;
/// Tells the keys of training masks from other uses of the seed: "mtrx".
const TRAINING: u32 = 0x6d74_7278;
/// And those of the models of an ensemble: "ense".
const ENSEMBLE: u32 = 0x656e_7365;

/// What the masks of one micro-batch are made from, for each of its instances.
///
/// An instance is a copy of the micro-batch's sequences with masks of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatrixDropout {
    dropout: Dropout,
    first_instance: usize,
    instances: usize,
}

impl MatrixDropout {
    /// Dropout with probability `p`, from 0 to less than 1, rounded to 1/65536; `None` where nothing is dropped.
    ///
    /// `step` is the number of optimizer steps done, `micro_batch` counts within the step.
    pub fn new(
        p: f64,
        seed: u64,
        (step, micro_batch): (usize, usize),
        instances: usize,
    ) -> Option<Self> {
        let dropout = Dropout::for_purpose(p, seed, (step, micro_batch), TRAINING)?;
        Some(Self {
            dropout,
            first_instance: 0,
            instances,
        })
    }

    /// The masks of the models of a test-time ensemble: model number i has those of instance i.
    pub fn ensemble(p: f64, seed: u64, models: usize) -> Option<Self> {
        let dropout = Dropout::for_purpose(p, seed, (0, 0), ENSEMBLE)?;
        Some(Self {
            dropout,
            first_instance: 0,
            instances: models,
        })
    }

    /// How many instances a micro-batch has.
    pub fn instances(&self) -> usize {
        self.instances
    }

    /// A micro-batch of this instance alone.
    pub fn instance(&self, number: usize) -> Self {
        Self {
            first_instance: self.first_instance + number,
            instances: 1,
            ..*self
        }
    }

    /// The masks of an adapter in one of the instances.
    pub fn masks(&self, layer: usize, module: usize, instance: usize) -> FactorMasks {
        let dropout = self.dropout.of_instance(self.first_instance + instance);
        let [a, b] = [0, 1].map(|factor| dropout.mask(layer, 2 * module + factor));
        FactorMasks { a, b }
    }

    /// The share of an adapter's output that `p` leaves in the mean: `(1-p)^2`, for the `p` that is rounded to.
    pub fn kept_share(p: f64) -> f64 {
        let dropout = Dropout::for_purpose(p, 0, (0, 0), TRAINING);
        let keep = dropout.map_or(1.0, |dropout| 1.0 - dropout.p());
        keep * keep
    }
}

/// The masks of the two factors of an adapter: of A's columns and of B's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FactorMasks {
    pub a: Mask,
    pub b: Mask,
}

impl FactorMasks {
    /// What the adapter's output is multiplied by, for both factors.
    pub fn scale(&self) -> f32 {
        self.a.keep_scale() * self.b.keep_scale()
    }

    fn operands(&self) -> [Operand<'static>; 6] {
        let ([k0, k1], [layer, a], [_, b]) = (self.a.key, self.a.stream, self.b.stream);
        [k0, k1, layer, a, b, self.a.threshold].map(|word| Operand::U32(word as usize))
    }
}

/// Copies of the factors without what is dropped; they are not scaled, [`FactorMasks::scale`] is for the product.
///
/// # Shapes
/// `a: [R, in]`, `b: [out, R]`.
pub fn forward(a: &Tensor, b: &Tensor, masks: &FactorMasks) -> Result<(Tensor, Tensor)> {
    let ((r, d_in), d_out) = (a.dims2()?, b.dim(0)?);
    expect_dims(OP, "lora_b", b, &[d_out, r])?;
    if let Some(launcher) = Launcher::of(OP, a)? {
        return forward_on_device(&launcher, a, b, masks);
    }
    let (columns, rows) = (masks.a.kept(d_in), masks.b.kept(d_out));
    let (a, b) = (read(OP, a)?, read(OP, b)?);
    let masked_a = cpu::build((r, d_in), |masked| {
        for (masked, a) in masked.chunks_exact_mut(d_in).zip(a.chunks_exact(d_in)) {
            for ((masked, a), kept) in masked.iter_mut().zip(a).zip(&columns) {
                *masked = if *kept { *a } else { 0.0 };
            }
        }
    })?;
    let masked_b = cpu::build((d_out, r), |masked| {
        let rows = masked.chunks_exact_mut(r).zip(b.chunks_exact(r)).zip(&rows);
        for ((masked, b), kept) in rows {
            match kept {
                true => masked.copy_from_slice(b),
                false => masked.fill(0.0),
            }
        }
    })?;
    Ok((masked_a, masked_b))
}

/// The gradients of an adapter's factors, shaped as these, in f32.
pub type FactorGrads<'a> = (&'a Tensor, &'a Tensor);

/// Adds what is kept of the masked factors' gradients to those of the factors: nothing at all where a feature is dropped.
///
/// # Shapes
/// `a: [R, in]`, on the device that computes; `masked`, `sum`: of `[R, in]` and `[out, R]`.
pub fn backward(
    a: &Tensor,
    masked: FactorGrads<'_>,
    masks: &FactorMasks,
    sum: FactorGrads<'_>,
) -> Result<()> {
    let ((r, d_in), d_out) = (a.dims2()?, sum.1.dim(0)?);
    for (name, t, shape) in [
        ("d_lora_a", sum.0, [r, d_in]),
        ("d_lora_b", sum.1, [d_out, r]),
        ("masked_d_lora_a", masked.0, [r, d_in]),
        ("masked_d_lora_b", masked.1, [d_out, r]),
    ] {
        expect_dims(OP, name, t, &shape)?;
        expect_dtype(OP, t, DType::F32)?;
    }
    if let Some(launcher) = Launcher::of(OP, a)? {
        return backward_on_device(&launcher, masked, masks, sum);
    }
    let (columns, rows) = (masks.a.kept(d_in), masks.b.kept(d_out));
    let (masked_a, masked_b) = (read(OP, masked.0)?, read(OP, masked.1)?);
    cpu::write(OP, sum.0, |d_a| {
        for (d_a, masked) in d_a.chunks_exact_mut(d_in).zip(masked_a.chunks_exact(d_in)) {
            add_kept(d_a, masked, columns.iter().copied());
        }
    })?;
    cpu::write(OP, sum.1, |d_b| {
        let outs = d_b.chunks_exact_mut(r).zip(masked_b.chunks_exact(r));
        for ((d_b, masked), &kept) in outs.zip(&rows) {
            add_kept(d_b, masked, std::iter::repeat(kept));
        }
    })
}

fn add_kept(sum: &mut [f32], values: &[f32], kept: impl Iterator<Item = bool>) {
    for ((sum, value), kept) in sum.iter_mut().zip(values).zip(kept) {
        if kept {
            *sum += value;
        }
    }
}

fn forward_on_device(
    launcher: &Launcher,
    a: &Tensor,
    b: &Tensor,
    masks: &FactorMasks,
) -> Result<(Tensor, Tensor)> {
    let ((r, d_in), d_out) = (a.dims2()?, b.dim(0)?);
    let masked_a = launcher.empty((r, d_in), DType::BF16)?;
    let masked_b = launcher.empty((d_out, r), DType::BF16)?;
    let mut operands = vec![Operand::Read(a), Operand::Read(b)];
    operands.extend([d_in, d_out, r].map(Operand::U32));
    operands.extend(masks.operands());
    operands.extend([Operand::Write(&masked_a), Operand::Write(&masked_b)]);
    let grid = launcher.grid_stride(r * (d_in + d_out), PER_THREAD);
    // SAFETY: the tensors have these sizes.
    unsafe { launcher.launch("matrix_dropout_forward_bf16", grid, &operands)? };
    Ok((masked_a, masked_b))
}

fn backward_on_device(
    launcher: &Launcher,
    masked: FactorGrads<'_>,
    masks: &FactorMasks,
    sum: FactorGrads<'_>,
) -> Result<()> {
    let ((r, d_in), d_out) = (sum.0.dims2()?, sum.1.dim(0)?);
    let mut operands = vec![Operand::Read(masked.0), Operand::Read(masked.1)];
    operands.extend([d_in, d_out, r].map(Operand::U32));
    operands.extend(masks.operands());
    operands.extend([Operand::Write(sum.0), Operand::Write(sum.1)]);
    let grid = launcher.grid_stride(r * (d_in + d_out), PER_THREAD);
    // SAFETY: the tensors have these sizes.
    unsafe { launcher.launch("matrix_dropout_backward_f32", grid, &operands) }
}

/// The masks of `a: [R, in]` and `b: [out, R]` as factors to be multiplied, `[1, in]` and `[out, 1]`, scale included, in f64.
pub fn reference(masks: &FactorMasks, d_in: usize, d_out: usize) -> Result<(Tensor, Tensor)> {
    Ok((
        masks.a.reference(1, d_in)?,
        masks.b.reference(1, d_out)?.reshape((d_out, 1))?,
    ))
}
