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
        let n = x.elem_count();
        let operands = [Operand::Read(x), Operand::Write(&branch), Operand::U64(n)];
        let grid = launcher.grid_stride(n, PER_THREAD);
        // SAFETY: both have n elements.
        unsafe { launcher.launch("residual_forward_bf16", grid, &operands)? };
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

/// The same from differentiable primitives.
pub fn reference(x: &Tensor, branch: &Tensor) -> Result<Tensor> {
    Ok((x + branch)?)
}
