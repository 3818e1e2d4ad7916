//! A whole model as a GGUF file that llama.cpp runs: what it is, its vocabulary, its tensors.

use std::path::Path;

use super::architecture::{self, Architecture};
use super::hyperparameters::{self, ROPE_FREQS};
use super::tensor_names::tensor_name;
use super::tensor_type::TensorType;
use super::vocabulary;
use super::writer::{Change, GgufWriter, Metadata, TensorInfo};
use super::{GgufBase, GgufReport, GgufType};
use crate::model::{DecoderConfig, ModelTensor};
use crate::store::{TensorSource, WriteProgress};
use crate::{Error, Result};

/// Writes the model of `source` to `path`: matrices as `file_type`, vectors as f32. The file appears when it is complete.
/// `progress` counts the bytes of the tensors as they are written.
///
/// # Errors
/// [`Error::UnsupportedModel`] for what llama.cpp cannot compute, or a tokenizer whose equal in llama.cpp is not known;
/// [`Error::TensorMismatch`] for a value that `file_type` cannot hold; those of `source`.
pub fn write_gguf_model(
    source: &dyn TensorSource,
    base: GgufBase,
    file_type: GgufType,
    path: &Path,
    mut progress: impl FnMut(WriteProgress),
) -> Result<GgufReport> {
    let (config, architecture) = architecture::read(&base)?;
    let mut notes = architecture.notes(&config);
    if base.is_part() {
        notes.push(
            "the file has the language model alone; for what the model sees images with there is llama.cpp's \
             convert_hf_to_gguf.py --mmproj"
                .into(),
        );
    }
    let mut metadata = Metadata::default();
    hyperparameters::add(&mut metadata, &base, architecture, &config, file_type);
    vocabulary::add(&mut metadata, &base, config.vocab_size, &mut notes)?;
    let tensors = ModelTensor::all(&config);
    let divisors = hyperparameters::rope_divisors(&config);
    let mut infos: Vec<_> = tensors
        .iter()
        .map(|tensor| info(*tensor, (architecture, &config), file_type))
        .collect();
    infos.extend(divisors.as_ref().map(|divisors| TensorInfo {
        name: ROPE_FREQS.into(),
        shape: divisors.shape.clone(),
        tensor_type: TensorType::F32,
    }));
    let count = infos.len();
    let widened = tensors
        .iter()
        .filter(|tensor| file_type.is_widened(&tensor.shape(&config)));
    match widened.count() {
        0 => {}
        widened => notes.push(format!(
            "rows of {widened} matrices are no blocks of 256, so that these are stored in q8_0 or f16"
        )),
    }
    let mut writer = GgufWriter::create(path, &metadata, infos)?;
    let total_bytes = writer.pending_bytes();
    for tensor in tensors {
        let name = tensor.name(&config);
        write(&mut writer, source, tensor, (architecture, &config))?;
        source.release(&name)?;
        progress(WriteProgress {
            tensor: &name,
            done_bytes: total_bytes - writer.pending_bytes(),
            total_bytes,
        });
    }
    if let Some(divisors) = divisors {
        writer.write(&divisors, Change::NONE)?;
    }
    Ok(GgufReport {
        tensors: count,
        written_bytes: writer.finish()?,
        notes,
    })
}

fn info(
    tensor: ModelTensor,
    (architecture, config): (Architecture, &DecoderConfig),
    file_type: GgufType,
) -> TensorInfo {
    let shape = tensor.shape(config);
    TensorInfo {
        name: tensor_name(tensor, architecture),
        tensor_type: file_type.of(tensor, config),
        shape,
    }
}

fn write(
    writer: &mut GgufWriter,
    source: &dyn TensorSource,
    tensor: ModelTensor,
    (architecture, config): (Architecture, &DecoderConfig),
) -> Result<()> {
    let values = source.tensor(&tensor.name(config))?;
    let change = architecture.change(tensor, config);
    writer.write(&values, change).map_err(|error| match error {
        // Told by the name that the checkpoint has it under.
        Error::TensorMismatch {
            expected, found, ..
        } => Error::TensorMismatch {
            tensor: tensor.name(config),
            expected,
            found,
        },
        error => error,
    })
}
