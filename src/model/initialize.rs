//! 4-bit weights and the adapter on them, made of 16-bit weights together: PiSSA, LoftQ, OLoRA.
//!
//! With `s` the adapter's scaling and `Q` the quantized weight, `Q + s B A` stands for `W`:
//! - PiSSA: `B A s` is the best approximation of `W` of its rank, `B = U sqrt(S / s)`, `A = sqrt(S / s) V^T`, and
//!   `Q = quantize(W - s B A)`. Each further iteration takes the factors of `W - Q` and quantizes anew (QPiSSA).
//! - LoftQ: `Q = quantize(W)`, the factors those of `W - Q`; each further iteration quantizes `W - s B A` first.
//! - OLoRA: `B`, `A` are the first columns of `Q` and rows of `R` in `W = Q R`, and `quantize(W - s B A)`.
//!
//! Sources: arXiv:2404.02948, arXiv:2310.08659, arXiv:2406.01775; `tuners/lora/layer.py` and `utils/loftq_utils.py` of PEFT
//! 0.21, whose LoftQ leaves the scaling out: it is the same where that is 1.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use candle_core::Device;
use rayon::prelude::*;

use super::init_lora_weights::InitLoraWeights;
use crate::ops::low_rank::{
    PowerIterations, SvdOptions, leading_qr, subtract_product, truncated_svd,
};
use crate::quant::{DenseTensor, Params4bit, QuantizeOptions};
use crate::store::{
    AdapterConfig, AdapterWriter, INITIAL_ADAPTER, Initialization, LoraShape, RelativeTo,
    TensorSpec, WeightQuantizer, model_name, module_path,
};
use crate::{Error, Result};

/// 1e-6 took five times the work of 16 iterations for a 5000th less of error, on the weights of a layer of a 7B model.
const PISSA_TOLERANCE: f64 = 1e-5;

/// What quantization loses is like noise, of which 64 directions of 4096 hold some percent: a thousandth of that is little.
const LOFTQ_TOLERANCE: f64 = 1e-3;

/// Elements that one task reads.
const TASK_ELEMENTS: usize = 1 << 16;

/// The most iterations, as far as LoftQ was measured by its authors.
const MAX_QUANTIZATION_ITERATIONS: usize = 5;

/// How to make the weights and the adapter.
#[derive(Debug, Clone)]
pub struct InitializeOptions {
    pub method: InitLoraWeights,
    pub adapter: AdapterConfig,
    /// How many times a weight is quantized: PEFT's `loftq_iter`, the T of QPiSSA.
    pub quantization_iterations: usize,
    /// Of the random subspace of the singular value decomposition.
    pub seed: u64,
    /// Where the products are made.
    pub device: Device,
    /// For the record: where the weights come from.
    pub original_model: PathBuf,
    /// For the record: where the 4-bit weights go.
    pub initialized_base: PathBuf,
}

/// Quantizes the weights of a model and writes the adapter that belongs to them into [`INITIAL_ADAPTER`].
///
/// One weight at a time: it takes the memory of the largest in f32 and in 4 bits.
pub struct InitializingQuantizer {
    options: InitializeOptions,
    output: Option<(PathBuf, AdapterWriter)>,
}

/// A weight that gets an adapter.
struct Layer<'w> {
    weight: &'w DenseTensor,
    r: usize,
    scaling: f32,
}

/// The factors of an adapter: `a: [r, in]`, `b: [out, r]`, row-major.
struct Factors {
    a: Vec<f32>,
    b: Vec<f32>,
}

impl InitializingQuantizer {
    /// # Errors
    /// [`Error::Config`] for a method that leaves the base as it is, or a number of iterations that the method does not have.
    pub fn new(options: InitializeOptions) -> Result<Self> {
        let method = options.method;
        if !method.makes_base() {
            let reason =
                format!("{method} leaves the base model as it is: give it to `qlora train`");
            return Err(Error::config("init_lora_weights", reason));
        }
        let most = match method {
            InitLoraWeights::Olora => 1,
            _ => MAX_QUANTIZATION_ITERATIONS,
        };
        let iterations = options.quantization_iterations;
        if !(1..=most).contains(&iterations) {
            let reason = format!("must be from 1 to {most} for {method}, found {iterations}");
            let key = match method.is_pissa() {
                true => "qpissa_iter",
                false => "loftq_iter",
            };
            return Err(Error::config(key, reason));
        }
        Ok(Self {
            options,
            output: None,
        })
    }

