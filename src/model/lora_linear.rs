//! A linear layer of the base with the adapter on top of it, if it has one.

use std::sync::OnceLock;

use candle_core::{DType, Tensor};

use super::lora_dropout::LoraDropout;
use super::names::Module;
use super::parameters::Trainable;
use crate::device::ComputeDtype;
use crate::ops::dropout::Mask;
use crate::ops::linear::{self, Branch, Lora, LoraGrad, dora};
use crate::ops::matrix_dropout::{self, FactorMasks};
use crate::ops::weight::Weight;
use crate::{Error, Result};

/// The magnitudes of DoRA, `[out]`.
#[derive(Debug, Clone)]
pub struct Magnitude {
    pub trainable: Trainable,
    /// The squared norms of the rows of the frozen weight, in f32.
    pub weight_squares: Tensor,
    /// The scales of the rows once they have been asked for, where nothing is trained any more; `None` where they are made anew
    /// each time.
    pub lasting_scales: Option<OnceLock<Tensor>>,
}

impl Magnitude {
    fn scales(&self, weight: &Weight, lora: Lora<'_>) -> Result<Tensor> {
        let lasting = self.lasting_scales.as_ref();
        if let Some(scales) = lasting.and_then(OnceLock::get) {
            return Ok(scales.clone());
        }
        let scales = dora::scales(weight, lora, self.values())?;
        Ok(match lasting {
            None => scales,
            Some(lasting) => lasting.get_or_init(|| scales).clone(),
        })
    }

    fn values(&self) -> dora::Magnitude<'_> {
        dora::Magnitude {
            value: &self.trainable.value,
            low: self.trainable.low_on_device(),
            weight_squares: &self.weight_squares,
        }
    }
}

/// The two factors of an adapter, `a: [R, in]`, `b: [out, R]`.
#[derive(Debug, Clone)]
pub struct LoraPair {
    pub a: Trainable,
    pub b: Trainable,
    /// Where the adapter is DoRA's.
    pub magnitude: Option<Magnitude>,
    pub scaling: f64,
    /// Of its products on the CPU.
    pub compute_dtype: ComputeDtype,
    /// The layer and module it sits on, which have dropout masks of their own.
    pub place: (usize, Module),
    /// Of the first of several adapters whose products with their input kernels make together.
    pub stack: Option<StackedA>,
}

/// The A of all adapters on layers that read the same input, one after another.
#[derive(Debug, Clone)]
pub struct StackedA {
    /// `[J R, in]`.
    pub value: Tensor,
    /// f32.
    pub grad: Tensor,
}

/// An adapter as one instance of a micro-batch has it.
pub(super) struct Factors<'a> {
    pair: &'a LoraPair,
    /// Those of the pair, or masked copies of them.
    a: Tensor,
    b: Tensor,
    masks: Option<FactorMasks>,
    pub(super) mask: Option<Mask>,
    scaling: f32,
}

impl LoraPair {
    /// With the dropout of one instance.
    ///
    /// # Errors
    /// [`Error::Config`] for dropout on the matrices of an adapter of DoRA's.
    pub(super) fn factors(&self, dropout: LoraDropout) -> Result<Factors<'_>> {
        let (layer, module) = (self.place.0, self.place.1 as usize);
        let masks = dropout.matrices;
        if self.magnitude.is_some() && masks.is_some() {
            let reason = "masks the matrices of plain adapters, and this one is DoRA's";
            return Err(Error::config("lora_matrix_dropout", reason));
        }
        let masks = masks.map(|dropout| dropout.masks(layer, module, 0));
        let (a, b) = match &masks {
            None => (self.a.value.clone(), self.b.value.clone()),
            Some(masks) => matrix_dropout::forward(&self.a.value, &self.b.value, masks)?,
        };
        Ok(Factors {
            pair: self,
            a,
            b,
            masks,
            mask: dropout.inputs.map(|dropout| dropout.mask(layer, module)),
            scaling: self.scaling as f32 * masks.map_or(1.0, |masks| masks.scale()),
        })
    }
}

