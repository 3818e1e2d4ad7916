//! AdamW: `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`, then
//! `w = w (1 - lr decay) - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)`.
//!
//! The decay is decoupled and comes first, and `eps` stands outside the corrected root, as in torch.
//!
//! On a device a weight is two halves, which together are an f32 master: the products read the upper half, which is the
//! master rounded to bf16.
//!
//! Source: arXiv:1711.05101.

pub mod moments_8bit;

use candle_core::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::cpu::{self, expect_dims, read};
use super::launcher::{Grid, Launcher, Operand};
use super::simd::vectorized;
use crate::{Error, Result};

const OP: &str = "adamw";
const ELEMENTS_PER_TASK: usize = 1 << 14;
/// Elements that a thread of the kernel takes at a time.
const PER_THREAD: usize = 4;
/// Partial sums of the norm on a device: a constant, so that no result depends on its size.
const NORM_BLOCKS: usize = 256;

/// The settings of one update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
    /// The number of this update, from 1.
    pub step: usize,
    /// What the gradient is multiplied by first (the clip factor).
    pub grad_scale: f32,
}

/// What is trained: f32, or in bf16 the upper half of an f32 master with its lower half.
#[derive(Debug, Clone, Copy)]
pub struct Weight<'a> {
    pub value: &'a Tensor,
    /// As i16, where `value` is bf16.
    pub low: Option<&'a Tensor>,
}

impl<'a> Weight<'a> {
    fn lower_half(&self) -> Result<&'a Tensor> {
        let low = self.low.ok_or_else(|| Error::Shape {
            op: OP,
            expected: "the lower half of a bf16 weight".into(),
            found: "none".into(),
        })?;
        expect_dims(OP, "low", low, self.value.dims())?;
        Ok(low)
    }
}

/// The two halves of a master: bf16, rounded to the nearest, and what is missing to the exact value.
pub fn split_master(master: f32) -> (bf16, i16) {
    let bits = master.to_bits();
    let high = bits.wrapping_add(0x8000) >> 16;
    (
        bf16::from_bits(high as u16),
        bits.wrapping_sub(high << 16) as i16,
    )
}

/// The master whose halves [`split_master`] gave.
pub fn join_master(high: bf16, low: i16) -> f32 {
    f32::from_bits((u32::from(high.to_bits()) << 16).wrapping_add(i32::from(low) as u32))
}

/// The numbers of an update that are the same for every element.
#[derive(Clone, Copy)]
struct Scalars {
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    decay: f32,
    step_size: f32,
    root_correction: f32,
    epsilon: f32,
    grad_scale: f32,
}

impl From<&AdamW> for Scalars {
    fn from(update: &AdamW) -> Self {
        let step = update.step as i32;
        Self {
            beta1: update.beta1 as f32,
            rest1: (1.0 - update.beta1) as f32,
            beta2: update.beta2 as f32,
            rest2: (1.0 - update.beta2) as f32,
            decay: (1.0 - update.learning_rate * update.weight_decay) as f32,
            step_size: (update.learning_rate / (1.0 - update.beta1.powi(step))) as f32,
            root_correction: (1.0 - update.beta2.powi(step)).sqrt() as f32,
            epsilon: update.epsilon as f32,
            grad_scale: update.grad_scale,
        }
    }
}

impl Scalars {
    /// The update of one element. Every operation rounds once, here as in the kernels.
    #[inline(always)]
    fn apply(self, grad: f32, w: &mut f32, m: &mut f32, v: &mut f32) {
        let g = grad * self.grad_scale;
        *m = self.beta1 * *m + self.rest1 * g;
        *v = self.beta2 * *v + self.rest2 * g * g;
        let root = v.sqrt() / self.root_correction + self.epsilon;
        *w = *w * self.decay - self.step_size * *m / root;
    }

    /// The last arguments of the kernels.
    fn operands(self) -> [Operand<'static>; 9] {
        [
            self.beta1,
            self.rest1,
            self.beta2,
            self.rest2,
            self.decay,
            self.step_size,
            self.root_correction,
            self.epsilon,
            self.grad_scale,
        ]
        .map(Operand::F32)
    }
}

