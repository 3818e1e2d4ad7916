//! A GGUF file read again, by whichever program it was written: as the model that llama.cpp makes of it, or as the adapter.
//!
//! What it says is held against what a file of the base would say, which is checked against llama.cpp itself.

use std::collections::{BTreeMap, HashSet};

use serde_json::json;

use super::architecture::{self, Architecture};
use super::byte_level;
use super::difference::{Difference, differences, json_of};
use super::hyperparameters::{self, ROPE_FREQS, WINDOW_PATTERN};
use super::tensor_names::tensor_name;
use super::vocabulary::{self, PRE_TOKENIZER};
use super::writer::Metadata;
use super::{GgufBase, GgufType};
use crate::model::{DecoderConfig, ModelTensor, WeightSource, expect_stored};
use crate::quant::{DenseTensor, FrozenWeight};
use crate::store::{
    Adapter, AdapterConfig, GgufFile, LORA_A, LORA_B, ModulePatterns, TargetModules,
    adapter_tensor_name,
};
use crate::{Error, Result};

/// By how much of itself a divisor of a rotary frequency may be another.
const DIVISOR_TOLERANCE: f32 = 1e-5;

const ARCHITECTURE: &str = "general.architecture";

/// The model of a GGUF file.
#[derive(Debug)]
pub struct GgufModel {
    file: GgufFile,
    architecture: Architecture,
    config: DecoderConfig,
    /// Its tensors, by the names that a checkpoint has them under.
    tensors: BTreeMap<String, ModelTensor>,
}

impl GgufModel {
    /// Takes the file for a model of the shape of `base`.
    ///
    /// # Errors
    /// [`Error::Malformed`] for the first key or tensor by which llama.cpp would compute something else than the base, such as
    /// another number of heads or a scaling of its own.
    pub fn new(file: GgufFile, base: GgufBase) -> Result<Self> {
        let (config, architecture) = architecture::read(&base)?;
        let architecture = architecture.in_file(file.text(ARCHITECTURE), &config);
        expect_text(&file, ARCHITECTURE, architecture.name())?;
        let mut config = architecture.computed(config);
        // What llama.cpp goes by.
        config.tie_word_embeddings = !file.contains(&tensor_name(ModelTensor::Head, architecture));
        let tensors = ModelTensor::all(&config).into_iter();
        let model = Self {
            tensors: tensors
                .map(|tensor| (tensor.name(&config), tensor))
                .collect(),
            file,
            architecture,
            config,
        };
        model.expect_hyperparameters(&base)?;
        model.expect_tensors()?;
        Ok(model)
    }

    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Where its tokenizer and chat template are not those of the base, a sentence each.
    ///
    /// # Errors
    /// [`Error::UnsupportedModel`] if it is not known what llama.cpp should have for the tokenizer of the base.
    pub fn tokenizer_differences(&self, base: &GgufBase) -> Result<Vec<String>> {
        let mut expected = Metadata::default();
        vocabulary::add(&mut expected, base, self.config.vocab_size, &mut Vec::new())?;
        let found = |key: &str| match key {
            "tokenizer.ggml.add_eos_token" => self.file.json(key).or(Some(json!(false))),
            PRE_TOKENIZER => self
                .file
                .text(key)
                .map(|name| json!(byte_level::written_name(name))),
            _ => self.file.json(key),
        };
        let differences = differences(expected.iter(), found);
        Ok(differences
            .map(|difference| difference.to_string())
            .collect())
    }

    fn expect_hyperparameters(&self, base: &GgufBase) -> Result<()> {
        let mut expected = Metadata::default();
        let (architecture, config) = (self.architecture, &self.config);
        hyperparameters::add(&mut expected, base, architecture, config, GgufType::F32);
        let prefix = format!("{}.", architecture.name());
        let own = |key: &&str| key.starts_with(&prefix);
        let expected: Vec<_> = expected.iter().filter(|(key, _)| own(key)).collect();
        let windows: Vec<bool> = config.sliding_window.iter().map(Option::is_some).collect();
        let found = |key: &str| {
            let own_key = &key[prefix.len()..];
            let default = || hyperparameters::default_of(own_key, architecture, config);
            match self.file.json(key) {
                // Said layer by layer.
                Some(list) if own_key == WINDOW_PATTERN && list == json!(windows) => architecture
                    .window_pattern(config)
                    .map(|pattern| json!(pattern)),
                None => default().as_ref().map(json_of),
                found => found,
            }
        };
        if let Some(difference) = differences(expected.iter().copied(), found).next() {
            return Err(self.malformed(difference));
        }
        let known: HashSet<&str> = expected.into_iter().map(|(key, _)| key).collect();
        let is_unknown = |key: &&str| {
            let says_none =
                key.ends_with(".rope.scaling.type") && self.file.text(key) == Some("none");
            // llama.cpp's converter writes it, what computes these models does not ask for it.
            let is_unread = key.ends_with(".rope.scaling.yarn_attn_factor");
            !says_none && !is_unread && !known.contains(key)
        };
        let mut keys = self.file.keys().into_iter().filter(own);
        match keys.find(is_unknown) {
            None => Ok(()),
            Some(key) => Err(self.malformed(Difference::unexpected(&self.file, key))),
        }
    }

