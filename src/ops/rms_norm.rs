//! Root-mean-square normalization: `y = w x / rms(x)`, `rms(x) = sqrt(mean(x^2) + eps)`, over rows of the last axis.
//!
//! Backward, with `i = 1 / rms(x)` and `g = w dy`: `dx = i (g - x i^2 mean(g x))`; the weight is frozen.
//!
//! Source: arXiv:1910.07467.

use candle_core::{D, DType, Tensor};
use rayon::prelude::*;

use super::cpu::{self, ROWS_PER_TASK, expect_dims, read};
use super::gemm::Into;
use super::launcher::{Grid, Launcher, Operand};
use super::residual;
use super::simd::{sum, vectorized};
use crate::Result;

const OP: &str = "rms_norm";

/// `y = w x / rms(x)`.
///
/// # Shapes
/// `x: [.., D]`, `weight: [D]` in f32 -> `y` as `x`.
pub fn forward(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let _span = tracing::trace_span!("elementwise").entered();
    let d = weight.dims1()?;
    expect_dims(OP, "weight", weight, &[x.dim(D::Minus1)?])?;
    if let Some(launcher) = Launcher::of(OP, x)? {
        let y = launcher.empty(x.shape(), DType::BF16)?;
        let operands = [
            Operand::Read(x),
            Operand::Read(weight),
            Operand::U32(x.elem_count() / d),
            Operand::U32(d),
            Operand::F32(eps as f32),
            Operand::Write(&y),
        ];
        // SAFETY: x and y have rows of d elements, the weight has one.
        unsafe { launcher.launch("rms_norm_forward_bf16", grid(x, d), &operands)? };
        return Ok(y);
    }
    let (xs, w) = (read(OP, x)?, read(OP, weight)?);
    cpu::build(x.shape(), |y| {
        let tasks = y
            .par_chunks_mut(ROWS_PER_TASK * d)
            .zip(xs.par_chunks(ROWS_PER_TASK * d));
        tasks.for_each(|(y, x)| {
            vectorized(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                        let scale = inverse_rms(x, eps);
                        for ((y, x), w) in y.iter_mut().zip(x).zip(&w[..]) {
                            *y = w * (x * scale);
                        }
                    }
                },
            );
        });
    })
}

/// The residual connection and the norm after it: `sum = x + branch` in the memory of `branch`, and `y = w sum / rms(sum)`.
///
/// # Shapes
/// `x`, `branch: [.., D]`, `weight: [D]` -> `sum` and `y` as `x`.
pub fn forward_residual(
    x: &Tensor,
    branch: Tensor,
    weight: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    let _span = tracing::trace_span!("elementwise").entered();
    let Some(launcher) = Launcher::of(OP, x)? else {
        let sum = residual::forward(x, branch)?;
        let y = forward(&sum, weight, eps)?;
        return Ok((sum, y));
    };
    let d = weight.dims1()?;
    expect_dims(OP, "weight", weight, &[x.dim(D::Minus1)?])?;
    expect_dims(OP, "branch", &branch, x.dims())?;
    let y = launcher.empty(x.shape(), DType::BF16)?;
    let operands = [
        Operand::Read(x),
        Operand::Read(&branch),
        Operand::Read(weight),
        Operand::U32(x.elem_count() / d),
        Operand::U32(d),
        Operand::F32(eps as f32),
        Operand::Write(&branch),
        Operand::Write(&y),
    ];
    // SAFETY: x, branch and y have rows of d elements, the weight has one.
    unsafe { launcher.launch("rms_norm_forward_residual_bf16", grid(x, d), &operands)? };
    Ok((branch, y))
}

