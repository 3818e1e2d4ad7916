//! A tensor times a factor, in place. Backward is the same with the gradient.

use candle_core::Tensor;
use rayon::prelude::*;

use super::cpu;
use super::launcher::{Launcher, Operand};
use crate::Result;

const OP: &str = "scale";
const ELEMENTS_PER_TASK: usize = 1 << 15;
/// Elements that a thread of the kernel takes at a time.
const PER_THREAD: usize = 8;

/// `x = factor x`; nothing is done for a factor of 1.
pub fn in_place(x: &Tensor, factor: f32) -> Result<()> {
    if factor == 1.0 {
        return Ok(());
    }
    let _span = tracing::trace_span!("elementwise").entered();
    if let Some(launcher) = Launcher::of(OP, x)? {
        let n = x.elem_count();
        let operands = [Operand::Write(x), Operand::U64(n), Operand::F32(factor)];
        let grid = launcher.grid_stride(n, PER_THREAD);
        // SAFETY: x has n elements.
        return unsafe { launcher.launch("scale_bf16", grid, &operands) };
    }
    cpu::write(OP, x, |x| {
        x.par_chunks_mut(ELEMENTS_PER_TASK)
            .for_each(|x| x.iter_mut().for_each(|x| *x *= factor));
    })
}
