//! What the attention and the MLP read of the residual stream: its norm, or the stream itself in models without one.

use candle_core::Tensor;

use crate::Result;
use crate::model::branches::InputGradient;
use crate::ops::{residual, rms_norm};

#[derive(Debug, Clone)]
pub(in crate::model) struct InputNorm {
    /// `[D]`.
    pub weight: Option<Tensor>,
    pub eps: f64,
}

impl InputNorm {
    /// # Shapes
    /// `x: [N, D]` -> `[N, D]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.weight {
            Some(weight) => rms_norm::forward(x, weight, self.eps),
            None => Ok(x.clone()),
        }
    }

    /// `x + branch`, which reuses the memory of `branch`, and what is read of that.
    pub(super) fn forward_residual(&self, x: &Tensor, branch: Tensor) -> Result<(Tensor, Tensor)> {
        match &self.weight {
            Some(weight) => rms_norm::forward_residual(x, branch, weight, self.eps),
            None => {
                let sum = residual::forward(x, branch)?;
                Ok((sum.clone(), sum))
            }
        }
    }

    /// What becomes of the gradient of what was read: without a norm it belongs to the stream's own, `dx`.
    pub(super) fn gradient(&self, dx: &Tensor) -> InputGradient {
        match &self.weight {
            Some(_) => InputGradient::New,
            None => InputGradient::AddTo(dx.clone()),
        }
    }

    /// Adds to `dx` what [`gradient`](Self::gradient) has not.
    pub(super) fn backward(&self, dh: &Tensor, x: &Tensor, dx: &Tensor) -> Result<()> {
        match &self.weight {
            Some(weight) => rms_norm::backward(dh, x, weight, self.eps, dx),
            None => Ok(()),
        }
    }
}
