//! A linear layer of the base with the adapter on top of it, if it has one.

use candle_core::Tensor;

use super::parameters::Trainable;
use crate::Result;
use crate::ops::linear::{self, Lora, LoraGrad};
use crate::ops::weight::Weight;

/// The two factors of an adapter, `a: [R, in]`, `b: [out, R]`.
#[derive(Debug, Clone)]
pub struct LoraPair {
    pub a: Trainable,
    pub b: Trainable,
    pub scaling: f64,
}

impl LoraPair {
    fn values(&self) -> Lora<'_> {
        Lora {
            a: &self.a.value,
            b: &self.b.value,
            scaling: self.scaling as f32,
        }
    }
}

/// A frozen weight, its bias, and its adapter.
#[derive(Debug, Clone)]
pub struct LoraLinear {
    pub weight: Weight,
    pub bias: Option<Tensor>,
    pub lora: Option<LoraPair>,
}

impl LoraLinear {
    /// The output, and `u = x A^T` for backward.
    pub fn forward(&self, x: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        linear::forward(
            x,
            &self.weight,
            self.bias.as_ref(),
            self.lora.as_ref().map(LoraPair::values),
        )
    }

    /// Adds to the adapter's gradients and gives the gradient of the input, added to `sum` if there is one.
    pub fn backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        u: Option<&Tensor>,
        sum: Option<Tensor>,
    ) -> Result<Tensor> {
        let du = self.backward_adapter(dy, x, u)?;
        let adapter = du
            .as_ref()
            .zip(self.lora.as_ref())
            .map(|(du, lora)| (du, &lora.a.value));
        linear::backward_input(dy, &self.weight, adapter, sum)
    }

    /// Adds to the adapter's gradients alone and gives that of `u`.
    pub fn backward_adapter(
        &self,
        dy: &Tensor,
        x: &Tensor,
        u: Option<&Tensor>,
    ) -> Result<Option<Tensor>> {
        let (Some(lora), Some(u)) = (&self.lora, u) else {
            return Ok(None);
        };
        let grad = LoraGrad {
            d_a: &lora.a.grad,
            d_b: &lora.b.grad,
        };
        linear::backward_lora(dy, x, u, lora.values(), grad).map(Some)
    }
}
