//! A linear layer of the base with the adapter on top of it, if it has one.

use candle_core::Tensor;

use super::names::Module;
use super::parameters::Trainable;
use crate::Result;
use crate::ops::dropout::Dropout;
use crate::ops::linear::{self, Lora, LoraGrad};
use crate::ops::weight::Weight;

/// The two factors of an adapter, `a: [R, in]`, `b: [out, R]`.
#[derive(Debug, Clone)]
pub struct LoraPair {
    pub a: Trainable,
    pub b: Trainable,
    pub scaling: f64,
    /// The layer and module it sits on, which have dropout masks of their own.
    pub place: (usize, Module),
}

impl LoraPair {
    fn values(&self, dropout: Option<Dropout>) -> Lora<'_> {
        let (layer, module) = self.place;
        Lora {
            a: &self.a.value,
            b: &self.b.value,
            scaling: self.scaling as f32,
            mask: dropout.map(|dropout| dropout.mask(layer, module as usize)),
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
    /// The output, and `u = x A^T` for backward, of an `x` that dropout has been at if there is any.
    pub fn forward(
        &self,
        x: &Tensor,
        dropout: Option<Dropout>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let lora = self.lora.as_ref().map(|lora| lora.values(dropout));
        linear::forward(x, &self.weight, self.bias.as_ref(), lora)
    }

    /// The `u` of [`forward`](Self::forward) alone.
    pub fn down_project(&self, x: &Tensor, dropout: Option<Dropout>) -> Result<Option<Tensor>> {
        let lora = self.lora.as_ref().map(|lora| lora.values(dropout));
        lora.map(|lora| linear::down_project(x, lora)).transpose()
    }

    /// Adds to the adapter's gradients and gives the gradient of the input, added to `sum` if there is one; `dropout` as in
    /// forward.
    pub fn backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        u: Option<&Tensor>,
        dropout: Option<Dropout>,
        sum: Option<Tensor>,
    ) -> Result<Tensor> {
        let du = self.backward_adapter(dy, x, u, dropout)?;
        let lora = self.lora.as_ref().map(|lora| lora.values(dropout));
        linear::backward_input(dy, &self.weight, du.as_ref().zip(lora), sum)
    }

    /// Adds to the adapter's gradients alone and gives that of `u`.
    pub fn backward_adapter(
        &self,
        dy: &Tensor,
        x: &Tensor,
        u: Option<&Tensor>,
        dropout: Option<Dropout>,
    ) -> Result<Option<Tensor>> {
        let (Some(lora), Some(u)) = (&self.lora, u) else {
            return Ok(None);
        };
        let grad = LoraGrad {
            d_a: &lora.a.grad,
            d_b: &lora.b.grad,
        };
        linear::backward_lora(dy, x, u, lora.values(dropout), grad).map(Some)
    }
}
