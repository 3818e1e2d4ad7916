//! A soft cap on attention scores or on logits: `y = cap tanh(z / cap)`, whose slope is `1 - (y / cap)^2`.
//!
//! Source: arXiv:2408.00118, section 2.

use candle_core::Tensor;

use super::launcher::Operand;
use super::simd::exp;
use crate::Result;

/// The largest magnitude that is let through.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SoftCap(pub f32);

impl SoftCap {
    /// `z` under the cap, to 2e-7 of it.
    #[inline(always)]
    fn of(self, z: f32) -> f32 {
        // tanh(|t|) = (1 - e^-2|t|) / (1 + e^-2|t|)
        let e = exp(-2.0 / self.0 * z.abs());
        (self.0 * ((1.0 - e) / (1.0 + e))).copysign(z)
    }

    /// The slope where the cap has given `y`.
    #[inline(always)]
    pub(super) fn slope(self, y: f32) -> f32 {
        let tanh = y / self.0;
        1.0 - tanh * tanh
    }

    /// Each of `values` under the cap, if there is one.
    #[inline(always)]
    pub(super) fn apply(cap: Option<Self>, values: &mut [f32]) {
        if let Some(cap) = cap {
            values.iter_mut().for_each(|z| *z = cap.of(*z));
        }
    }

    /// As kernels take it: 0 is none.
    pub(super) fn operand(cap: Option<Self>) -> Operand<'static> {
        Operand::F32(cap.map_or(0.0, |cap| cap.0))
    }

    /// `z` under the cap, if there is one, from differentiable primitives.
    pub fn reference(cap: Option<Self>, z: &Tensor) -> Result<Tensor> {
        Ok(match cap {
            None => z.clone(),
            Some(Self(cap)) => ((z / f64::from(cap))?.tanh()? * f64::from(cap))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_small_passes_and_what_is_large_is_capped() {
        let cap = SoftCap(30.0);
        for i in -100_000..100_000 {
            let z = i as f32 * 1e-2;
            let exact = 30.0 * (f64::from(z) / 30.0).tanh();
            let (y, slope) = (cap.of(z), 1.0 - (exact / 30.0).powi(2));
            assert!((f64::from(y) - exact).abs() < 6e-6, "{z}: {y}");
            assert!((f64::from(cap.slope(y)) - slope).abs() < 1e-6, "{z}");
        }
    }
}
