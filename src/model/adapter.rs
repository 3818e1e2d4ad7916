//! Adapters of a decoder: made new, taken from a PEFT adapter, and given back as one.

use std::collections::BTreeMap;
use std::mem::take;

use candle_core::Tensor;
use rayon::prelude::*;

use super::config::DecoderConfig;
use super::decoder::Decoder;
use super::init_lora_weights::InitLoraWeights;
use super::lora_linear::{LoraPair, Magnitude, StackedA};
use super::names::Module;
use super::parameters::{NewParameter, NewValues, Parameters, TRAINED_ALIGNMENT, Trainable};
use super::vocabulary::ModuleToSave;
use crate::ops::linear::dora;
use crate::ops::philox::{Normal, Uniform};
use crate::quant::{DenseTensor, FrozenWeight};
use crate::store::{
    ADAPTER_PREFIX, Adapter, AdapterConfig, LORA_A, LORA_B, MAGNITUDE, WEIGHT, adapter_tensor_name,
    vision_part,
};
use crate::{Error, Result};

/// The factors of one layer's adapter, row-major: `a: [R, in]`, `b: [out, R]`.
struct Factors {
    layer: usize,
    module: Module,
    /// That of the layer.
    path: String,
    r: usize,
    scaling: f64,
    a: Vec<f32>,
    b: Vec<f32>,
    magnitude: Option<NewMagnitude>,
}

impl Factors {
    fn name(&self, part: &str) -> String {
        adapter_tensor_name(&self.path, part)
    }

    fn reads_input_of(&self, other: &Self) -> bool {
        self.layer == other.layer && self.module.with_same_input().contains(&other.module)
    }

    fn new_a(&mut self) -> NewParameter {
        let values = take(&mut self.a);
        NewParameter {
            name: self.name(LORA_A),
            shape: vec![self.r, values.len() / self.r],
            values: NewValues::Given(values),
        }
    }

    fn new_b(&mut self) -> NewParameter {
        let values = take(&mut self.b);
        NewParameter {
            name: self.name(LORA_B),
            shape: vec![values.len() / self.r, self.r],
            values: NewValues::Given(values),
        }
    }

    fn new_magnitude(&mut self) -> Option<NewParameter> {
        let values = take(&mut self.magnitude.as_mut()?.values);
        Some(NewParameter {
            name: self.name(MAGNITUDE),
            shape: vec![values.len()],
            values: NewValues::Given(values),
        })
    }
}

/// Whether kernels make the products of the adapters together on the layers that read the same input as `module`, of width
/// `d_in`: they are all there, of one rank, and each A begins where the one before ends.
pub fn are_together(module: Module, rank: impl Fn(Module) -> usize, d_in: usize) -> bool {
    let branches = module.with_same_input();
    let r = rank(module);
    branches.len() > 1
        && r > 0
        && branches.iter().all(|&branch| rank(branch) == r)
        && (r * d_in).is_multiple_of(TRAINED_ALIGNMENT)
}

