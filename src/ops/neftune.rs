//! NEFTune: uniform noise on the token embeddings in training, `x += alpha / sqrt(T D) noise` with `noise` in [-1, 1).
//!
//! T is the length of the row's own sequence; transformers counts the padding too, of which there is none here. Like a
//! dropout mask the noise is a function of (seed, optimizer step, micro-batch, element): one call of Philox gives that of four
//! elements, by the upper 24 bits of its words. Its backward is that of an addition: nothing.
//!
//! Source: arXiv:2310.05914.

use candle_core::Tensor;
use rayon::prelude::*;

use super::cpu::{self, ROWS_PER_TASK, expect_dims};
use super::launcher::{Launcher, Operand};
use super::philox::{micro_batch_key, philox};
use crate::{Error, Result};

const OP: &str = "neftune";
/// Elements whose noise comes from one call.
const PER_CALL: usize = 4;
/// Tells the keys of the noise from other uses of the seed: "nois".
const PURPOSE: u32 = 0x6e6f_6973;

/// What the noise of one micro-batch is made from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Noise {
    key: [u32; 2],
    alpha: f64,
}

impl Noise {
    /// `None` where `alpha` is 0. `step` is the number of optimizer steps done, `micro_batch` counts within the step.
    pub fn new(alpha: f64, seed: u64, step: usize, micro_batch: usize) -> Option<Self> {
        let key = micro_batch_key(seed, step, micro_batch, PURPOSE);
        (alpha > 0.0).then_some(Self { key, alpha })
    }

    /// The same for embeddings that are held in units of `unit`.
    pub fn in_units_of(self, unit: f64) -> Self {
        let alpha = self.alpha / unit;
        Self { alpha, ..self }
    }

    /// The noise of element `element`, in [-1, 1).
    fn number(&self, element: usize) -> f32 {
        let call = (element / PER_CALL) as u64;
        let words = philox(self.key, [call as u32, (call >> 32) as u32, 0, 0]);
        (words[element % PER_CALL] >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    /// The largest noise of each row.
    fn scales(&self, d: usize, cu_seqlens: &[usize]) -> Vec<f32> {
        let of_sequence = |bounds: &[usize]| {
            let tokens = bounds[1] - bounds[0];
            let scale = self.alpha / ((tokens * d) as f64).sqrt();
            std::iter::repeat_n(scale as f32, tokens)
        };
        cu_seqlens.windows(2).flat_map(of_sequence).collect()
    }
}

/// Adds the noise in place.
///
/// # Shapes
/// `x: [N, D]`, `cu_seqlens: [B + 1]` from 0 to N.
pub fn forward(x: &Tensor, noise: Noise, cu_seqlens: &[usize]) -> Result<()> {
    let (n, d) = x.dims2()?;
    let scales = noise.scales(d, cu_seqlens);
    if scales.len() != n {
        return Err(Error::Shape {
            op: OP,
            expected: format!("sequences of {n} rows"),
            found: scales.len().to_string(),
        });
    }
    if let Some(launcher) = Launcher::of(OP, x)? {
        let scales = launcher.upload(&scales, n)?;
        return forward_on_device(&launcher, x, noise, &scales);
    }
    cpu::write(OP, x, |x| {
        let tasks = x.par_chunks_mut((ROWS_PER_TASK * d).max(1)).enumerate();
        tasks.for_each(|(task, rows)| {
            let first = task * ROWS_PER_TASK * d;
            for (i, x) in rows.iter_mut().enumerate() {
                let element = first + i;
                *x += scales[element / d] * noise.number(element);
            }
        });
    })
}

fn forward_on_device(launcher: &Launcher, x: &Tensor, noise: Noise, scales: &Tensor) -> Result<()> {
    let (n, d) = x.dims2()?;
    expect_dims(OP, "scales", scales, &[n])?;
    let operands = [
        Operand::Write(x),
        Operand::Read(scales),
        Operand::U32(d),
        Operand::U64(n * d),
        Operand::U32(noise.key[0] as usize),
        Operand::U32(noise.key[1] as usize),
    ];
    let grid = launcher.grid_stride(n * d, PER_CALL);
    // SAFETY: x has n rows of d elements, and each row has a scale.
    unsafe { launcher.launch("neftune_forward_bf16", grid, &operands) }
}
