//! The residual connection: `y = x + branch`. Backward hands `dy` to both, so there is nothing to compute.

use candle_core::Tensor;
use rayon::prelude::*;

use super::cpu::{self, expect_dims, read};
use super::launcher::{Launcher, Operand};
use crate::Result;

const OP: &str = "residual";
const ELEMENTS_PER_TASK: usize = 1 << 15;
/// Elements that a thread of the kernel takes at a time.
const PER_THREAD: usize = 8;

/// `x + branch`, reusing the memory of `branch`.
pub fn forward(x: &Tensor, branch: Tensor) -> Result<Tensor> {
    let _span = tracing::trace_span!("elementwise").entered();
    expect_dims(OP, "branch", &branch, x.dims())?;
    if let Some(launcher) = Launcher::of(OP, x)? {
        forward_on_device(&launcher, x, &branch, &branch)?;
        return Ok(branch);
    }
    let x = read(OP, x)?;
    cpu::write(OP, &branch, |branch| {
        let tasks = branch
            .par_chunks_mut(ELEMENTS_PER_TASK)
            .zip(x.par_chunks(ELEMENTS_PER_TASK));
        tasks.for_each(|(branch, x)| {
            for (branch, x) in branch.iter_mut().zip(x) {
                *branch += x;
            }
        });
    })?;
    Ok(branch)
}

/// `x + branch`, written to `sum`: for some of the rows of a whole.
pub fn forward_to(x: &Tensor, branch: &Tensor, sum: &Tensor) -> Result<()> {
    let _span = tracing::trace_span!("elementwise").entered();
    expect_dims(OP, "branch", branch, x.dims())?;
    expect_dims(OP, "sum", sum, x.dims())?;
    if let Some(launcher) = Launcher::of(OP, x)? {
        return forward_on_device(&launcher, x, branch, sum);
    }
    let (x, branch) = (read(OP, x)?, read(OP, branch)?);
    cpu::write(OP, sum, |sum| {
        let tasks = sum
            .par_chunks_mut(ELEMENTS_PER_TASK)
            .zip(x.par_chunks(ELEMENTS_PER_TASK))
            .zip(branch.par_chunks(ELEMENTS_PER_TASK));
        tasks.for_each(|((sum, x), branch)| {
            for ((sum, x), branch) in sum.iter_mut().zip(x).zip(branch) {
                *sum = branch + x;
            }
        });
    })
}

/// A tensor like `x`, for [`forward_to`] to write all of it.
pub fn unwritten(x: &Tensor) -> Result<Tensor> {
    match Launcher::of(OP, x)? {
        Some(launcher) => launcher.empty(x.shape(), x.dtype()),
        None => Ok(x.zeros_like()?),
    }
}

fn forward_on_device(launcher: &Launcher, x: &Tensor, branch: &Tensor, sum: &Tensor) -> Result<()> {
    let n = x.elem_count();
    let operands = [
        Operand::Read(x),
        Operand::Read(branch),
        Operand::U64(n),
        Operand::Write(sum),
    ];
    let grid = launcher.grid_stride(n, PER_THREAD);
    // SAFETY: all have n elements.
    unsafe { launcher.launch("residual_forward_bf16", grid, &operands) }
}

/// The same from differentiable primitives.
pub fn reference(x: &Tensor, branch: &Tensor) -> Result<Tensor> {
    Ok((x + branch)?)
}
