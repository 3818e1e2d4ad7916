//! Adapters of a decoder: made new, taken from a PEFT adapter, and given back as one.

use std::collections::BTreeMap;

use super::decoder::Decoder;
use super::init_lora_weights::InitLoraWeights;
use super::lora_linear::LoraPair;
use super::names::Module;
use super::parameters::{NewParameter, Parameters, Trainable};
use crate::ops::philox::{Normal, Uniform};
use crate::quant::DenseTensor;
use crate::store::{Adapter, AdapterConfig};
use crate::{Error, Result};

/// The factors of one layer's adapter, row-major: `a: [R, in]`, `b: [out, R]`.
struct Factors {
    layer: usize,
    module: Module,
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Decoder {
    /// Puts a new adapter on every layer that `config` targets: B zero, and A uniform in `±1/sqrt(in)` (Kaiming's with
    /// `a = sqrt(5)`) or normal with deviation `1/r`, as PEFT's. The numbers depend on `seed`, the layer and the module
    /// alone.
    ///
    /// # Errors
    /// [`Error::Config`] if no layer is targeted, or `init` is not for a base that stays as it is.
    pub fn add_lora(
        &mut self,
        config: &AdapterConfig,
        init: InitLoraWeights,
        seed: u64,
    ) -> Result<()> {
        if init.makes_base() {
            let reason = format!("{init} is made by `qlora quantize`, together with the base");
            return Err(Error::config("init_lora_weights", reason));
        }
        let targets = self
            .linears()
            .filter(|(layer, module, _)| config.target_modules.matches(&module.path(*layer)));
        let factors = targets.map(|(layer, module, linear)| {
            let (d_out, d_in) = (linear.weight.out_features(), linear.weight.in_features());
            let stream = [layer as u32, module as u32];
            Factors {
                layer,
                module,
                a: new_a(init, (config.r, d_in), seed, stream),
                b: vec![0.0; d_out * config.r],
            }
        });
        let factors: Vec<_> = factors.collect();
        if factors.is_empty() {
            let names = Module::ALL.map(Module::name).join(", ");
            return Err(Error::config(
                "lora_target_modules",
                format!("no layer matches; the layers are {names}"),
            ));
        }
        self.put_adapter(factors, config)
    }

    /// Puts a PEFT adapter on the decoder, in place of any it has.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] for a tensor that belongs to no layer, or has another shape than its layer wants.
    pub fn load_adapter(&mut self, adapter: &Adapter) -> Result<()> {
        let mut rest: BTreeMap<&str, &DenseTensor> = adapter
            .tensors
            .iter()
            .map(|(name, t)| (name.as_str(), t))
            .collect();
        let r = adapter.config.r;
        let mut factors = Vec::new();
        for (layer, module, linear) in self.linears() {
            let (a_name, b_name) = (
                tensor_name(layer, module, "lora_A"),
                tensor_name(layer, module, "lora_B"),
            );
            let (Some(a), Some(b)) = (rest.remove(a_name.as_str()), rest.remove(b_name.as_str()))
            else {
                continue;
            };
            factors.push(Factors {
                layer,
                module,
                a: stored_values(&a_name, a, [r, linear.weight.in_features()])?,
                b: stored_values(&b_name, b, [linear.weight.out_features(), r])?,
            });
        }
        if let Some((name, tensor)) = rest.first_key_value() {
            return Err(Error::TensorMismatch {
                tensor: name.to_string(),
                expected: "an adapter for this model".into(),
                found: format!("{:?} for a layer it does not have", tensor.shape),
            });
        }
        self.put_adapter(factors, &adapter.config)
    }

    /// Takes any adapter off and puts this one on, in the order of the forward pass.
    fn put_adapter(&mut self, factors: Vec<Factors>, config: &AdapterConfig) -> Result<()> {
        let mut places = Vec::with_capacity(factors.len());
        let mut tensors = Vec::with_capacity(2 * factors.len());
        for Factors {
            layer,
            module,
            a,
            b,
        } in factors
        {
            let weight = &self.linear(layer, module).weight;
            let (d_out, d_in) = (weight.out_features(), weight.in_features());
            tensors.push(NewParameter {
                name: tensor_name(layer, module, "lora_A"),
                shape: (config.r, d_in),
                values: a,
            });
            tensors.push(NewParameter {
                name: tensor_name(layer, module, "lora_B"),
                shape: (d_out, config.r),
                values: b,
            });
            places.push((layer, module));
        }
        let parameters = Parameters::new(tensors, self.placement())?;
        let pairs = places.into_iter().enumerate().map(|(i, place)| {
            let pair = LoraPair {
                a: parameters.trainable(2 * i)?,
                b: parameters.trainable(2 * i + 1)?,
                scaling: config.scaling(),
                place,
            };
            Ok((place, pair))
        });
        let pairs = pairs.collect::<Result<_>>()?;
        self.set_parameters(parameters, pairs);
        Ok(())
    }

    /// The adapters as a PEFT adapter, in f32.
    pub fn adapter(&self, config: &AdapterConfig) -> Result<Adapter> {
        let tensors = self.trainables().map(|(name, trainable)| {
            let shape = trainable.value.dims().to_vec();
            Ok((name, DenseTensor::from_f32(shape, &trainable.master()?)))
        });
        Ok(Adapter {
            config: config.clone(),
            tensors: tensors.collect::<Result<_>>()?,
        })
    }

    /// The adapters' factors with PEFT's names, in the order of the forward pass.
    pub fn trainables(&self) -> impl Iterator<Item = (String, &Trainable)> {
        let pairs = self
            .linears()
            .filter_map(|(layer, module, linear)| Some((layer, module, linear.lora.as_ref()?)));
        pairs.flat_map(|(layer, module, lora)| {
            let named = |factor, trainable| (tensor_name(layer, module, factor), trainable);
            [named("lora_A", &lora.a), named("lora_B", &lora.b)]
        })
    }
}

/// The first values of A `[r, in]`, from the numbers of `seed` and `stream`.
fn new_a(
    init: InitLoraWeights,
    (r, d_in): (usize, usize),
    seed: u64,
    stream: [u32; 2],
) -> Vec<f32> {
    if init == InitLoraWeights::Gaussian {
        let mut normal = Normal::new(seed, stream);
        return (0..r * d_in)
            .map(|_| normal.next_f32() / r as f32)
            .collect();
    }
    let mut uniform = Uniform::new(seed, stream);
    let bound = 1.0 / (d_in as f32).sqrt();
    (0..r * d_in)
        .map(|_| (2.0 * uniform.next_f32() - 1.0) * bound)
        .collect()
}

/// PEFT's name for a factor of a layer's adapter.
fn tensor_name(layer: usize, module: Module, factor: &str) -> String {
    format!("base_model.model.{}.{factor}.weight", module.path(layer))
}

fn stored_values(name: &str, stored: &DenseTensor, shape: [usize; 2]) -> Result<Vec<f32>> {
    if stored.shape != shape {
        return Err(Error::TensorMismatch {
            tensor: name.to_string(),
            expected: format!("{shape:?}"),
            found: format!("{:?}", stored.shape),
        });
    }
    Ok(stored.to_f32_vec())
}
