//! A PEFT LoRA adapter on disk: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Tensors: `base_model.model.{path of the layer}.lora_A.weight` `[r, in]` and `.lora_B.weight` `[out, r]`; of DoRA
//! `.lora_magnitude_vector` `[out]` too. A module that is trained whole has its `base_model.model.{path}.weight`.
//! Source: `save_pretrained` of PEFT 0.21.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::adapter_config::AdapterConfig;
use super::atomic::AtomicFile;
use super::checkpoint::{read_json, refuse_file};
use super::manifest::ManifestWriter;
use super::mapped_file::MappedFile;
use super::safetensors_writer::{SafetensorsWriter, write_tensors};
use super::tensor_names::module_path;
use crate::quant::DenseTensor;
use crate::{Error, Result};

/// In the directory of an adapter, what it is and what it is of.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// In the directory of an adapter, its tensors.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// How the names of an adapter's tensors begin, before the path of the module.
pub const PREFIX: &str = "base_model.model.";
/// How the names of A, B and the magnitude of a layer end, and that of the weight of a module that is trained whole.
pub const LORA_A: &str = ".lora_A.weight";
pub const LORA_B: &str = ".lora_B.weight";
pub const MAGNITUDE: &str = ".lora_magnitude_vector";
pub const WEIGHT: &str = ".weight";

/// PEFT's name for a part of the module at `path`: [`LORA_A`] and so on.
pub fn adapter_tensor_name(path: &str, part: &str) -> String {
    format!("{PREFIX}{path}{part}")
}

/// A LoRA adapter with its tensors under the names PEFT gives them.
#[derive(Debug, Clone)]
pub struct Adapter {
    pub config: AdapterConfig,
    pub tensors: BTreeMap<String, DenseTensor>,
}

impl Adapter {
    /// Reads the adapter in `dir`.
    ///
    /// # Errors
    /// Those of [`AdapterConfig::from_json`]; [`Error::Malformed`] or [`Error::TensorMismatch`] for a tensor that is not
    /// half of a LoRA pair of the rank that the config gives its module.
    pub fn read(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        refuse_file(dir)?;
        let config_path = dir.join(CONFIG_FILE);
        let config = AdapterConfig::from_json(&read_json(&config_path)?, &config_path)?;
        let path = dir.join(WEIGHTS_FILE);
        if !path.is_file() && dir.join("adapter_model.bin").is_file() {
            let reason = "is missing; adapter_model.bin is not read, save the adapter as safetensors with PEFT";
            return Err(Error::malformed(path, reason));
        }
        let tensors = MappedFile::open(&path)?.tensors()?.into_iter();
        // Of a model that also sees images, from before transformers 4.52.
        let renamed = |(name, tensor): (String, DenseTensor)| match name.strip_prefix(PREFIX) {
            Some(module) => (format!("{PREFIX}{}", module_path(module)), tensor),
            None => (name, tensor),
        };
        let tensors = tensors.map(renamed).collect();
        let adapter = Self { config, tensors };
        adapter.check(&path)?;
        Ok(adapter)
    }

    /// Whether `dir` has the files of an adapter.
    pub fn exists(dir: impl AsRef<Path>) -> bool {
        let dir = dir.as_ref();
        dir.join(CONFIG_FILE).is_file() && dir.join(WEIGHTS_FILE).is_file()
    }