    /// No tensor is there that the model does not have; those that are not are found missing when they are read.
    fn expect_tensors(&self) -> Result<()> {
        let tensors = self.tensors.values();
        let mut known: HashSet<String> = tensors
            .map(|tensor| tensor_name(*tensor, self.architecture))
            .collect();
        if let Some(expected) = hyperparameters::rope_divisors(&self.config) {
            known.insert(ROPE_FREQS.into());
            let found = self.file.tensor(ROPE_FREQS)?;
            expect_stored(ROPE_FREQS, Some(&found), &expected.shape)?;
            let (found, expected) = (found.to_f32_vec(), expected.to_f32_vec());
            let is_close = |(a, b): (&f32, &f32)| (a - b).abs() <= DIVISOR_TOLERANCE * b.abs();
            if let Some(at) = found.iter().zip(&expected).position(|pair| !is_close(pair)) {
                let (found, expected) = (found[at], expected[at]);
                return Err(self.malformed(format!(
                    "{ROPE_FREQS}[{at}] is {found}, and {expected} by the model's config"
                )));
            }
        }
        let mut names = self.file.names().into_iter();
        match names.find(|name| !known.contains(*name)) {
            None => Ok(()),
            Some(name) => Err(self.malformed(format!(
                "has tensor `{name}`, which the model does not have"
            ))),
        }
    }

    fn malformed(&self, reason: impl ToString) -> Error {
        Error::malformed(self.file.path(), reason.to_string())
    }
}

impl WeightSource for GgufModel {
    fn weight(&self, name: &str) -> Result<FrozenWeight> {
        self.vector(name).map(FrozenWeight::Dense)
    }

    fn vector(&self, name: &str) -> Result<DenseTensor> {
        let tensor = self.tensors.get(name).ok_or_else(|| Error::MissingTensor {
            path: self.file.path().to_path_buf(),
            tensor: name.to_string(),
        })?;
        let stored_name = tensor_name(*tensor, self.architecture);
        let stored = self.file.tensor(&stored_name)?;
        expect_stored(&stored_name, Some(&stored), &tensor.shape(&self.config))?;
        Ok(self.architecture.change(*tensor, &self.config).undo(stored))
    }
}

/// Whether the file is one of an adapter.
pub fn is_gguf_adapter(file: &GgufFile) -> bool {
    file.text("general.type") == Some("adapter")
}

/// The LoRA adapter of a file, one for the model `base`.
///
/// # Errors
/// [`Error::Malformed`] or [`Error::TensorMismatch`] for what does not fit the base.
pub fn read_gguf_adapter(file: &GgufFile, base: GgufBase) -> Result<Adapter> {
    let (config, architecture) = architecture::read(&base)?;
    let architecture = architecture.in_file(file.text(ARCHITECTURE), &config);
    expect_text(file, ARCHITECTURE, architecture.name())?;
    expect_text(file, "adapter.type", "lora")?;
    let malformed = |reason: String| Error::malformed(file.path(), reason);
    let alpha = file.json("adapter.lora.alpha");
    let alpha = alpha
        .and_then(|alpha| alpha.as_f64())
        .filter(|alpha| *alpha > 0.0)
        .ok_or_else(|| malformed("has no adapter.lora.alpha above 0".into()))?;
    let mut tensors = BTreeMap::new();
    let mut ranks = Vec::new();
    for layer in 0..config.num_layers {
        for module in config.modules() {
            let weight = ModelTensor::Weight(layer, module);
            let [a_name, b_name] = ["lora_a", "lora_b"]
                .map(|part| format!("{}.{part}", tensor_name(weight, architecture)));
            if !file.contains(&a_name) {
                continue;
            }
            let (a, b) = (file.tensor(&a_name)?, file.tensor(&b_name)?);
            let (d_out, d_in) = config.linear_shape(module);
            // One without a rank, or of rank 0, has not the shape that is expected.
            let r = a.shape.first().copied().unwrap_or(0).max(1);
            expect_stored(&a_name, Some(&a), &[r, d_in])?;
            expect_stored(&b_name, Some(&b), &[d_out, r])?;
            let b = architecture.change(weight, &config).undo(b);
            let path = config.linear_path(layer, module);
            tensors.insert(adapter_tensor_name(&path, LORA_A), a);
            tensors.insert(adapter_tensor_name(&path, LORA_B), b);
            ranks.push((path, r));
        }
    }
    if tensors.is_empty() || tensors.len() != file.names().len() {
        let (found, all) = (tensors.len(), file.names().len());
        let reason = format!("{found} of its {all} tensors are of a linear layer of the model");
        return Err(malformed(reason));
    }
    let r = ranks[0].1;
    let paths = ranks.iter().map(|(path, _)| path.clone()).collect();
    let others = ranks.into_iter().filter(|(_, rank)| *rank != r);
    Ok(Adapter {
        config: AdapterConfig {
            r,
            lora_alpha: alpha,
            target_modules: TargetModules::Names(paths),
            rank_pattern: ModulePatterns::new(others).map_err(malformed)?,
            ..AdapterConfig::default()
        },
        tensors,
    })
}

fn expect_text(file: &GgufFile, key: &str, expected: &str) -> Result<()> {
    match file.text(key) {
        Some(found) if found == expected => Ok(()),
        found => {
            let found = found.unwrap_or("not there");
            let reason = format!("{key} is {found}, and {expected} for this model");
            Err(Error::malformed(file.path(), reason))
        }
    }
}