/// The magnitudes of DoRA, and the squared norms of the rows of the weight, both `[out]`.
struct NewMagnitude {
    values: Vec<f32>,
    weight_squares: Vec<f32>,
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
        let mut adapters = vec![[None; Module::ALL.len()]; self.num_layers];
        for (layer, module) in self.linears() {
            let path = self.linear_path(layer, module);
            adapters[layer][module as usize] = config.targets(&path).then(|| RankAndScaling {
                r: config.rank_of(&path),
                scaling: config.scaling_of(&path),
            });
        }
        adapters
    }

    /// The paths of the linear layers of all blocks.
    fn linear_paths(&self) -> Vec<String> {
        let linears = self.linears();
        linears
            .map(|(layer, module)| self.linear_path(layer, module))
            .collect()
    }

    /// # Errors
    /// [`Error::Config`] for a pattern that fits nothing in this model.
    pub fn expect_patterns(&self, config: &AdapterConfig) -> Result<()> {
        let paths = self.linear_paths();
        self.expect_match("rank_pattern", config.rank_pattern.unmatched(&paths))?;
        self.expect_match("alpha_pattern", config.alpha_pattern.unmatched(&paths))
    }

    /// # Errors
    /// [`Error::Config`] for a target or a layer that this model does not have, and if no layer is targeted.
    pub fn expect_targets(&self, config: &AdapterConfig) -> Result<()> {
        let paths = self.linear_paths();
        let excluded = config.exclude_modules.as_ref();
        let excluded = excluded.and_then(|excluded| excluded.unmatched(&paths));
        self.expect_match(
            "lora_target_modules",
            config.target_modules.unmatched(&paths),
        )?;
        self.expect_match("exclude_modules", excluded)?;
        let layers = config.layers_to_transform.iter();
        let mut layers = layers.flat_map(|layers| layers.indices());
        if let Some(layer) = layers.find(|layer| **layer >= self.num_layers) {
            let reason = format!(
                "there is no layer {layer}; the model has {}",
                self.num_layers
            );
            return Err(Error::config("layers_to_transform", reason));
        }
        self.expect_any_target(config)
    }

    /// # Errors
    /// [`Error::Config`] if no layer is targeted.
    fn expect_any_target(&self, config: &AdapterConfig) -> Result<()> {
        match self.linear_paths().iter().any(|path| config.targets(path)) {
            true => Ok(()),
            false => {
                let reason = format!("no layer matches; the layers are {}", self.layer_names());
                Err(Error::config("lora_target_modules", reason))
            }
        }
    }

    fn layer_names(&self) -> String {
        self.modules()
            .map(Module::name)
            .collect::<Vec<_>>()
            .join(", ")
    }

    fn expect_match(&self, key: &str, unmatched: Option<&str>) -> Result<()> {
        match unmatched {
            None => Ok(()),
            Some(name) => {
                let names = self.layer_names();
                let reason = format!("no layer matches `{name}`; the layers are {names}");
                Err(Error::config(key, reason))
            }
        }
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
        self.config().expect_patterns(config)?;
        self.config().expect_modules_to_save(config)?;
        let adapters = self.config().adapters(config);
        let linears: Vec<_> = self.linears().collect();
        let factors = linears
            .into_par_iter()
            .filter_map(|(layer, module, linear)| {
                let RankAndScaling { r, scaling } = adapters[layer][module as usize]?;
                let (d_out, d_in) = (linear.weight.out_features(), linear.weight.in_features());
                let stream = [layer as u32, module as u32];
                Some(Factors {
                    layer,
                    module,
                    path: self.config().linear_path(layer, module),
                    r,
                    scaling,
                    a: new_a(init, (r, d_in), seed, stream),
                    b: vec![0.0; d_out * r],
                    // With a B of zero it is that of the weight.
                    magnitude: config.use_dora.then(|| {
                        let weight_squares = dora::squared_norms(&linear.weight);
                        NewMagnitude {
                            values: weight_squares.iter().map(|square| square.sqrt()).collect(),
                            weight_squares,
                        }
                    }),
                })
            });
        let factors = factors.collect();
        let saved = ModuleToSave::ALL.map(|module| {
            let is_trained = config.modules_to_save.matches(&module.path(self.config()));
            is_trained.then(|| FrozenWeight::clone(&self.vocabulary(module).frozen))
        });
        self.put_adapter(factors, saved)
    }

    /// Puts a PEFT adapter on the decoder, in place of any it has.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] for a tensor that belongs to no layer, is not there although the adapter's config targets
    /// its layer, or has another shape than its layer wants; [`Error::Config`] if no layer is a target. Names in its config
    /// that fit nothing are let be, as PEFT does.
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
            let (d_out, d_in) = (linear.weight.out_features(), linear.weight.in_features());
            let path = self.config().linear_path(layer, module);
            let mut stored = |part, shape: &[usize]| {
                let name = adapter_tensor_name(&path, part);
                stored_values(&name, rest.remove(name.as_str()), shape)
            };
            let (a, b) = (stored(LORA_A, &[r, d_in])?, stored(LORA_B, &[d_out, r])?);
            let magnitude = match adapter.config.use_dora {
                false => None,
                true => Some(NewMagnitude {
                    values: stored(MAGNITUDE, &[d_out])?,
                    weight_squares: dora::squared_norms(&linear.weight),
                }),
            };
            factors.push(Factors {
                layer,
                module,
                path,
                r,
                scaling,
                a,
                b,
                magnitude,
            });
        }
        let shape = [self.config().vocab_size, self.config().hidden_size];
        let mut saved = [None, None];
        for (module, saved) in ModuleToSave::ALL.into_iter().zip(&mut saved) {
            let path = module.path(self.config());
            if adapter.config.modules_to_save.matches(&path) {
                let name = adapter_tensor_name(&path, WEIGHT);
                *saved = Some(match rest.remove(name.as_str()) {
                    // It joins an adapter that was trained without it.
                    None => FrozenWeight::clone(&self.vocabulary(module).frozen),
                    stored => FrozenWeight::Dense(expect_stored(&name, stored, &shape)?.clone()),
                });
            }
        }
        if let Some((name, tensor)) = rest.first_key_value() {
            let path = name.strip_prefix(ADAPTER_PREFIX);
            let sees = path.and_then(vision_part);
            let expected = match sees {
                None => "an adapter for this model and of its own config",
                Some(_) => {
                    "an adapter on the language model alone: what a model sees images with is not computed"
                }
            };
            return Err(Error::TensorMismatch {
                tensor: name.to_string(),
                expected: expected.into(),
                found: format!("{:?} for a layer that they do not have", tensor.shape),
            });
        }
        self.config().expect_any_target(&adapter.config)?;
        self.config().expect_modules_to_save(&adapter.config)?;
        self.put_adapter(factors, saved)
    }

    /// Takes any adapter off and puts this one on, in the order of the forward pass.
    fn put_adapter(
        &mut self,
        mut factors: Vec<Factors>,
        saved: [Option<FrozenWeight>; ModuleToSave::ALL.len()],
    ) -> Result<()> {
        let whole = |module: ModuleToSave, weight: FrozenWeight| NewParameter {
            name: module.tensor_name(self.config()),
            shape: weight.shape().to_vec(),
            values: NewValues::Of(weight),
        };
        let [embedding, head] = saved;
        let is_saved = [embedding.is_some(), head.is_some()];
        let mut tensors = Vec::with_capacity(2 * factors.len());
        tensors.extend(embedding.map(|weight| whole(ModuleToSave::Embedding, weight)));
        for branches in factors.chunk_by_mut(Factors::reads_input_of) {
            // Side by side the A are one matrix.
            tensors.extend(branches.iter_mut().map(Factors::new_a));
            tensors.extend(branches.iter_mut().map(Factors::new_b));
            tensors.extend(branches.iter_mut().filter_map(Factors::new_magnitude));
        }
        tensors.extend(head.map(|weight| whole(ModuleToSave::Head, weight)));
        // The memory of the one before is there for this one.
        let none = Parameters::none(&self.placement().device)?;
        self.set_parameters(none, Vec::new(), [None, None]);
        let parameters = Parameters::new(tensors, self.placement())?;
        let mut pairs = Vec::with_capacity(factors.len());
        for branches in factors.chunk_by(Factors::reads_input_of) {
            let mut stack = self.stacked(branches, &parameters)?;
            for factors in branches {
                let part = |part| parameters.trainable(&factors.name(part));
                let magnitude = match &factors.magnitude {
                    None => None,
                    Some(NewMagnitude { weight_squares, .. }) => Some(Magnitude {
                        trainable: part(MAGNITUDE)?,
                        weight_squares: Tensor::new(&weight_squares[..], &self.placement().device)?,
                        lasting_scales: None,
                    }),
                };
                let place = (factors.layer, factors.module);
                let pair = LoraPair {
                    a: part(LORA_A)?,
                    b: part(LORA_B)?,
                    magnitude,
                    scaling: factors.scaling,
                    compute_dtype: self.placement().compute_dtype,
                    place,
                    stack: stack.take(),
                };
                pairs.push((place, pair));
            }
        }
        let trained = |module: ModuleToSave, is_saved: bool| {
            let name = module.tensor_name(self.config());
            let trainable = is_saved.then(|| parameters.trainable(&name));
            trainable.transpose()
        };
        let [embedding, head] = is_saved;
        let embedding = trained(ModuleToSave::Embedding, embedding)?;
        let head = trained(ModuleToSave::Head, head)?;
        self.set_parameters(parameters, pairs, [embedding, head]);
        Ok(())
    }

    /// The A of adapters whose products with their input are made together, if they are.
    fn stacked(&self, branches: &[Factors], parameters: &Parameters) -> Result<Option<StackedA>> {
        let [first, _, ..] = branches else {
            return Ok(None);
        };
        let ranks = |module: Module| {
            let of_module = branches.iter().find(|factors| factors.module == module);
            of_module.map_or(0, |factors| factors.r)
        };
        let has_magnitude = branches.iter().any(|factors| factors.magnitude.is_some());
        let d_in = self.linear(first.layer, first.module).weight.in_features();
        if !self.placement().uses_kernels()
            || has_magnitude
            || !are_together(first.module, ranks, d_in)
        {
            return Ok(None);
        }
        let names: Vec<_> = branches
            .iter()
            .map(|factors| factors.name(LORA_A))
            .collect();
        let (value, grad) = parameters.together(&names)?;
        Ok(Some(StackedA { value, grad }))
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

    /// All that is trained with PEFT's names, in the order of the forward pass.
    pub fn trainables(&self) -> impl Iterator<Item = (String, &Trainable)> {
        let [embedding, head] = ModuleToSave::ALL.map(|module| {
            let trained = self.vocabulary(module).trained.as_ref();
            trained.map(|trained| (module.tensor_name(self.config()), trained))
        });
        embedding.into_iter().chain(self.factors()).chain(head)
    }

    /// The adapters' factors.
    fn factors(&self) -> impl Iterator<Item = (String, &Trainable)> {
        let pairs = self
            .linears()
            .filter_map(|(layer, module, linear)| Some((layer, module, linear.lora.as_ref()?)));
        pairs.flat_map(|(layer, module, lora)| {
            let path = self.config().linear_path(layer, module);
            let named = move |part, trainable| (adapter_tensor_name(&path, part), trainable);
            let magnitude = lora.magnitude.as_ref();
            let magnitude = magnitude.map(|magnitude| named(MAGNITUDE, &magnitude.trainable));
            [named(LORA_A, &lora.a), named(LORA_B, &lora.b)]
                .into_iter()
                .chain(magnitude)
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

fn stored_values(name: &str, stored: Option<&DenseTensor>, shape: &[usize]) -> Result<Vec<f32>> {
    Ok(expect_stored(name, stored, shape)?.to_f32_vec())
}

/// A tensor that is there, in this shape.
pub(crate) fn expect_stored<'a>(
    name: &str,
    stored: Option<&'a DenseTensor>,
    shape: &[usize],
) -> Result<&'a DenseTensor> {
    match stored {
        Some(stored) if stored.shape == shape => Ok(stored),
        _ => Err(Error::TensorMismatch {
            tensor: name.to_string(),
            expected: format!("{shape:?}"),
            found: stored.map_or("nothing".into(), |stored| format!("{:?}", stored.shape)),
        }),
    }
}