    /// The path of the layer with the weight `name` if it gets an adapter.
    fn target<'n>(&self, name: &'n str) -> Option<Cow<'n, str>> {
        let path = module_path(name.strip_suffix(".weight")?);
        self.options.adapter.targets(&path).then_some(path)
    }

    fn lora_shape(&self, weight: &TensorSpec) -> Result<Option<LoraShape>> {
        let (Some(path), &[out_features, in_features]) =
            (self.target(&weight.name), weight.shape.as_slice())
        else {
            return Ok(None);
        };
        let r = self.options.adapter.rank_of(&path);
        if r > out_features.min(in_features) {
            return Err(Error::TensorMismatch {
                tensor: weight.name.clone(),
                expected: format!("at least as many rows and columns as the rank, {r}"),
                found: format!("{:?}; choose a smaller lora_r", weight.shape),
            });
        }
        Ok(Some(LoraShape {
            path: path.into_owned(),
            out_features,
            in_features,
            r,
        }))
    }

    /// The 4-bit weight and the factors on it.
    fn initialize(
        &self,
        name: &str,
        layer: &Layer,
        options: QuantizeOptions,
    ) -> Result<(Params4bit, Factors)> {
        let weight = layer.weight;
        let mut values = vec![0f32; weight.numel()];
        fill(&mut values, |start, out| weight.read_range(start, out));
        expect_finite(name, &values)?;
        let quantize = |values: &[f32]| Params4bit::quantize_f32(name, values, weight, options);
        let again = 1..self.options.quantization_iterations;
        if self.options.method == InitLoraWeights::Loftq {
            let mut quantized = quantize(&values)?;
            for _ in again {
                let factors = self.factors_of_rest(&mut values, layer, &quantized)?;
                layer.residual(&mut values, &factors);
                quantized = quantize(&values)?;
            }
            let factors = self.factors_of_rest(&mut values, layer, &quantized)?;
            return Ok((quantized, factors));
        }
        let mut factors = self.factors(&values, layer)?;
        layer.residual(&mut values, &factors);
        for _ in again {
            let quantized = quantize(&values)?;
            factors = self.factors_of_rest(&mut values, layer, &quantized)?;
            layer.residual(&mut values, &factors);
        }
        Ok((quantize(&values)?, factors))
    }

    /// The factors of `W - Q`, which `values` is left with.
    fn factors_of_rest(
        &self,
        values: &mut [f32],
        layer: &Layer,
        quantized: &Params4bit,
    ) -> Result<Factors> {
        fill(values, |start, out| {
            difference(layer.weight, quantized, start, out);
        });
        self.factors(values, layer)
    }

    /// The factors whose product, scaled, stands for `values`.
    fn factors(&self, values: &[f32], layer: &Layer) -> Result<Factors> {
        let rank = layer.r;
        let dims = (layer.weight.shape[0], layer.weight.shape[1]);
        let power_iterations = match self.options.method {
            InitLoraWeights::Olora => {
                let qr = leading_qr(values, dims, rank, &self.options.device)?;
                return Ok(Factors {
                    b: transpose(&qr.q, rank),
                    a: qr.r,
                });
            }
            InitLoraWeights::PissaNiter(count) => PowerIterations::Fixed(count),
            InitLoraWeights::Loftq => PowerIterations::UntilConverged {
                tolerance: LOFTQ_TOLERANCE,
            },
            _ => PowerIterations::UntilConverged {
                tolerance: PISSA_TOLERANCE,
            },
        };
        let options = SvdOptions {
            rank,
            power_iterations,
            seed: self.options.seed,
            device: self.options.device.clone(),
        };
        let mut svd = truncated_svd(values, dims, &options)?;
        for (t, value) in svd.values.iter().enumerate() {
            let root = (value / layer.scaling).sqrt();
            let scale = |vector: &mut [f32]| vector.iter_mut().for_each(|v| *v *= root);
            scale(&mut svd.left[t * dims.0..][..dims.0]);
            scale(&mut svd.right[t * dims.1..][..dims.1]);
        }
        Ok(Factors {
            b: transpose(&svd.left, rank),
            a: svd.right,
        })
    }
}

