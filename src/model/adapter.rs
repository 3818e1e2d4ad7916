//! Adapters of a decoder: made new, taken from a PEFT adapter, and given back as one.

use std::collections::BTreeMap;

use candle_core::Device;

use super::decoder::Decoder;
use super::lora_linear::{LoraPair, Trainable};
use super::names::Module;
use crate::ops::philox::Uniform;
use crate::quant::DenseTensor;
use crate::store::{Adapter, AdapterConfig};
use crate::{Error, Result};

impl Decoder {
    /// Puts a new adapter on every layer that `config` targets: A uniform in `±1/sqrt(in)` (Kaiming's with `a = sqrt(5)`,
    /// as PEFT's), B zero. The numbers depend on `seed`, the layer and the module alone.
    ///
    /// # Errors
    /// [`Error::Config`] if no layer is targeted.
    pub fn add_lora(&mut self, config: &AdapterConfig, seed: u64) -> Result<()> {
        let mut targets = Vec::new();
        for (layer, module, linear) in self.linears() {
            if config.target_modules.matches(&module.path(layer)) {
                targets.push((
                    layer,
                    module,
                    linear.weight.out_features(),
                    linear.weight.in_features(),
                ));
            }
        }
        if targets.is_empty() {
            let names = Module::ALL.map(Module::name).join(", ");
            return Err(Error::config(
                "lora_target_modules",
                format!("no layer matches; the layers are {names}"),
            ));
        }
        for (layer, module, d_out, d_in) in targets {
            let mut uniform = Uniform::new(seed, [layer as u32, module as u32]);
            let bound = 1.0 / (d_in as f32).sqrt();
            let a = (0..config.r * d_in)
                .map(|_| (2.0 * uniform.next_f32() - 1.0) * bound)
                .collect();
            let pair = LoraPair {
                a: Trainable::from_vec(a, (config.r, d_in), &Device::Cpu)?,
                b: Trainable::from_vec(
                    vec![0.0; d_out * config.r],
                    (d_out, config.r),
                    &Device::Cpu,
                )?,
                scaling: config.scaling(),
            };
            self.set_lora(layer, module, Some(pair));
        }
        Ok(())
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
        let mut pairs = Vec::new();
        for (layer, module, linear) in self.linears() {
            let (a_name, b_name) = (
                tensor_name(layer, module, "lora_A"),
                tensor_name(layer, module, "lora_B"),
            );
            let (Some(a), Some(b)) = (rest.remove(a_name.as_str()), rest.remove(b_name.as_str()))
            else {
                pairs.push((layer, module, None));
                continue;
            };
            let pair = LoraPair {
                a: trainable(&a_name, a, (r, linear.weight.in_features()))?,
                b: trainable(&b_name, b, (linear.weight.out_features(), r))?,
                scaling: adapter.config.scaling(),
            };
            pairs.push((layer, module, Some(pair)));
        }
        if let Some((name, tensor)) = rest.first_key_value() {
            return Err(Error::TensorMismatch {
                tensor: name.to_string(),
                expected: "an adapter for this model".into(),
                found: format!("{:?} for a layer it does not have", tensor.shape),
            });
        }
        for (layer, module, pair) in pairs {
            self.set_lora(layer, module, pair);
        }
        Ok(())
    }

    /// The adapters as a PEFT adapter.
    pub fn adapter(&self, config: &AdapterConfig) -> Result<Adapter> {
        let tensors = self.trainables().map(|(name, trainable)| {
            let values: Vec<f32> = trainable.value.flatten_all()?.to_vec1()?;
            Ok((
                name,
                DenseTensor::from_f32(trainable.value.dims().to_vec(), &values),
            ))
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

/// PEFT's name for a factor of a layer's adapter.
fn tensor_name(layer: usize, module: Module, factor: &str) -> String {
    format!("base_model.model.{}.{factor}.weight", module.path(layer))
}

fn trainable(name: &str, stored: &DenseTensor, shape: (usize, usize)) -> Result<Trainable> {
    if stored.shape != [shape.0, shape.1] {
        return Err(Error::TensorMismatch {
            tensor: name.to_string(),
            expected: format!("{:?}", [shape.0, shape.1]),
            found: format!("{:?}", stored.shape),
        });
    }
    Trainable::from_vec(stored.to_f32_vec(), shape, &Device::Cpu)
}
