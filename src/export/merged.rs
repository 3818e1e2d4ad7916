//! A model with an adapter in its weights: `W + scaling B A` for each layer that has one, as `merge_and_unload` of PEFT.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use candle_core::DType;
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::Result;
use crate::device::Placement;
use crate::model::{Decoder, DecoderConfig, ModelTensor, ModuleToSave};
use crate::quant::{DenseTensor, FrozenWeight, Params4bit, QuantizeOptions};
use crate::store::{
    Adapter, Checkpoint, Existing, ModelDir, TensorSource, TensorSpec, WeightQuantizer, dtype_name,
    untie, vision_part,
};

/// A model whose adapter is merged into it, weight by weight as they are asked for.
#[derive(Debug)]
pub struct Merged {
    checkpoint: Checkpoint,
    decoder: Decoder,
    config: DecoderConfig,
    /// Its tensors by their names in the files.
    parts: BTreeMap<String, ModelTensor>,
    /// Those of what else the model has, such as what it sees images with.
    others: Vec<String>,
    dtype: DType,
    rounding: Mutex<Rounding>,
}

/// Squared norms over all weights that have an adapter.
#[derive(Debug, Clone, Copy, Default)]
struct Rounding {
    /// Of what the adapter adds.
    change: f64,
    /// Of what is stored less what should be.
    error: f64,
}

impl Merged {
    /// Lays `adapter`, if there is one, on the model of `checkpoint`, which is first quantized where `quantize` says how.
    /// `dtype` is what the merged model is stored in, bf16, f16 or f32; `None` for that of the checkpoint's weights.
    ///
    /// # Errors
    /// Those of [`Decoder::load`] and [`Decoder::load_adapter`].
    pub fn new(
        checkpoint: Checkpoint,
        adapter: Option<&Adapter>,
        quantize: Option<QuantizeOptions>,
        dtype: Option<DType>,
    ) -> Result<Self> {
        let mut decoder = Decoder::load(&checkpoint, quantize, &Placement::cpu())?;
        if let Some(adapter) = adapter {
            decoder.load_adapter(adapter)?;
        }
        let is_trained = |module| decoder.vocabulary(module).trained.is_some();
        let mut config = decoder.config().clone();
        config.tie_word_embeddings &= !ModuleToSave::ALL.into_iter().any(is_trained);
        let of_weights = decoder.linears().next();
        let of_weights = of_weights.map(|(_, _, linear)| match &*linear.weight {
            FrozenWeight::Dense(weight) => weight.dtype,
            FrozenWeight::Quantized(weight) => weight.dtype,
        });
        let parts = ModelTensor::all(&config).into_iter();
        let named = |part: ModelTensor| {
            let name = part.name(&config);
            (checkpoint.stored_name(&name).into_owned(), part)
        };
        let parts = parts.map(named).collect();
        let names = checkpoint.weight_names();
        let others = names
            .filter(|name| vision_part(name).is_some())
            .map(str::to_string);
        Ok(Self {
            parts,
            others: others.collect(),
            dtype: dtype.or(of_weights).unwrap_or(DType::F32),
            checkpoint,
            decoder,
            config,
            rounding: Mutex::default(),
        })
    }

    /// Of the merged model: its head is one of its own where the adapter has trained it or the embedding.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// What it is stored in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// How the weights below the adapter are quantized, or would be.
    pub fn quantize_options(&self) -> QuantizeOptions {
        let mut linears = self.decoder.linears();
        let quantized = linears.find_map(|(_, _, linear)| match &*linear.weight {
            FrozenWeight::Dense(_) => None,
            FrozenWeight::Quantized(params) => Some(params.into()),
        });
        quantized.unwrap_or_default()
    }

    /// The directory of the model below the adapter.
    pub fn origin(&self) -> &Path {
        self.checkpoint.dir()
    }

    /// The merged model as a directory to be written, from this or by a [`MergedQuantizer`].
    pub fn model_dir<'a>(
        &'a self,
        destination: &'a Path,
        existing: Existing,
        max_shard_bytes: u64,
    ) -> ModelDir<'a> {
        ModelDir {
            origin: self.origin(),
            config: self.config_json(),
            generation_config: None,
            destination,
            existing,
            max_shard_bytes,
        }
    }

    /// `config.json` of the merged model.
    pub fn config_json(&self) -> Value {
        let mut json = self.checkpoint.config().clone();
        let Some(fields) = json.as_object_mut() else {
            return json;
        };
        fields.remove("quantization_config");
        let key = match fields.contains_key("dtype") {
            true => "dtype",
            false => "torch_dtype",
        };
        fields.insert(key.into(), json!(dtype_name(self.dtype)));
        // In a model that also sees images the configs of its parts may say it too.
        for part in fields.values_mut().filter_map(Value::as_object_mut) {
            if let Some(dtype) = part.get_mut(key) {
                *dtype = json!(dtype_name(self.dtype));
            }
        }
        if self.config.tie_word_embeddings != self.decoder.config().tie_word_embeddings {
            untie(&mut json);
        }
        json
    }

    /// How far rounding has moved the weights that were stored, as a share of what the adapter does:
    /// |stored - (W + s B A)| / |s B A| in the Frobenius norm over all of them; `None` where nothing is added.
    pub fn rounding_error(&self) -> Option<f64> {
        let rounding = *self.rounding.lock().unwrap_or_else(PoisonError::into_inner);
        (rounding.change > 0.0).then(|| (rounding.error / rounding.change).sqrt())
    }

    /// The part of the decoder with a name of transformers' or of the files.
    fn part(&self, name: &str) -> Option<ModelTensor> {
        let stored_name = self.checkpoint.stored_name(name);
        self.parts.get(&*stored_name).copied()
    }

    /// The embedding or the head: the trained one, or that of the model.
    fn vocabulary(&self, module: ModuleToSave) -> Result<DenseTensor> {
        let vocabulary = self.decoder.vocabulary(module);
        if let Some(trained) = &vocabulary.trained {
            let shape = trained.value.dims().to_vec();
            return Ok(DenseTensor::from_f32_vec(shape, trained.master()?));
        }
        Ok(dequantized(FrozenWeight::clone(&vocabulary.frozen)))
    }

    /// Counts what is lost of a weight by storing it as `stored`, a function of row and values.
    fn count_rounding(
        &self,
        part: Option<ModelTensor>,
        merged: &DenseTensor,
        stored: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let Some(ModelTensor::Weight(layer, module)) = part else {
            return;
        };
        let linear = self.decoder.linear(layer, module);
        if linear.lora.is_none() {
            return;
        }
        let (rows, cols) = (merged.shape[0], merged.shape[1]);
        let of_rows: Vec<Rounding> = (0..rows)
            .into_par_iter()
            .map_init(
                || [(); 3].map(|()| vec![0f32; cols]),
                |[base, exact, rounded], row| {
                    linear.weight.read_range(row * cols, base);
                    merged.read_range(row * cols, exact);
                    stored(row, rounded);
                    Rounding {
                        change: squared_distance(exact, base),
                        error: squared_distance(exact, rounded),
                    }
                },
            )
            .collect();
        let mut rounding = self.rounding.lock().unwrap_or_else(PoisonError::into_inner);
        for row in of_rows {
            rounding.change += row.change;
            rounding.error += row.error;
        }
    }
}

