//! The linear layers of a block that read the same input: q_proj, k_proj and v_proj, or gate_proj and up_proj. In some models
//! they are one layer.
//!
//! Where kernels compute, the products of their adapters with that input are made together, which launches less and reads it
//! once. That takes adapters of one rank on all of them, without dropout on their matrices and without DoRA.

use std::slice;

use candle_core::Tensor;

use super::lora_dropout::LoraDropout;
use super::lora_linear::{Factors, LoraLinear, StackedA};
use crate::Result;
use crate::ops::dropout::Mask;
use crate::ops::linear::{self, Stack};

#[derive(Debug, Clone)]
pub(super) enum Branches<const J: usize> {
    Apart([LoraLinear; J]),
    /// One layer, and how wide each part of its output is.
    Fused(Box<LoraLinear>, [usize; J]),
}

/// What becomes of the gradient of the input.
pub(super) enum InputGradient {
    /// It is not needed.
    Skip,
    /// A tensor of its own.
    New,
    /// It is added to this one.
    AddTo(Tensor),
}

/// The adapters of all branches.
struct Together<'a> {
    factors: Vec<Factors<'a>>,
    a: &'a StackedA,
    masks: Vec<Mask>,
}

impl Together<'_> {
    fn stack(&self) -> Stack<'_> {
        Stack {
            a: &self.a.value,
            adapters: self.factors.len(),
            masks: &self.masks,
        }
    }
}

impl<const J: usize> Branches<J> {
    /// In the order of the model's [`modules`](super::DecoderConfig::modules).
    pub(super) fn layers(&self) -> &[LoraLinear] {
        match self {
            Self::Apart(layers) => layers,
            Self::Fused(layer, _) => slice::from_ref(layer),
        }
    }

    pub(super) fn layers_mut(&mut self) -> &mut [LoraLinear] {
        match self {
            Self::Apart(layers) => layers,
            Self::Fused(layer, _) => slice::from_mut(layer),
        }
    }

    /// The outputs, and the `u` of [`LoraLinear::forward`] for each layer.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        dropout: LoraDropout,
    ) -> Result<([Tensor; J], Vec<Option<Tensor>>)> {
        let layers = match self {
            Self::Apart(layers) => layers,
            Self::Fused(layer, widths) => {
                let (all, u) = layer.forward(x, dropout)?;
                let mut start = 0;
                let parts = each(*widths, |width| {
                    let part = all.narrow(1, start, width)?.contiguous()?;
                    start += width;
                    Ok(part)
                })?;
                return Ok((parts, vec![u]));
            }
        };
        let Some(together) = self.together(dropout)? else {
            return outputs(layers, |layer| layer.forward(x, dropout));
        };
        let mut adapters = together
            .stack()
            .down_project(x)?
            .into_iter()
            .zip(&together.factors);
        outputs(layers, |layer| {
            let (u, factors) = adapters.next().expect("each branch has an adapter");
            let adapter = Some((factors.lora(), &u));
            let y = linear::forward_with_u(x, &layer.weight, layer.bias.as_ref(), adapter)?;
            Ok((y, Some(u)))
        })
    }

    /// Adds to the adapters' gradients; gives the sum of the gradients of the input, with what it is added to, if it is needed.
    ///
    /// # Shapes
    /// `d_outs: [N, out]`, each dropped after its last use, `x: [N, in]`.
    pub(super) fn backward(
        &self,
        d_outs: [Tensor; J],
        x: &Tensor,
        us: &[Option<Tensor>],
        dropout: LoraDropout,
        input: InputGradient,
    ) -> Result<Option<Tensor>> {
        let (is_needed, mut dx) = match input {
            InputGradient::Skip => (false, None),
            InputGradient::New => (true, None),
            InputGradient::AddTo(sum) => (true, Some(sum)),
        };
        let Some(together) = self.together(dropout)? else {
            let d_outs = match self {
                Self::Apart(_) => Vec::from(d_outs),
                Self::Fused(..) => {
                    let all = Tensor::cat(&d_outs, 1)?;
                    drop(d_outs);
                    vec![all]
                }
            };
            for ((layer, d_out), u) in self.layers().iter().zip(d_outs).zip(us) {
                match is_needed {
                    true => dx = Some(layer.backward(&d_out, x, u.as_ref(), dropout, dx)?),
                    false => layer.backward_adapter(&d_out, x, u.as_ref(), dropout)?,
                }
            }
            return Ok(dx);
        };
        let branches = together.factors.iter().zip(&d_outs).zip(us);
        let branches: Vec<_> = branches
            .map(|((factors, dy), u)| {
                let u = u.as_ref().expect("each branch has an adapter");
                factors.branch(dy, u)
            })
            .collect();
        let du = together.stack().backward(&branches, x, &together.a.grad)?;
        if !is_needed {
            return Ok(None);
        }
        for (layer, d_out) in self.layers().iter().zip(d_outs) {
            dx = Some(linear::backward_input(&d_out, &layer.weight, None, dx)?);
        }
        if let Some(dx) = &dx {
            together.stack().add_input_grad(&du, dx)?;
        }
        Ok(dx)
    }

    /// The adapters, if their products are made together.
    fn together(&self, dropout: LoraDropout) -> Result<Option<Together<'_>>> {
        let layers = self.layers();
        let first = layers[0].lora.as_ref();
        let stack = first.and_then(|lora| lora.stack.as_ref());
        let Some(a) = stack.filter(|_| dropout.matrices.is_none()) else {
            return Ok(None);
        };
        let adapters = layers.iter().filter_map(|layer| layer.lora.as_ref());
        let factors: Vec<_> = adapters
            .map(|lora| lora.factors(dropout))
            .collect::<Result<_>>()?;
        let masks = factors.iter().filter_map(|factors| factors.mask).collect();
        Ok(Some(Together { factors, a, masks }))
    }
}

/// `forward` of each layer: the outputs, and each `u`.
fn outputs<const J: usize>(
    layers: &[LoraLinear; J],
    mut forward: impl FnMut(&LoraLinear) -> Result<(Tensor, Option<Tensor>)>,
) -> Result<([Tensor; J], Vec<Option<Tensor>>)> {
    let mut us = Vec::with_capacity(J);
    let outputs = each(layers.each_ref(), |layer| {
        let (y, u) = forward(layer)?;
        us.push(u);
        Ok(y)
    })?;
    Ok((outputs, us))
}

/// `f` of each, in order.
pub(super) fn each<T, U, const J: usize>(
    all: [T; J],
    f: impl FnMut(T) -> Result<U>,
) -> Result<[U; J]> {
    let results: Vec<U> = all.into_iter().map(f).collect::<Result<_>>()?;
    Ok(results
        .try_into()
        .unwrap_or_else(|_| unreachable!("there is one of each")))
}
