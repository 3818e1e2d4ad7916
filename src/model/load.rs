//! The weights of a decoder, checked against its config.

use std::sync::Arc;

use candle_core::Tensor;

use super::block::{Block, InputNorm};
use super::branches::{Branches, each};
use super::config::DecoderConfig;
use super::lora_linear::LoraLinear;
use super::names::Module;
use super::tensors::{ModelTensor, Norm};
use super::vocabulary::ModuleToSave;
use crate::device::{Dequantized, Placement, Residency, Side};
use crate::ops::attention::Heads;
use crate::ops::soft_cap::SoftCap;
use crate::ops::weight::{BlockStream, DenseCache, Slots, Weight};
use crate::quant::{BlockSizes, DenseTensor, FrozenWeight, Params4bit, QuantizeOptions};
use crate::store::Checkpoint;
use crate::{Error, Result};

/// Where the weights of a decoder come from, by the names that a checkpoint has them under.
pub trait WeightSource {
    /// A matrix.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or why it cannot be read.
    fn weight(&self, name: &str) -> Result<FrozenWeight>;

    /// A vector of real numbers.
    ///
    /// # Errors
    /// Those of [`weight`](Self::weight).
    fn vector(&self, name: &str) -> Result<DenseTensor>;
}

impl WeightSource for Checkpoint {
    fn weight(&self, name: &str) -> Result<FrozenWeight> {
        Checkpoint::weight(self, name)
    }

    fn vector(&self, name: &str) -> Result<DenseTensor> {
        self.tensor(name)
    }
}

pub(super) struct Loader<'a> {
    source: &'a dyn WeightSource,
    config: &'a DecoderConfig,
    quantize: Option<QuantizeOptions>,
    placement: &'a Placement,
    /// Where the weights of a block are dequantized on a device; `None` for the CPU.
    cache: Option<Arc<DenseCache>>,
    /// Where they are brought, if they do not stay there.
    slots: Option<Slots>,
}

impl<'a> Loader<'a> {
    pub(super) fn new(
        source: &'a dyn WeightSource,
        config: &'a DecoderConfig,
        quantize: Option<QuantizeOptions>,
        placement: &'a Placement,
    ) -> Result<Self> {
        let cache = match placement.uses_kernels() {
            false => None,
            true => {
                let weights = config.dequantized_elements(placement.residence.dequantized);
                Some(Arc::new(DenseCache::new(&weights, &placement.device)?))
            }
        };
        let slots = match placement.residence.weights {
            Residency::Streamed { slots } if cache.is_some() => {
                let blocks = block_sizes(source, config, quantize.unwrap_or_default())?;
                let bytes = Weight::slot_bytes(&config.block_elements(), blocks);
                Some(Slots::new(slots, bytes, &placement.device)?)
            }
            _ => None,
        };
        Ok(Self {
            source,
            config,
            quantize,
            placement,
            cache,
            slots,
        })
    }

    /// The embedding or the head, on the device if that is its side.
    pub(super) fn vocabulary(&self, module: ModuleToSave, side: Option<Side>) -> Result<Weight> {
        let (rows, cols) = (self.config.vocab_size, self.config.hidden_size);
        let mut weight = self.stored(match module {
            ModuleToSave::Embedding => ModelTensor::Embedding,
            ModuleToSave::Head => ModelTensor::Head,
        })?;
        if side != Some(Side::Device) {
            return Ok(self.on_host(weight));
        }
        if let (FrozenWeight::Quantized(params), true) = (&weight, self.cache.is_some()) {
            // Not one of the weights that the scratch buffer has room for.
            let mut values = vec![half::bf16::ZERO; rows * cols];
            params.dequantize(&mut values);
            weight = FrozenWeight::Dense(DenseTensor::from_bf16(vec![rows, cols], &values));
        }
        self.place(weight)
    }

    fn on_host(&self, weight: FrozenWeight) -> Weight {
        Weight::on_host(weight, self.placement.compute_dtype)
    }

    fn place(&self, weight: FrozenWeight) -> Result<Weight> {
        match &self.cache {
            Some(cache) => Weight::on_device(weight, cache),
            None => Ok(self.on_host(weight)),
        }
    }