impl TensorSource for Merged {
    fn specs(&self) -> Result<Vec<TensorSpec>> {
        let spec = |(name, part): (&String, &ModelTensor)| {
            TensorSpec::of_floats(name, self.dtype, part.shape(&self.config))
        };
        let other = |name: &String| {
            let info = self.checkpoint.file(name)?.info(name)?;
            let stored = TensorSpec::new(name, info.dtype, info.shape.clone());
            let weight = self.checkpoint.weight(name);
            match (stored.float_type(), weight) {
                (Ok(_), _) => TensorSpec::of_floats(name, self.dtype, stored.shape),
                (Err(_), Ok(FrozenWeight::Quantized(weight))) => {
                    TensorSpec::of_floats(name, self.dtype, weight.shape)
                }
                // Such as positions, which are integers.
                (Err(_), _) => Ok(stored),
            }
        };
        let parts = self.parts.iter().map(spec);
        parts.chain(self.others.iter().map(other)).collect()
    }

    fn bytes(&self, spec: &TensorSpec) -> Result<Bytes> {
        if spec.float_type().is_err() {
            return self.checkpoint.bytes(spec);
        }
        let tensor = self.tensor(&spec.name)?;
        let stored = tensor.to_dtype(&spec.name, self.dtype)?;
        let cols = tensor.shape.last().copied().unwrap_or(1);
        self.count_rounding(self.part(&spec.name), &tensor, |row, values| {
            stored.read_range(row * cols, values);
        });
        Ok(stored.data)
    }

    fn tensor(&self, name: &str) -> Result<DenseTensor> {
        match self.part(name) {
            Some(ModelTensor::Embedding) => self.vocabulary(ModuleToSave::Embedding),
            Some(ModelTensor::Head) => self.vocabulary(ModuleToSave::Head),
            Some(ModelTensor::Weight(layer, module)) => {
                self.decoder.linear(layer, module).merged_weight()
            }
            Some(ModelTensor::FinalNorm | ModelTensor::Norm(..) | ModelTensor::Bias(..)) => {
                self.checkpoint.tensor(name)
            }
            None => self.checkpoint.weight(name).map(dequantized),
        }
    }

    fn release(&self, name: &str) -> Result<()> {
        let name = self.checkpoint.stored_name(name);
        // A 4-bit weight's scales and state are named after it.
        let stored = self.checkpoint.names().filter(|stored| {
            let rest = stored.strip_prefix(&*name);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        });
        for stored in stored {
            self.checkpoint.file(stored)?.release(stored)?;
        }
        Ok(())
    }
}

/// Quantizes the merged weights; one without an adapter stays as it is where it is in 4 bits of the same kind already.
#[derive(Debug)]
pub struct MergedQuantizer<'a>(pub &'a Merged);

impl WeightQuantizer for MergedQuantizer<'_> {
    fn quantize(
        &mut self,
        name: &str,
        weight: &DenseTensor,
        options: QuantizeOptions,
    ) -> Result<Params4bit> {
        let part = self.0.part(name);
        if let Some(ModelTensor::Weight(layer, module)) = part {
            let linear = self.0.decoder.linear(layer, module);
            if let (None, FrozenWeight::Quantized(params)) = (&linear.lora, &*linear.weight)
                && QuantizeOptions::from(params) == options
            {
                return Ok(params.clone());
            }
        }
        let mut params = Params4bit::quantize(name, weight, options)?;
        params.dtype = self.0.dtype;
        let cols = weight.shape[1];
        self.0.count_rounding(part, weight, |row, values| {
            params.dequantize_range(row * cols, values);
        });
        Ok(params)
    }
}

fn dequantized(weight: FrozenWeight) -> DenseTensor {
    match weight {
        FrozenWeight::Dense(weight) => weight,
        FrozenWeight::Quantized(weight) => {
            let mut values = vec![0.0; weight.numel()];
            weight.dequantize_range(0, &mut values);
            DenseTensor::from_f32_vec(weight.shape, values)
        }
    }
}

fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    let differences = a.iter().zip(b).map(|(a, b)| f64::from(a - b));
    differences.map(|difference| difference * difference).sum()
}
