//! AdamW: `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`, then
//! `w = w (1 - lr decay) - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)`.
//!
//! The decay is decoupled and comes first, and `eps` stands outside the corrected root, as in torch.
//!
//! Source: arXiv:1711.05101.

use candle_core::Tensor;
use rayon::prelude::*;

use super::cpu::{self, expect_dims, read};
use super::simd::vectorized;
use crate::Result;

const OP: &str = "adamw";
const ELEMENTS_PER_TASK: usize = 1 << 14;

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

/// Updates `weight` and its moments in place.
///
/// # Shapes
/// All four tensors alike.
pub fn forward(
    update: &AdamW,
    weight: &Tensor,
    grad: &Tensor,
    m: &Tensor,
    v: &Tensor,
) -> Result<()> {
    for (name, t) in [("grad", grad), ("m", m), ("v", v)] {
        expect_dims(OP, name, t, weight.dims())?;
    }
    let grad = read(OP, grad)?;
    let (beta1, beta2) = (update.beta1 as f32, update.beta2 as f32);
    let (rest1, rest2) = ((1.0 - update.beta1) as f32, (1.0 - update.beta2) as f32);
    let decay = (1.0 - update.learning_rate * update.weight_decay) as f32;
    let step_size = (update.learning_rate / (1.0 - update.beta1.powi(update.step as i32))) as f32;
    let root_correction = (1.0 - update.beta2.powi(update.step as i32)).sqrt() as f32;
    let (epsilon, grad_scale) = (update.epsilon as f32, update.grad_scale);
    let apply = |((w, m), v): ((&mut [f32], &mut [f32]), &mut [f32]), g: &[f32]| {
        vectorized(
            #[inline(always)]
            move || {
                for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(g) {
                    let g = g * grad_scale;
                    *m = beta1 * *m + rest1 * g;
                    *v = beta2 * *v + rest2 * g * g;
                    *w = *w * decay - step_size * *m / (v.sqrt() / root_correction + epsilon);
                }
            },
        );
    };
    cpu::write(OP, weight, |w| {
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

/// The squared norm of a gradient, in f64 and in a fixed order.
pub fn squared_norm(grad: &Tensor) -> Result<f64> {
    let grad = read(OP, grad)?;
    let partial: Vec<f64> = grad
        .par_chunks(ELEMENTS_PER_TASK)
        .map(|chunk| chunk.iter().map(|&g| f64::from(g) * f64::from(g)).sum())
        .collect();
    Ok(partial.iter().sum())
}

/// Sets every element of a gradient to zero.
pub fn zero(grad: &Tensor) -> Result<()> {
    cpu::write(OP, grad, |grad| grad.fill(0.0))
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
