//! Adapters of a decoder: made new, taken from a PEFT adapter, and given back as one.

use std::collections::BTreeMap;

use super::config::DecoderConfig;
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
    r: usize,
    scaling: f64,
    a: Vec<f32>,
    b: Vec<f32>,
}

/// Of a linear layer's adapter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RankAndScaling {
    pub r: usize,
    pub scaling: f64,
}

impl DecoderConfig {
    /// The adapters that `config` puts on the linear layers of each block.
    pub fn adapters(
        &self,
        config: &AdapterConfig,
    ) -> Vec<[Option<RankAndScaling>; Module::ALL.len()]> {
        let at = |path: String| {
            config.targets(&path).then(|| RankAndScaling {
                r: config.rank_of(&path),
                scaling: config.scaling_of(&path),
            })
        };
        (0..self.num_layers)
            .map(|layer| Module::ALL.map(|module| at(module.path(layer))))
            .collect()
    }

    /// # Errors
    /// [`Error::Config`] for a target, a layer or a pattern that fits nothing in this model, and if no layer is targeted.
    fn expect_targets(&self, config: &AdapterConfig) -> Result<()> {
        let modules = |layer| Module::ALL.map(|module| module.path(layer));
        let paths: Vec<String> = (0..self.num_layers).flat_map(modules).collect();
        let names = Module::ALL.map(Module::name).join(", ");
        let excluded = config.exclude_modules.as_ref();
        for (key, unmatched) in [
            (
                "lora_target_modules",
                config.target_modules.unmatched(&paths),
            ),
            (
                "exclude_modules",
                excluded.and_then(|e| e.unmatched(&paths)),
            ),
            ("rank_pattern", config.rank_pattern.unmatched(&paths)),
            ("alpha_pattern", config.alpha_pattern.unmatched(&paths)),
        ] {
            if let Some(name) = unmatched {
                let reason = format!("no layer matches `{name}`; the layers are {names}");
                return Err(Error::config(key, reason));
            }
        }
        let layers = config.layers_to_transform.iter();
        let mut layers = layers.flat_map(|layers| layers.indices());
        if let Some(layer) = layers.find(|layer| **layer >= self.num_layers) {
            let reason = format!(
                "there is no layer {layer}; the model has {}",
                self.num_layers
            );
            return Err(Error::config("layers_to_transform", reason));
        }
        if !paths.iter().any(|path| config.targets(path)) {
            let reason = format!("no layer matches; the layers are {names}");
            return Err(Error::config("lora_target_modules", reason));
        }
        Ok(())
    }
}

impl Decoder {
    /// Puts a new adapter on every layer that `config` targets: B zero, and A uniform in `±1/sqrt(in)` (Kaiming's with
    /// `a = sqrt(5)`) or normal with deviation `1/r`, as PEFT's. The numbers depend on `seed`, the layer and the module
    /// alone.
    ///
    /// # Errors
    /// [`Error::Config`] for a target, a layer or a pattern that fits nothing in this model, if no layer is targeted, or if
    /// `init` is not for a base that stays as it is.
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
        self.config().expect_targets(config)?;
        let adapters = self.config().adapters(config);
        let factors = self.linears().filter_map(|(layer, module, linear)| {
            let RankAndScaling { r, scaling } = adapters[layer][module as usize]?;
            let (d_out, d_in) = (linear.weight.out_features(), linear.weight.in_features());
            let stream = [layer as u32, module as u32];
            Some(Factors {
                layer,
                module,
                r,
                scaling,
                a: new_a(init, (r, d_in), seed, stream),
                b: vec![0.0; d_out * r],
            })
        });
        let factors = factors.collect();
        self.put_adapter(factors)
    }

    /// Puts a PEFT adapter on the decoder, in place of any it has.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] for a tensor that belongs to no layer, is not there although the adapter's config targets
    /// its layer, or has another shape than its layer wants; [`Error::Config`] for a target that no layer is.
    pub fn load_adapter(&mut self, adapter: &Adapter) -> Result<()> {
        let mut rest: BTreeMap<&str, &DenseTensor> = adapter
            .tensors
            .iter()
            .map(|(name, t)| (name.as_str(), t))
            .collect();
        let adapters = self.config().adapters(&adapter.config);
        let mut factors = Vec::new();
        for (layer, module, linear) in self.linears() {
            let Some(RankAndScaling { r, scaling }) = adapters[layer][module as usize] else {
                continue;
            };
            let mut stored = |factor, shape| {
                let name = tensor_name(layer, module, factor);
                stored_values(&name, rest.remove(name.as_str()), shape)
            };
            factors.push(Factors {
                layer,
                module,
                r,
                scaling,
                a: stored("lora_A", [r, linear.weight.in_features()])?,
                b: stored("lora_B", [linear.weight.out_features(), r])?,
            });
        }
        if let Some((name, tensor)) = rest.first_key_value() {
            return Err(Error::TensorMismatch {
                tensor: name.to_string(),
                expected: "an adapter for this model and of its own config".into(),
                found: format!("{:?} for a layer that they do not have", tensor.shape),
            });
        }
        self.config().expect_targets(&adapter.config)?;
        self.put_adapter(factors)
    }

    /// Takes any adapter off and puts this one on, in the order of the forward pass.
    fn put_adapter(&mut self, factors: Vec<Factors>) -> Result<()> {
        let mut places = Vec::with_capacity(factors.len());
        let mut tensors = Vec::with_capacity(2 * factors.len());
        for Factors {
            layer,
            module,
            r,
            scaling,
            a,
            b,
        } in factors
        {
            let weight = &self.linear(layer, module).weight;
            let (d_out, d_in) = (weight.out_features(), weight.in_features());
            tensors.push(NewParameter {
                name: tensor_name(layer, module, "lora_A"),
                shape: (r, d_in),
                values: a,
            });
            tensors.push(NewParameter {
                name: tensor_name(layer, module, "lora_B"),
                shape: (d_out, r),
                values: b,
            });
            places.push(((layer, module), scaling));
        }
        let parameters = Parameters::new(tensors, self.placement())?;
        let pairs = places.into_iter().enumerate();
        let pairs = pairs.map(|(i, (place, scaling))| {
            let pair = LoraPair {
                a: parameters.trainable(2 * i)?,
                b: parameters.trainable(2 * i + 1)?,
                scaling,
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

fn stored_values(name: &str, stored: Option<&DenseTensor>, shape: [usize; 2]) -> Result<Vec<f32>> {
    match stored {
        Some(stored) if stored.shape == shape => Ok(stored.to_f32_vec()),
        _ => Err(Error::TensorMismatch {
            tensor: name.to_string(),
            expected: format!("{shape:?}"),
            found: stored.map_or("nothing".into(), |stored| format!("{:?}", stored.shape)),
        }),
    }
}
