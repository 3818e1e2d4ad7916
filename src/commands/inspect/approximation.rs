//! How far 4-bit weights, alone and with an adapter, are from the weights they were made of.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, bail};
use qlora::model::{ApproximationError, LoraFactors};
use qlora::quant::FrozenWeight;
use qlora::store::{Adapter, Checkpoint, LORA_A, LORA_B, adapter_tensor_name, module_path};
use serde_json::{Value, json};

/// The error of each quantized weight, by its name.
pub struct Approximation {
    has_adapter: bool,
    layers: Vec<(String, ApproximationError)>,
}

impl Approximation {
    /// Compares the model in `base`, with the adapter if there is one, with the model in `original`.
    pub fn measure(base: &Path, original: &Path, adapter: Option<&Path>) -> anyhow::Result<Self> {
        let (base, original) = (Checkpoint::open(base)?, Checkpoint::open(original)?);
        let adapter = adapter.map(Adapter::read).transpose()?;
        let mut layers = Vec::new();
        // Names of both: those of a quantized weight's parts are of one alone.
        let names = base.names().filter(|name| name.ends_with(".weight"));
        for name in names {
            let path = module_path(name);
            // The two may have other names for the layers of a model that also sees images.
            let original_name = original.stored_name(&path);
            if !original.contains(&original_name) {
                continue;
            }
            let weight = base.weight(name)?;
            let source = original.weight(&original_name)?;
            if matches!(source, FrozenWeight::Quantized(_)) {
                bail!(
                    "{}: is quantized itself, give the model that {} was made of",
                    original.dir().display(),
                    base.dir().display()
                );
            }
            if !matches!(weight, FrozenWeight::Quantized(_)) {
                continue;
            }
            layers.push((
                name.to_string(),
                layer_error(name, &source, &weight, adapter.as_ref())?,
            ));
            original.file(&original_name)?.release(&original_name)?;
            base.file(name)?.release(name)?;
        }
        if layers.is_empty() {
            bail!(
                "{}: has no 4-bit weight that {} has too",
                base.dir().display(),
                original.dir().display()
            );
        }
        Ok(Self {
            has_adapter: adapter.is_some(),
            layers,
        })
    }

    fn total(&self) -> ApproximationError {
        let errors = self.layers.iter().map(|(_, error)| *error);
        errors.fold(ApproximationError::default(), ApproximationError::plus)
    }

    pub fn json(&self) -> Value {
        let error = |error: &ApproximationError| {
            let mut json = json!({"relative_error_of_base": error.relative_of_base()});
            if self.has_adapter {
                json["relative_error"] = json!(error.relative());
            }
            json
        };
        let layers: serde_json::Map<String, Value> = self
            .layers
            .iter()
            .map(|(name, layer)| (name.clone(), error(layer)))
            .collect();
        json!({"layers": layers, "in_all": error(&self.total())})
    }

    pub fn text(&self) -> String {
        let mut text = match self.has_adapter {
            true => format!("{:<52} |W - Q| / |W|   |W - (Q + s B A)| / |W|\n", ""),
            false => format!("{:<52} |W - Q| / |W|\n", ""),
        };
        let total = ("in all".to_string(), self.total());
        for (name, error) in self.layers.iter().chain([&total]) {
            // Writing to a string cannot fail.
            let _ = write!(text, "{name:<52} {:>13.6}", error.relative_of_base());
            if self.has_adapter {
                let _ = write!(text, "   {:>23.6}", error.relative());
            }
            text.push('\n');
        }
        text
    }
}

fn layer_error(
    name: &str,
    original: &FrozenWeight,
    base: &FrozenWeight,
    adapter: Option<&Adapter>,
) -> anyhow::Result<ApproximationError> {
    let path = &module_path(name.trim_end_matches(".weight"));
    let factor = |adapter: &Adapter, factor: &str| {
        let tensor = adapter_tensor_name(path, factor);
        let tensor = adapter.tensors.get(&tensor)?;
        Some(tensor.to_f32_vec())
    };
    let factors = adapter.and_then(|adapter| {
        let (a, b) = (factor(adapter, LORA_A)?, factor(adapter, LORA_B)?);
        Some((a, b, adapter.config.clone()))
    });
    let factors = factors.as_ref().map(|(a, b, config)| LoraFactors {
        a,
        b,
        r: config.rank_of(path),
        scaling: config.scaling_of(path),
    });
    ApproximationError::measure(name, original, base, factors)
        .with_context(|| "the adapter or the original does not fit the model".to_string())
}