/// Updates `weight` and its moments in place.
///
/// # Shapes
/// All tensors alike.
pub fn forward(
    update: &AdamW,
    weight: Weight<'_>,
    grad: &Tensor,
    m: &Tensor,
    v: &Tensor,
) -> Result<()> {
    let _span = tracing::trace_span!("optimizer").entered();
    for (name, t) in [("grad", grad), ("m", m), ("v", v)] {
        expect_dims(OP, name, t, weight.value.dims())?;
    }
    if let Some(launcher) = Launcher::of(OP, weight.value)? {
        return forward_on_device(&launcher, update, weight, [grad, m, v]);
    }
    let grad = read(OP, grad)?;
    let scalars = Scalars::from(update);
    let apply = |((w, m), v): ((&mut [f32], &mut [f32]), &mut [f32]), g: &[f32]| {
        vectorized(
            #[inline(always)]
            move || {
                for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(g) {
                    scalars.apply(*g, w, m, v);
                }
            },
        );
    };
    cpu::write(OP, weight.value, |w| {
        cpu::write(OP, m, |m| {
            cpu::write(OP, v, |v| {
                let tasks = w
                    .par_chunks_mut(ELEMENTS_PER_TASK)
                    .zip(m.par_chunks_mut(ELEMENTS_PER_TASK));
                let tasks = tasks
                    .zip(v.par_chunks_mut(ELEMENTS_PER_TASK))
                    .zip(grad.par_chunks(ELEMENTS_PER_TASK));
                tasks.for_each(|(state, g)| apply(state, g));
            })
        })
    })???;
    Ok(())
}

fn forward_on_device(
    launcher: &Launcher,
    update: &AdamW,
    weight: Weight<'_>,
    [grad, m, v]: [&Tensor; 3],
) -> Result<()> {
    let n = grad.elem_count();
    let mut operands = vec![
        Operand::Write(weight.value),
        Operand::Write(weight.lower_half()?),
        Operand::Read(grad),
        Operand::Write(m),
        Operand::Write(v),
        Operand::U64(n),
    ];
    operands.extend(Scalars::from(update).operands());
    let grid = launcher.grid_stride(n, PER_THREAD);
    // SAFETY: all tensors have n elements.
    unsafe { launcher.launch("adamw_f32_moments", grid, &operands) }
}

/// The squared norm of the gradient of `weight`, in f64 and in a fixed order. Waits for the device.
pub fn squared_norm(weight: &Tensor, grad: &Tensor) -> Result<f64> {
    let _span = tracing::trace_span!("optimizer").entered();
    if let Some(launcher) = Launcher::of(OP, weight)? {
        return squared_norm_on_device(&launcher, grad);
    }
    let grad = read(OP, grad)?;
    let partial: Vec<f64> = grad
        .par_chunks(ELEMENTS_PER_TASK)
        .map(|chunk| chunk.iter().map(|&g| f64::from(g) * f64::from(g)).sum())
        .collect();
    Ok(partial.iter().sum())
}

fn squared_norm_on_device(launcher: &Launcher, grad: &Tensor) -> Result<f64> {
    let partial = launcher.empty(NORM_BLOCKS, DType::F64)?;
    let total = launcher.empty(1, DType::F64)?;
    let partial_sums = [
        Operand::Read(grad),
        Operand::U64(grad.elem_count()),
        Operand::Write(&partial),
    ];
    let sum = [
        Operand::Read(&partial),
        Operand::U32(NORM_BLOCKS),
        Operand::Write(&total),
    ];
    let (blocks, one) = (Grid::blocks(NORM_BLOCKS, 1), Grid::blocks(1, 1));
    // SAFETY: a partial sum for each block, and a place for the total.
    unsafe {
        launcher.launch("adamw_squared_norm", blocks, &partial_sums)?;
        launcher.launch("adamw_sum", one, &sum)?;
    }
    Ok(launcher.read::<f64>(&total)?[0])
}

/// Sets every element of a gradient to zero.
pub fn zero(grad: &Tensor) -> Result<()> {
    /// candle's kernel counts in 32 bits, and never ends where there are 2^32 or more.
    const AT_ONCE: usize = 1 << 31;
    let _span = tracing::trace_span!("optimizer").entered();
    let n = grad.elem_count();
    let grad = grad.flatten_all()?;
    for start in (0..n).step_by(AT_ONCE) {
        let part = grad.narrow(0, start, AT_ONCE.min(n - start))?;
        part.zero_set()?;
    }
    Ok(())
}

/// The same from candle primitives: the new weight and moments.
pub fn reference(
    update: &AdamW,
    weight: &Tensor,
    grad: &Tensor,
    m: &Tensor,
    v: &Tensor,
) -> Result<[Tensor; 3]> {
    let AdamW { beta1, beta2, .. } = *update;
    let grad = (grad * f64::from(update.grad_scale))?;
    let m = ((m * beta1)? + (&grad * (1.0 - beta1))?)?;
    let v = ((v * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?;
    let m_hat = (&m / (1.0 - beta1.powi(update.step as i32)))?;
    let v_hat = (&v / (1.0 - beta2.powi(update.step as i32)))?;
    let decayed = (weight * (1.0 - update.learning_rate * update.weight_decay))?;
    let weight =
        (decayed - (m_hat * update.learning_rate)?.div(&(v_hat.sqrt()? + update.epsilon)?)?)?;
    Ok([weight, m, v])
}