impl Factors<'_> {
    pub(super) fn lora(&self) -> Lora<'_> {
        Lora {
            a: &self.a,
            b: &self.b,
            scaling: self.scaling,
            mask: self.mask,
            compute_dtype: self.pair.compute_dtype,
        }
    }

    /// What backward through a stack of adapters takes of this one.
    pub(super) fn branch<'a>(&'a self, dy: &'a Tensor, u: &'a Tensor) -> Branch<'a> {
        Branch {
            dy,
            u,
            b: &self.b,
            scaling: self.scaling,
            d_b: &self.pair.b.grad,
        }
    }

    /// Of an adapter of DoRA's: adds to its gradients and gives those of `u` and of `h`.
    fn backward_dora(
        &self,
        dy: &Tensor,
        x: &Tensor,
        weight: &Weight,
        magnitude: &Magnitude,
    ) -> Result<(Tensor, Tensor)> {
        let (d_a, d_b) = (&self.pair.a.grad, &self.pair.b.grad);
        let factors = (self.lora(), magnitude.values());
        let grads = (LoraGrad { d_a, d_b }, &magnitude.trainable.grad);
        dora::backward_adapter(dy, x, weight, factors, grads)
    }

    /// Adds to the pair's gradients and gives that of `u`.
    fn backward(&self, dy: &Tensor, x: &Tensor, u: &Tensor) -> Result<Tensor> {
        let (d_a, d_b) = (&self.pair.a.grad, &self.pair.b.grad);
        let Some(masks) = &self.masks else {
            return linear::backward_lora(dy, x, u, self.lora(), LoraGrad { d_a, d_b });
        };
        let zeros = |like: &Tensor| Tensor::zeros(like.shape(), DType::F32, like.device());
        let (masked_a, masked_b) = (zeros(d_a)?, zeros(d_b)?);
        let masked = LoraGrad {
            d_a: &masked_a,
            d_b: &masked_b,
        };
        let du = linear::backward_lora(dy, x, u, self.lora(), masked)?;
        matrix_dropout::backward(&self.a, (&masked_a, &masked_b), masks, (d_a, d_b))?;
        Ok(du)
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
    /// The output, and `u = x A^T` for backward, with what `dropout` leaves of the adapter and its input.
    pub fn forward(&self, x: &Tensor, dropout: LoraDropout) -> Result<(Tensor, Option<Tensor>)> {
        let base = |lora| linear::forward(x, &self.weight, self.bias.as_ref(), lora);
        let Some(lora) = &self.lora else {
            return base(None);
        };
        if let Some(magnitude) = &lora.magnitude {
            let (factors, bias) = (lora.factors(dropout)?, self.bias.as_ref());
            let scales = magnitude.scales(&self.weight, factors.lora())?;
            let (y, u) = dora::forward(x, &self.weight, bias, factors.lora(), &scales)?;
            return Ok((y, Some(u)));
        }
        let instances = dropout.instances();
        if instances == 1 {
            return base(Some(lora.factors(dropout)?.lora()));
        }
        let (y, _) = base(None)?;
        let u = (0..instances).map(|i| {
            let factors = lora.factors(dropout.of_instance(i))?;
            let (x, y) = (part(x, i, instances)?, part(&y, i, instances)?);
            linear::add_adapter(&x, factors.lora(), &y)
        });
        let u = together(u.collect::<Result<_>>()?)?;
        Ok((y, Some(u)))
    }

    /// The `u` of [`forward`](Self::forward) alone.
    pub fn down_project(&self, x: &Tensor, dropout: LoraDropout) -> Result<Option<Tensor>> {
        let Some(lora) = &self.lora else {
            return Ok(None);
        };
        let instances = dropout.instances();
        let u = (0..instances).map(|i| {
            let factors = lora.factors(dropout.of_instance(i))?;
            linear::down_project(&part(x, i, instances)?, factors.lora())
        });
        together(u.collect::<Result<_>>()?).map(Some)
    }

    /// Adds to the adapter's gradients and gives the gradient of the input, added to `sum` if there is one; `dropout` as in
    /// forward.
    pub fn backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        u: Option<&Tensor>,
        dropout: LoraDropout,
        sum: Option<Tensor>,
    ) -> Result<Tensor> {
        let (Some(lora), Some(u)) = (&self.lora, u) else {
            return linear::backward_input(dy, &self.weight, None, sum);
        };
        if let Some(magnitude) = &lora.magnitude {
            let factors = lora.factors(dropout)?;
            let (du, dh) = factors.backward_dora(dy, x, &self.weight, magnitude)?;
            return dora::backward_input(dy, (&du, &dh), &self.weight, factors.lora(), sum);
        }
        let instances = dropout.instances();
        if instances == 1 {
            let factors = lora.factors(dropout)?;
            let du = factors.backward(dy, x, u)?;
            return linear::backward_input(dy, &self.weight, Some((&du, factors.lora())), sum);
        }
        let dx = linear::backward_input(dy, &self.weight, None, sum)?;
        for i in 0..instances {
            let factors = lora.factors(dropout.of_instance(i))?;
            let of = |t: &Tensor| part(t, i, instances);
            let du = factors.backward(&of(dy)?, &of(x)?, &of(u)?)?;
            linear::add_adapter_backward(&du, factors.lora(), &of(&dx)?)?;
        }
        Ok(dx)
    }

    /// Whether its adapter is DoRA's.
    pub(super) fn has_magnitude(&self) -> bool {
        let lora = self.lora.as_ref();
        lora.is_some_and(|lora| lora.magnitude.is_some())
    }

    /// Adds to the adapter's gradients alone.
    pub fn backward_adapter(
        &self,
        dy: &Tensor,
        x: &Tensor,
        u: Option<&Tensor>,
        dropout: LoraDropout,
    ) -> Result<()> {
        let (Some(lora), Some(u)) = (&self.lora, u) else {
            return Ok(());
        };
        if let Some(magnitude) = &lora.magnitude {
            let factors = lora.factors(dropout)?;
            factors.backward_dora(dy, x, &self.weight, magnitude)?;
            return Ok(());
        }
        let instances = dropout.instances();
        for i in 0..instances {
            let of = |t: &Tensor| part(t, i, instances);
            let factors = lora.factors(dropout.of_instance(i))?;
            factors.backward(&of(dy)?, &of(x)?, &of(u)?)?;
        }
        Ok(())
    }
}

/// The rows of instance number `i`.
fn part(t: &Tensor, i: usize, instances: usize) -> Result<Tensor> {
    let rows = t.dim(0)? / instances;
    Ok(t.narrow(0, i * rows, rows)?)
}

/// The rows of all instances, one after another.
fn together(mut parts: Vec<Tensor>) -> Result<Tensor> {
    match parts.len() {
        1 => Ok(parts.remove(0)),
        _ => Ok(Tensor::cat(&parts, 0)?),
    }
}