    /// Removes the adapter's files from `dir`, the config first.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(dir: impl AsRef<Path>) -> Result<()> {
        for file in [CONFIG_FILE, WEIGHTS_FILE] {
            let path = dir.as_ref().join(file);
            match fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io(path)(e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Writes the adapter into `dir`, which is made if it is not there. Tensors are stored in f32; `all-linear` becomes
    /// the names of the layers, as PEFT writes it. Each file appears when it is complete, the config last.
    ///
    /// # Errors
    /// [`Error::Io`]; those of [`read`](Self::read) for tensors that it would refuse.
    pub fn write(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        let path = dir.join(WEIGHTS_FILE);
        self.check(&path)?;
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        SafetensorsWriter::write_f32(&path, &self.tensors, metadata())?;
        AtomicFile::write(dir.join(CONFIG_FILE), self.config_json())
    }

    /// Writes the adapter among the other files of a directory with a manifest.
    ///
    /// # Errors
    /// Those of [`write`](Self::write).
    pub fn write_into(&self, dir: &mut ManifestWriter) -> Result<()> {
        self.check(Path::new(WEIGHTS_FILE))?;
        let tensors = self.tensors.iter();
        let tensors = tensors.map(|(name, tensor)| (name.clone(), tensor.to_f32()));
        let tensors = tensors.collect();
        let metadata = metadata();
        dir.write(WEIGHTS_FILE, |out| write_tensors(out, &tensors, &metadata))?;
        dir.write(CONFIG_FILE, |out| {
            out.write_all(self.config_json().as_bytes())
        })
    }

    fn config_json(&self) -> String {
        let names = self.tensors.keys();
        let paths = names.filter_map(|name| name.strip_prefix(PREFIX)?.strip_suffix(LORA_A));
        let config = AdapterConfig {
            target_modules: self.config.target_modules.for_peft(paths),
            ..self.config.clone()
        };
        format!("{:#}\n", config.to_json())
    }

    fn check(&self, path: &Path) -> Result<()> {
        if self.tensors.is_empty() {
            return Err(Error::malformed(path, "has no tensors"));
        }
        for (name, tensor) in &self.tensors {
            if self.module_to_save(name).is_some() {
                continue;
            }
            let Some((layer, part)) = Part::of(name) else {
                let reason = format!(
                    "tensor `{name}` is neither lora_A nor lora_B of a linear layer, nor named in modules_to_save"
                );
                return Err(Error::malformed(path, reason));
            };
            let Some(module) = layer.strip_prefix(PREFIX) else {
                let reason = format!("tensor `{name}` does not start with {PREFIX}");
                return Err(Error::malformed(path, reason));
            };
            if part == Part::Magnitude && !self.config.use_dora {
                let reason = format!("has `{name}`, but use_dora is false in {CONFIG_FILE}");
                return Err(Error::malformed(path, reason));
            }
            let r = self.config.rank_of(module);
            let (fits, expected) = match (part, &*tensor.shape) {
                (Part::A, shape) => (matches!(shape, [rank, _] if *rank == r), "[r, in]"),
                (Part::B, shape) => (matches!(shape, [_, rank] if *rank == r), "[out, r]"),
                (Part::Magnitude, shape) => (shape.len() == 1, "[out]"),
            };
            if !fits {
                return Err(Error::TensorMismatch {
                    tensor: name.clone(),
                    expected: format!("{expected} with r = {r}, by {CONFIG_FILE}"),
                    found: format!("{:?}", tensor.shape),
                });
            }
            self.expect_others(layer, path)?;
        }
        self.expect_modules_to_save(path)
    }

    /// The module whose weight a tensor is, if that is one that is trained whole.
    pub(super) fn module_to_save<'a>(&self, tensor: &'a str) -> Option<&'a str> {
        let module = tensor.strip_prefix(PREFIX)?.strip_suffix(WEIGHT)?;
        self.config
            .modules_to_save
            .matches(module)
            .then_some(module)
    }

    /// Every name of `modules_to_save` has a weight.
    fn expect_modules_to_save(&self, path: &Path) -> Result<()> {
        let names = self.tensors.keys();
        let saved: Vec<&str> = names.filter_map(|name| self.module_to_save(name)).collect();
        let mut wanted = self.config.modules_to_save.names();
        match wanted.find(|name| !saved.iter().any(|module| module.ends_with(name))) {
            None => Ok(()),
            Some(missing) => Err(Error::MissingTensor {
                path: path.to_path_buf(),
                tensor: format!("{PREFIX}*{missing}{WEIGHT}"),
            }),
        }
    }

    /// A layer has all parts of an adapter or none.
    fn expect_others(&self, layer: &str, path: &Path) -> Result<()> {
        let is_needed = |part: &Part| *part != Part::Magnitude || self.config.use_dora;
        let mut needed = Part::ALL.into_iter().filter(is_needed);
        let name = |part: Part| format!("{layer}{}", part.suffix());
        match needed.find(|part| !self.tensors.contains_key(&name(*part))) {
            None => Ok(()),
            Some(missing) => Err(Error::MissingTensor {
                path: path.to_path_buf(),
                tensor: name(missing),
            }),
        }
    }
}

/// A part of a layer's adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    A,
    B,
    Magnitude,
}

impl Part {
    const ALL: [Self; 3] = [Self::A, Self::B, Self::Magnitude];

    fn suffix(self) -> &'static str {
        match self {
            Self::A => LORA_A,
            Self::B => LORA_B,
            Self::Magnitude => MAGNITUDE,
        }
    }

    /// The layer and the part that a tensor's name tells.
    fn of(name: &str) -> Option<(&str, Self)> {
        let mut parts = Self::ALL.into_iter();
        parts.find_map(|part| Some((name.strip_suffix(part.suffix())?, part)))
    }
}

/// What PEFT marks its files with.
pub(super) fn metadata() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_string(), "pt".to_string())])
}