    /// A weight of the present block.
    fn place_in_block(&mut self, weight: FrozenWeight) -> Result<Weight> {
        match (&self.cache, &mut self.slots, &weight) {
            (Some(cache), Some(slots), FrozenWeight::Quantized(_)) => {
                Weight::streamed(weight, cache, slots)
            }
            // What a 4-bit model has in 16 bits stays on the device.
            _ => self.place(weight),
        }
    }

    /// What brings the weights of the blocks, if they do not stay on the device; after the last block.
    pub(super) fn stream(self) -> Result<Option<BlockStream>> {
        self.slots.map(Slots::start).transpose()
    }

    /// A matrix as stored.
    fn stored(&self, tensor: ModelTensor) -> Result<FrozenWeight> {
        let name = tensor.name(self.config);
        let weight = self.source.weight(&name)?;
        expect_shape(&name, weight.shape(), &tensor.shape(self.config))?;
        Ok(weight)
    }

    /// The weight of a norm, for outputs in units of `unit`.
    pub(super) fn norm(&self, tensor: ModelTensor, unit: f64) -> Result<Tensor> {
        let offset = if self.config.norms_less_one { 1.0 } else { 0.0 };
        self.vector(tensor, |stored| {
            ((f64::from(stored) + offset) / unit) as f32
        })
    }

    /// A small vector, each of its values by `f`, in f32.
    fn vector(&self, tensor: ModelTensor, f: impl Fn(f32) -> f32) -> Result<Tensor> {
        let name = tensor.name(self.config);
        let stored = self.source.vector(&name)?;
        let shape = tensor.shape(self.config);
        expect_shape(&name, &stored.shape, &shape)?;
        let values: Vec<f32> = stored.to_f32_vec().into_iter().map(f).collect();
        Ok(Tensor::from_vec(values, shape, &self.placement.device)?)
    }

    pub(super) fn block(&mut self, layer: usize) -> Result<Block> {
        let config = self.config;
        if let Some(slots) = &mut self.slots {
            slots.next_block();
        }
        let norm = |norm, unit| self.norm(ModelTensor::Norm(layer, norm), unit);
        let qk_norm = match config.qk_norm {
            None => None,
            Some(_) => Some((norm(Norm::Query, 1.0)?, norm(Norm::Key, 1.0)?)),
        };
        let on_input = |of: Option<Norm>| -> Result<InputNorm> {
            Ok(InputNorm {
                weight: of.map(|of| norm(of, 1.0)).transpose()?,
                eps: config.stream_eps(),
            })
        };
        let input_norm = on_input(config.input_norms.then_some(Norm::Input))?;
        let mlp_norm = on_input(config.input_norms.then_some(Norm::Mlp))?;
        // What a branch adds is multiplied by the residual multiplier, and so is the unit of the stream.
        let branch_norm = |of| norm(of, config.embedding_scale);
        let branch_norms = match config.branch_norms {
            false => None,
            true => Some([
                branch_norm(Norm::AfterAttention)?,
                branch_norm(Norm::AfterMlp)?,
            ]),
        };
        Ok(Block {
            input_norm,
            qkv: self.branches(layer, config.attention_inputs())?,
            o: self.linear(layer, Module::O)?,
            qk_norm,
            mlp_norm,
            branch_norms,
            gate_up: self.branches(layer, config.mlp_inputs())?,
            down: self.linear(layer, Module::Down)?,
            heads: Heads {
                num_heads: config.num_heads,
                num_kv_heads: config.num_kv_heads,
                head_dim: config.head_dim,
                window: config.sliding_window[layer],
                scale: config.attention_scale as f32,
                soft_cap: config.attention_soft_cap.map(|cap| SoftCap(cap as f32)),
                compute_dtype: self.placement.compute_dtype,
            },
            rope: config.layer_rope[layer],
            activation: config.activation,
            eps: config.rms_norm_eps,
        })
    }

    /// The layers that read the same input, or the one that they are.
    fn branches<const J: usize>(
        &mut self,
        layer: usize,
        modules: &'static [Module],
    ) -> Result<Branches<J>> {
        match <[Module; J]>::try_from(modules) {
            Ok(modules) => Ok(Branches::Apart(each(modules, |module| {
                self.linear(layer, module)
            })?)),
            Err(_) => {
                let fused = modules[0];
                let widths = self.config.output_widths(fused);
                let widths = widths.try_into().expect("one for each");
                Ok(Branches::Fused(self.linear(layer, fused)?.into(), widths))
            }
        }
    }

