//! Writes a PEFT adapter layer by layer: never more than one layer's factors in memory.

use std::fs;
use std::path::{Path, PathBuf};

use bytemuck::cast_slice;
use safetensors::Dtype;

use super::adapter::{
    CONFIG_FILE, LORA_A, LORA_B, PREFIX, WEIGHTS_FILE, adapter_tensor_name, metadata,
};
use super::adapter_config::AdapterConfig;
use super::atomic::AtomicFile;
use super::safetensors_writer::{SafetensorsWriter, TensorSpec};
use crate::{Error, Result};

/// A layer that gets an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraShape {
    /// The path of the layer, `model.layers.0.self_attn.q_proj`.
    pub path: String,
    pub out_features: usize,
    pub in_features: usize,
    pub r: usize,
}

impl LoraShape {
    /// The tensors of A `[r, in]` and B `[out, r]`, in f32.
    fn specs(&self) -> [TensorSpec; 2] {
        let spec = |factor: &str, rows, cols| {
            let name = adapter_tensor_name(&self.path, factor);
            TensorSpec::new(name, Dtype::F32, vec![rows, cols])
        };
        [
            spec(LORA_A, self.r, self.in_features),
            spec(LORA_B, self.out_features, self.r),
        ]
    }
}

/// An adapter being written; its files appear with [`finish`](Self::finish).
#[derive(Debug)]
pub struct AdapterWriter {
    dir: PathBuf,
    config: AdapterConfig,
    layers: std::vec::IntoIter<LoraShape>,
    weights: SafetensorsWriter,
}

impl AdapterWriter {
    /// Starts an adapter for `layers`, which come in this order, in the directory `dir`, which is made.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(dir: &Path, config: &AdapterConfig, layers: Vec<LoraShape>) -> Result<Self> {
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let paths = layers.iter().map(|layer| layer.path.as_str());
        let config = AdapterConfig {
            target_modules: config.target_modules.for_peft(paths),
            ..config.clone()
        };
        let specs: Vec<TensorSpec> = layers.iter().flat_map(LoraShape::specs).collect();
        Ok(Self {
            weights: SafetensorsWriter::create(dir.join(WEIGHTS_FILE), &specs, metadata())?,
            dir: dir.to_path_buf(),
            config,
            layers: layers.into_iter(),
        })
    }

    /// Writes the factors of the next layer: `a: [r, in]`, `b: [out, r]`.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] if they are not as long as the layer's shape says, or there is no layer left.
    pub fn append(&mut self, a: &[f32], b: &[f32]) -> Result<()> {
        let layer = self.layers.next().ok_or_else(|| Error::TensorMismatch {
            tensor: format!("{PREFIX}*"),
            expected: "the layers that were planned".into(),
            found: "one more".into(),
        })?;
        for (spec, values) in layer.specs().iter().zip([a, b]) {
            self.weights.append(spec, cast_slice(values))?;
        }
        Ok(())
    }

    /// Gives the files their names, the config last.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] if a layer was not written; [`Error::Io`].
    pub fn finish(mut self) -> Result<()> {
        if let Some(missing) = self.layers.next() {
            return Err(Error::MissingTensor {
                path: self.dir.join(WEIGHTS_FILE),
                tensor: adapter_tensor_name(&missing.path, LORA_A),
            });
        }
        self.weights.finish()?;
        let config = format!("{:#}\n", self.config.to_json());
        AtomicFile::write(self.dir.join(CONFIG_FILE), config)
    }
}
