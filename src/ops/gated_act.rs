//! The gated activation of the MLP: `y = silu(gate) up`, `silu(z) = z / (1 + e^-z)`.
//!
//! Backward, with `s = 1 / (1 + e^-gate)`: `d_up = dy gate s`, `d_gate = dy up s (1 + gate (1 - s))`.
//!
//! Source: arXiv:2002.05202.

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::cpu::{self, expect_dims, read};
use super::launcher::{Launcher, Operand};
use super::simd::{exp, vectorized};
use crate::Result;

const OP: &str = "gated_act";
const ELEMENTS_PER_TASK: usize = 1 << 14;
/// Elements that a thread of the kernel takes at a time.
const PER_THREAD: usize = 8;

#[inline(always)]
fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + exp(-z))
}

/// `silu(gate) up`.
///
/// # Shapes
/// `gate`, `up: [N, F]` -> `[N, F]`.
pub fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let _span = tracing::trace_span!("elementwise").entered();
    expect_dims(OP, "up", up, gate.dims())?;
    if let Some(launcher) = Launcher::of(OP, gate)? {
        let n = gate.elem_count();
        let y = launcher.empty(gate.shape(), DType::BF16)?;
        let operands = [
            Operand::Read(gate),
            Operand::Read(up),
            Operand::U64(n),
            Operand::Write(&y),
        ];
        let grid = launcher.grid_stride(n, PER_THREAD);
        // SAFETY: all have n elements.
        unsafe { launcher.launch("gated_act_forward_bf16", grid, &operands)? };
        return Ok(y);
    }
    let (gates, ups) = (read(OP, gate)?, read(OP, up)?);
    cpu::build(gate.shape(), |y| {
        let tasks = y.par_chunks_mut(ELEMENTS_PER_TASK);
        let tasks = tasks
            .zip(gates.par_chunks(ELEMENTS_PER_TASK))
            .zip(ups.par_chunks(ELEMENTS_PER_TASK));
        tasks.for_each(|((y, gate), up)| {
            vectorized(
                #[inline(always)]
                || {
                    for ((y, &gate), up) in y.iter_mut().zip(gate).zip(up) {
                        *y = gate * sigmoid(gate) * up;
                    }
                },
            );
        });
    })
}

/// Replaces `gate` and `up` by their gradients.
///
/// # Shapes
/// `dy`, `gate`, `up: [N, F]`.
pub fn backward(dy: &Tensor, gate: &Tensor, up: &Tensor) -> Result<()> {
    let _span = tracing::trace_span!("elementwise").entered();
    expect_dims(OP, "gate", gate, dy.dims())?;
    expect_dims(OP, "up", up, dy.dims())?;
    if let Some(launcher) = Launcher::of(OP, dy)? {
        let n = dy.elem_count();
        let operands = [
            Operand::Read(dy),
            Operand::Write(gate),
            Operand::Write(up),
            Operand::U64(n),
        ];
        let grid = launcher.grid_stride(n, PER_THREAD);
        // SAFETY: all have n elements.
        return unsafe { launcher.launch("gated_act_backward_bf16", grid, &operands) };
    }
    let dy = read(OP, dy)?;
    cpu::write(OP, gate, |gate| {
        cpu::write(OP, up, |up| {
            let tasks = gate
                .par_chunks_mut(ELEMENTS_PER_TASK)
                .zip(up.par_chunks_mut(ELEMENTS_PER_TASK));
            tasks
                .zip(dy.par_chunks(ELEMENTS_PER_TASK))
                .for_each(|((gate, up), dy)| {
                    vectorized(
                        #[inline(always)]
                        || {
                            for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
                                let s = sigmoid(*gate);
                                let d_gate = dy * *up * s * (1.0 + *gate * (1.0 - s));
                                *up = dy * *gate * s;
                                *gate = d_gate;
                            }
                        },
                    );
                });
        })
    })?
}

/// The same from differentiable primitives.
pub fn reference(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    Ok((gate.silu()? * up)?)
}