    fn linear(&mut self, layer: usize, module: Module) -> Result<LoraLinear> {
        let tensor = ModelTensor::Weight(layer, module);
        let weight = match (self.stored(tensor)?, self.quantize) {
            (FrozenWeight::Dense(weight), Some(options)) => {
                let name = tensor.name(self.config);
                FrozenWeight::Quantized(Params4bit::quantize(&name, &weight, options)?)
            }
            (weight, _) => weight,
        };
        let bias = self
            .config
            .has_bias(module)
            .then(|| self.vector(ModelTensor::Bias(layer, module), |stored| stored))
            .transpose()?;
        Ok(LoraLinear {
            weight: self.place_in_block(weight)?,
            bias,
            lora: None,
        })
    }
}

/// The blocks of the 4-bit weights of a model, which is quantized by `options` where it is not yet.
///
/// # Errors
/// Those of reading its linear layers.
pub fn block_sizes(
    source: &dyn WeightSource,
    config: &DecoderConfig,
    options: QuantizeOptions,
) -> Result<BlockSizes> {
    for (layer, module) in config.linears() {
        let name = ModelTensor::Weight(layer, module).name(config);
        if let FrozenWeight::Quantized(params) = source.weight(&name)? {
            return Ok(BlockSizes::from(&params));
        }
    }
    Ok(options.into())
}

/// The linear layers that are in 16 bits when the model is loaded with `quantize`.
///
/// # Errors
/// Those of reading them.
pub fn dense_linears(
    source: &dyn WeightSource,
    config: &DecoderConfig,
    quantize: Option<QuantizeOptions>,
) -> Result<Vec<(usize, Module)>> {
    let mut dense = Vec::new();
    if quantize.is_some() {
        return Ok(dense);
    }
    for (layer, module) in config.linears() {
        let name = ModelTensor::Weight(layer, module).name(config);
        if let FrozenWeight::Dense(_) = source.weight(&name)? {
            dense.push((layer, module));
        }
    }
    Ok(dense)
}

impl DecoderConfig {
    /// Elements of each weight of a block.
    pub fn block_elements(&self) -> Vec<usize> {
        let shapes = self.modules().map(|module| self.linear_shape(module));
        shapes.map(|(d_out, d_in)| d_out * d_in).collect()
    }

    /// Elements of each weight that lies dequantized on a device at a time.
    pub fn dequantized_elements(&self, dequantized: Dequantized) -> Vec<usize> {
        let elements = self.block_elements();
        match dequantized {
            Dequantized::Block => elements,
            Dequantized::Weight => elements.into_iter().max().into_iter().collect(),
        }
    }

    /// The weight of a linear layer, `[out, in]`.
    pub fn linear_shape(&self, module: Module) -> (usize, usize) {
        let d_out = self.output_widths(module).iter().sum();
        let d_in = match module {
            Module::O => self.num_heads * self.head_dim,
            Module::Down => self.intermediate_size,
            _ => self.hidden_size,
        };
        (d_out, d_in)
    }

    /// How wide the parts of a linear layer's output are, which is one part but for a fused layer.
    pub fn output_widths(&self, module: Module) -> Vec<usize> {
        let [q, k] = [self.num_heads, self.num_kv_heads].map(|heads| heads * self.head_dim);
        let (d, f) = (self.hidden_size, self.intermediate_size);
        match module {
            Module::Q => vec![q],
            Module::K | Module::V => vec![k],
            Module::O | Module::Down => vec![d],
            Module::Gate | Module::Up => vec![f],
            Module::Qkv => vec![q, k, k],
            Module::GateUp => vec![f, f],
        }
    }

    /// Whether a linear layer has one.
    pub fn has_bias(&self, module: Module) -> bool {
        match module {
            Module::Q | Module::K | Module::V | Module::Qkv => self.qkv_bias,
            Module::O => self.o_bias,
            Module::Gate | Module::Up | Module::Down | Module::GateUp => self.mlp_bias,
        }
    }
}

fn expect_shape(name: &str, found: &[usize], expected: &[usize]) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::TensorMismatch {
        tensor: name.to_string(),
        expected: format!("{expected:?}"),
        found: format!("{found:?}"),
    })
}