impl Layer<'_> {
    /// `residual = W - s B A`.
    fn residual(&self, residual: &mut [f32], factors: &Factors) {
        fill(residual, |start, out| self.weight.read_range(start, out));
        subtract_product(residual, &factors.b, &factors.a, self.r, self.scaling);
    }
}

impl WeightQuantizer for InitializingQuantizer {
    fn begin(&mut self, dir: &Path, weights: &[TensorSpec]) -> Result<()> {
        let layers = weights.iter().map(|weight| self.lora_shape(weight));
        let layers: Vec<LoraShape> = layers
            .filter_map(Result::transpose)
            .collect::<Result<_>>()?;
        if layers.is_empty() {
            let reason = "no layer that is quantized matches".to_string();
            return Err(Error::config("lora_target_modules", reason));
        }
        let dir = dir.join(INITIAL_ADAPTER);
        let writer = AdapterWriter::create(&dir, &self.options.adapter, layers)?;
        self.output = Some((dir, writer));
        Ok(())
    }

    fn quantize(
        &mut self,
        name: &str,
        weight: &DenseTensor,
        options: QuantizeOptions,
    ) -> Result<Params4bit> {
        let Some(path) = self.target(name) else {
            return Params4bit::quantize(name, weight, options);
        };
        let layer = Layer {
            weight,
            r: self.options.adapter.rank_of(&path),
            scaling: self.options.adapter.scaling_of(&path) as f32,
        };
        let (quantized, Factors { a, b }) = self.initialize(name, &layer, options)?;
        let (_, writer) = self.output.as_mut().expect("`begin` comes first");
        writer.append(&a, &b)?;
        Ok(quantized)
    }

    fn finish(&mut self) -> Result<()> {
        let (dir, writer) = self.output.take().expect("`begin` comes first");
        writer.finish()?;
        let options = &self.options;
        let (original_model, original_revision) = model_name(&options.original_model);
        let record = Initialization {
            init_lora_weights: options.method.to_string(),
            quantization_iterations: options.quantization_iterations,
            seed: options.seed,
            original_model,
            original_revision,
            initialized_base: options.initialized_base.display().to_string(),
            adapter_is_relative_to: RelativeTo::InitializedBase,
        };
        record.write(&dir)
    }
}

/// Fills `values` in parallel with what `read(start, out)` gives for the elements from `start` on.
fn fill(values: &mut [f32], read: impl Fn(usize, &mut [f32]) + Sync) {
    let tasks = values.par_chunks_mut(TASK_ELEMENTS).enumerate();
    tasks.for_each(|(task, out)| read(task * TASK_ELEMENTS, out));
}

/// `W - Q`.
fn difference(weight: &DenseTensor, quantized: &Params4bit, start: usize, out: &mut [f32]) {
    const RUN: usize = 4096;
    let mut buffer = [0f32; RUN];
    for (i, out) in out.chunks_mut(RUN).enumerate() {
        let dequantized = &mut buffer[..out.len()];
        weight.read_range(start + i * RUN, out);
        quantized.dequantize_range(start + i * RUN, dequantized);
        out.iter_mut().zip(dequantized).for_each(|(w, q)| *w -= *q);
    }
}

fn expect_finite(name: &str, values: &[f32]) -> Result<()> {
    match values.par_iter().position_first(|v| !v.is_finite()) {
        None => Ok(()),
        Some(index) => Err(Error::NonFinite {
            tensor: name.to_owned(),
            index,
            value: values[index],
        }),
    }
}

/// `[rank, n]` to `[n, rank]`.
fn transpose(vectors: &[f32], rank: usize) -> Vec<f32> {
    let n = vectors.len() / rank;
    let entries = (0..n).flat_map(|i| (0..rank).map(move |t| vectors[t * n + i]));
    entries.collect()
}