/// Adds the gradient for `x` to `dx`, which may hold that of a residual connection.
///
/// # Shapes
/// `dy`, `x`, `dx: [.., D]`, `weight: [D]`.
pub fn backward(dy: &Tensor, x: &Tensor, weight: &Tensor, eps: f64, dx: &Tensor) -> Result<()> {
    let _span = tracing::trace_span!("elementwise").entered();
    let d = weight.dims1()?;
    expect_dims(OP, "dy", dy, x.dims())?;
    expect_dims(OP, "dx", dx, x.dims())?;
    expect_dims(OP, "weight", weight, &[x.dim(D::Minus1)?])?;
    if let Some(launcher) = Launcher::of(OP, x)? {
        return backward_on_device(&launcher, dy, (x, weight, eps), Into::Add, dx);
    }
    let (dy, x, w) = (read(OP, dy)?, read(OP, x)?, read(OP, weight)?);
    cpu::write(OP, dx, |dx| {
        let chunk = ROWS_PER_TASK * d;
        let tasks = dx
            .par_chunks_mut(chunk)
            .zip(dy.par_chunks(chunk))
            .zip(x.par_chunks(chunk));
        tasks.for_each(|((dx, dy), x)| {
            vectorized(
                #[inline(always)]
                || {
                    let rows = dx
                        .chunks_exact_mut(d)
                        .zip(dy.chunks_exact(d))
                        .zip(x.chunks_exact(d));
                    for ((dx, dy), x) in rows {
                        let scale = inverse_rms(x, eps);
                        let w = &w[..d];
                        let projection =
                            sum([w, dy, x], |[w, dy, x]| w * dy * x) / d as f32 * scale * scale;
                        for (((dx, w), dy), x) in dx.iter_mut().zip(w).zip(dy).zip(x) {
                            *dx += scale * (w * dy - x * projection);
                        }
                    }
                },
            );
        });
    })
}

/// The gradient for `x` by itself.
///
/// # Shapes
/// As [`backward`].
pub fn gradient(dy: &Tensor, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let Some(launcher) = Launcher::of(OP, x)? else {
        let dx = x.zeros_like()?;
        backward(dy, x, weight, eps, &dx)?;
        return Ok(dx);
    };
    let _span = tracing::trace_span!("elementwise").entered();
    expect_dims(OP, "dy", dy, x.dims())?;
    expect_dims(OP, "weight", weight, &[x.dim(D::Minus1)?])?;
    let dx = launcher.empty(x.shape(), DType::BF16)?;
    backward_on_device(&launcher, dy, (x, weight, eps), Into::Overwrite, &dx)?;
    Ok(dx)
}

/// The shapes have been checked.
fn backward_on_device(
    launcher: &Launcher,
    dy: &Tensor,
    (x, weight, eps): (&Tensor, &Tensor, f64),
    into: Into,
    dx: &Tensor,
) -> Result<()> {
    let d = weight.dims1()?;
    let operands = [
        Operand::Read(dy),
        Operand::Read(x),
        Operand::Read(weight),
        Operand::U32(x.elem_count() / d),
        Operand::U32(d),
        Operand::F32(eps as f32),
        Operand::U32(usize::from(into == Into::Add)),
        Operand::Write(dx),
    ];
    // SAFETY: dy, x and dx have rows of d elements, the weight has one.
    unsafe { launcher.launch("rms_norm_backward_bf16", grid(x, d), &operands) }
}

/// The blocks of a kernel: one takes eight short rows, a warp each, or one long row.
fn grid(x: &Tensor, d: usize) -> Grid {
    const SHORT: usize = 1024;
    const WARPS: usize = 8;
    let rows = x.elem_count() / d;
    Grid::blocks(
        if d <= SHORT {
            rows.div_ceil(WARPS)
        } else {
            rows
        },
        1,
    )
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f64) -> f32 {
    let mean = sum([x], |[x]| x * x) / x.len() as f32;
    1.0 / (mean + eps as f32).sqrt()
}

/// The same from differentiable primitives.
pub fn reference(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    Ok(x.broadcast_div(&rms)?.broadcast_mul(weight)?)
}
