//! The gated activation of the MLP: `y = act(gate) up`.
//!
//! Both activations are `act(z) = z s(u(z))` with `s(u) = 1 / (1 + e^-u)`: SiLU has `u(z) = z`, and the approximation of GELU by
//! a hyperbolic tangent `u(z) = 2 sqrt(2/pi) (z + 0.044715 z^3)`.
//!
//! Backward, with `s` at `u(gate)`: `d_up = dy gate s`, `d_gate = dy up s (1 + gate u'(gate) (1 - s))`.
//!
//! Source: arXiv:2002.05202, arXiv:1606.08415.

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

/// The activation of the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// torch's `gelu(approximate="tanh")`.
    GeluTanh,
}

impl Activation {
    fn kernels(self) -> [&'static str; 2] {
        match self {
            Self::Silu => ["gated_act_forward_bf16", "gated_act_backward_bf16"],
            Self::GeluTanh => ["gated_gelu_forward_bf16", "gated_gelu_backward_bf16"],
        }
    }
}

/// `s(u(z))` and `z u'(z)` of an activation.
trait Formula: Copy + Send + Sync {
    fn sigmoid(self, z: f32) -> f32;
    fn slope(self, z: f32) -> f32;
}

#[derive(Clone, Copy)]
struct Silu;

impl Formula for Silu {
    #[inline(always)]
    fn sigmoid(self, z: f32) -> f32 {
        1.0 / (1.0 + exp(-z))
    }

    #[inline(always)]
    fn slope(self, z: f32) -> f32 {
        z
    }
}

#[derive(Clone, Copy)]
struct GeluTanh;

impl GeluTanh {
    /// `2 sqrt(2/pi)`
    const SCALE: f32 = 1.595_769_2;
    const CUBIC: f32 = 0.044_715;
    /// Beyond this the sigmoid is 0 or 1, and the cube could overflow.
    const SATURATED: f32 = 20.0;
}

impl Formula for GeluTanh {
    #[inline(always)]
    fn sigmoid(self, z: f32) -> f32 {
        let z = z.clamp(-Self::SATURATED, Self::SATURATED);
        Silu.sigmoid(Self::SCALE * z * (1.0 + Self::CUBIC * z * z))
    }

    #[inline(always)]
    fn slope(self, z: f32) -> f32 {
        let z = z.clamp(-Self::SATURATED, Self::SATURATED);
        Self::SCALE * z * (1.0 + 3.0 * Self::CUBIC * z * z)
    }
}

/// `act(gate) up`.
///
/// # Shapes
/// `gate`, `up: [N, F]` -> `[N, F]`.
pub fn forward(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
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
        unsafe { launcher.launch(activation.kernels()[0], grid, &operands)? };
        return Ok(y);
    }
    match activation {
        Activation::Silu => forward_on_cpu(gate, up, Silu),
        Activation::GeluTanh => forward_on_cpu(gate, up, GeluTanh),
    }
}

fn forward_on_cpu(gate: &Tensor, up: &Tensor, act: impl Formula) -> Result<Tensor> {
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
                        *y = gate * act.sigmoid(gate) * up;
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
pub fn backward(dy: &Tensor, gate: &Tensor, up: &Tensor, activation: Activation) -> Result<()> {
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
        return unsafe { launcher.launch(activation.kernels()[1], grid, &operands) };
    }
    match activation {
        Activation::Silu => backward_on_cpu(dy, gate, up, Silu),
        Activation::GeluTanh => backward_on_cpu(dy, gate, up, GeluTanh),
    }
}

fn backward_on_cpu(dy: &Tensor, gate: &Tensor, up: &Tensor, act: impl Formula) -> Result<()> {
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
                                let s = act.sigmoid(*gate);
                                let d_gate = dy * *up * s * (1.0 + act.slope(*gate) * (1.0 - s));
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
pub fn reference(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    let act = match activation {
        Activation::Silu => gate.silu()?,
        Activation::GeluTanh => gate.gelu()?,
    };
    Ok((act * up)?)
}
