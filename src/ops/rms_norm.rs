//! Root-mean-square normalization: `y = w x / rms(x)`, `rms(x) = sqrt(mean(x^2) + eps)`, over rows of the last axis.
//!
//! Backward, with `i = 1 / rms(x)` and `g = w dy`: `dx = i (g - x i^2 mean(g x))`; the weight is frozen.
//!
//! Source: arXiv:1910.07467.

use candle_core::{D, Tensor};
use rayon::prelude::*;

use super::cpu::{self, ROWS_PER_TASK, expect_dims, read};
use super::simd::{sum, vectorized};
use crate::Result;

const OP: &str = "rms_norm";

/// `y = w x / rms(x)`.
///
/// # Shapes
/// `x: [.., D]`, `weight: [D]` -> `y` as `x`.
pub fn forward(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let d = weight.dims1()?;
    expect_dims(OP, "weight", weight, &[x.dim(D::Minus1)?])?;
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

/// Adds the gradient for `x` to `dx`, which may hold that of a residual connection.
///
/// # Shapes
/// `dy`, `x`, `dx: [.., D]`, `weight: [D]`.
pub fn backward(dy: &Tensor, x: &Tensor, weight: &Tensor, eps: f64, dx: &Tensor) -> Result<()> {
    let d = weight.dims1()?;
    expect_dims(OP, "dy", dy, x.dims())?;
    expect_dims(OP, "dx", dx, x.dims())?;
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
