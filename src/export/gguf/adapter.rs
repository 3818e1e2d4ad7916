//! A PEFT adapter as llama.cpp's LoRA file: `blk.0.attn_q.weight.lora_a` `[r, in]` and `.lora_b` `[out, r]`.
//!
//! llama.cpp adds `alpha / r * B (A x)` with one `alpha` for the file and `r` from the tensors, so what else PEFT scales a
//! module by (rsLoRA, alpha_pattern) is in its B. Source: `convert_lora_to_gguf.py` and `src/llama-adapter.cpp` of llama.cpp.

use std::collections::BTreeMap;
use std::path::Path;

use super::architecture;
use super::tensor_names::tensor_name;
use super::writer::{Change, GgufWriter, Metadata, TensorInfo, Value};
use super::{GgufBase, GgufReport, GgufType};
use crate::model::{DecoderConfig, ModelTensor, Module, expect_stored};
use crate::quant::DenseTensor;
use crate::store::{
    ADAPTER_CONFIG_FILE, Adapter, AdapterConfig, LORA_A, LORA_B, adapter_tensor_name,
};
use crate::{Error, Result};

/// The factors of a module: `a: [r, in]`, `b: [out, r]`.
struct Factors<'a> {
    layer: usize,
    module: Module,
    a: &'a DenseTensor,
    b: &'a DenseTensor,
    /// `scaling * r`.
    alpha: f64,
}

/// Writes `adapter`, which is one for the model `base`, to `path`, its tensors as `file_type`. The file appears when it is
/// complete. It fits a GGUF file of the base, whatever type that has.
///
/// # Errors
/// [`Error::UnsupportedModel`] for DoRA and modules that are trained whole, which the format cannot say, and for a base
/// that llama.cpp cannot compute; [`Error::TensorMismatch`] for a tensor that does not fit the base, or has a value that
/// `file_type` cannot hold.
pub fn write_gguf_adapter(
    adapter: &Adapter,
    base: GgufBase,
    file_type: GgufType,
    path: &Path,
) -> Result<GgufReport> {
    refuse_unsayable(&adapter.config)?;
    let (config, architecture) = architecture::read(&base)?;
    let factors = factors(adapter, &config)?;
    // One of 0 is none to llama.cpp, which does not scale then.
    let mut alphas = factors.iter().map(|factors| factors.alpha);
    let alpha = alphas.find(|alpha| *alpha as f32 != 0.0).unwrap_or(1.0);
    let mut metadata = Metadata::default();
    metadata.add_text("general.architecture", architecture.name());
    metadata.add_text("general.type", "adapter");
    metadata.add_text("general.name", base.name);
    metadata.add_u32("general.file_type", file_type.file_type());
    metadata.add_text("adapter.type", "lora");
    metadata.add("adapter.lora.alpha", Value::F32(alpha as f32));
    let infos = factors.iter().flat_map(|factors| {
        let weight = tensor_name(
            ModelTensor::Weight(factors.layer, factors.module),
            architecture,
        );
        [("lora_a", factors.a), ("lora_b", factors.b)].map(|(part, values)| TensorInfo {
            name: format!("{weight}.{part}"),
            tensor_type: file_type.of_shape(&values.shape),
            shape: values.shape.clone(),
        })
    });
    let mut writer = GgufWriter::create(path, &metadata, infos.collect())?;
    for factors in &factors {
        let weight = ModelTensor::Weight(factors.layer, factors.module);
        writer.write(factors.a, Change::NONE)?;
        let change = Change {
            factor: (factors.alpha / alpha) as f32,
            ..architecture.change(weight, &config)
        };
        writer.write(factors.b, change)?;
    }
    Ok(GgufReport {
        tensors: 2 * factors.len(),
        written_bytes: writer.finish()?,
        notes: architecture.notes(&config),
    })
}

fn refuse_unsayable(config: &AdapterConfig) -> Result<()> {
    let refuse = |field: &str, value: String| {
        Err(Error::UnsupportedModel {
            path: ADAPTER_CONFIG_FILE.into(),
            field: field.into(),
            value,
            hint: "an adapter file of llama.cpp cannot say that; export the merged model instead"
                .into(),
        })
    };
    if config.use_dora {
        return refuse("use_dora", "true".into());
    }
    if !config.modules_to_save.is_empty() {
        let names: Vec<_> = config.modules_to_save.names().collect();
        return refuse("modules_to_save", format!("{names:?}"));
    }
    Ok(())
}

/// The factors of all modules in the order of the model; every tensor of the adapter belongs to one.
fn factors<'a>(adapter: &'a Adapter, config: &DecoderConfig) -> Result<Vec<Factors<'a>>> {
    let tensors = adapter.tensors.iter();
    let mut rest: BTreeMap<&str, &DenseTensor> = tensors
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    let mut all = Vec::new();
    for layer in 0..config.num_layers {
        for module in config.modules() {
            let path = config.linear_path(layer, module);
            let [a_name, b_name] = [LORA_A, LORA_B].map(|part| adapter_tensor_name(&path, part));
            let Some(a) = rest.remove(a_name.as_str()) else {
                continue;
            };
            let b = rest.remove(b_name.as_str());
            let r = adapter.config.rank_of(&path);
            let (d_out, d_in) = config.linear_shape(module);
            let b = expect_stored(&b_name, b, &[d_out, r])?;
            expect_stored(&a_name, Some(a), &[r, d_in])?;
            all.push(Factors {
                layer,
                module,
                a,
                b,
                alpha: adapter.config.scaling_of(&path) * r as f64,
            });
        }
    }
    match rest.first_key_value() {
        None => Ok(all),
        Some((name, tensor)) => Err(Error::TensorMismatch {
            tensor: name.to_string(),
            expected: "half of an adapter of a linear layer that the model has".into(),
            found: format!("{:?}", tensor.shape),
        }),
    }
}
