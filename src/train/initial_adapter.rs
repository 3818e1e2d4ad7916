//! Models that were made together with an adapter: which adapter a run on one starts from, and what its result is to the
//! model that both were made of.

use std::path::{Path, PathBuf};

use super::config::TrainConfig;
use crate::model::InitLoraWeights;
use crate::store::{Adapter, Initialization, RelativeTo};
use crate::{Error, Result};

/// The directory of the converted adapter, within that of the run.
pub const ADAPTER_FOR_ORIGINAL_MODEL: &str = "adapter_for_original_model";

const KEY: &str = "init_lora_weights";

/// Gives a run on a model that was made together with an adapter that adapter to start from, if it names none.
///
/// # Errors
/// [`Error::Config`] if `init_lora_weights` and the model do not go together, with what to do, or if the adapter belongs to
/// another model.
pub(super) fn choose(config: &mut TrainConfig) -> Result<()> {
    let made = Initialization::of_model(&config.model_name_or_path)?;
    let name = |init: InitLoraWeights| init.to_string();
    match (config.init_lora_weights, made) {
        (None, None) => {}
        (Some(init), None) if !init.makes_base() => {
            if let Some(adapter) = &config.adapter {
                let reason = format!(
                    "begins a new adapter, and `adapter` continues {}; give one of them",
                    adapter.display()
                );
                return Err(Error::config(KEY, reason));
            }
        }
        (Some(init), None) => {
            let adapter = config.new_adapter_config();
            let reason = format!(
                "{init} is made together with the 4-bit weights: `qlora quantize SRC DST --{KEY} {init} --lora_r {} \
                 --lora_alpha {}`, then train with DST as the model",
                adapter.r, adapter.lora_alpha
            );
            return Err(Error::config(KEY, reason));
        }
        (Some(init), Some((_, made))) if name(init) != made.init_lora_weights => {
            let reason = format!(
                "{} was made with the initialization {} and is not the original model without its adapter; \
                 leave {KEY} out, or quantize again",
                config.model_name_or_path.display(),
                made.init_lora_weights
            );
            return Err(Error::config(KEY, reason));
        }
        (_, Some((dir, _))) => {
            config.adapter.get_or_insert(dir);
        }
    }
    match &config.adapter {
        Some(adapter) => Initialization::expect_base(adapter, &config.model_name_or_path),
        None => Ok(()),
    }
}

/// Writes beside the final `adapter` of a run on `model`, in `output_dir`, what it is relative to, and the same adapter for
/// the original model. `None` if there is only one model to speak of.
///
/// # Errors
/// [`Error::Io`]; those of [`Adapter::relative_to_original`].
pub(super) fn write_converted(
    model: &Path,
    adapter: &Adapter,
    output_dir: &Path,
) -> Result<Option<PathBuf>> {
    let Some((initial_dir, record)) = Initialization::of_model(model)? else {
        return Ok(None);
    };
    record.write(output_dir)?;
    let initial = Adapter::read(&initial_dir)?;
    let mut converted = adapter.relative_to_original(&initial)?;
    converted.config.base_model_name_or_path = Some(record.original_model.clone());
    converted.config.revision = record.original_revision.clone();
    let dir = output_dir.join(ADAPTER_FOR_ORIGINAL_MODEL);
    converted.write(&dir)?;
    let record = Initialization {
        adapter_is_relative_to: RelativeTo::OriginalModel,
        ..record
    };
    record.write(&dir)?;
    Ok(Some(dir))
}
