//! Weight files: Hugging Face checkpoints, the bitsandbytes 4-bit layout, PEFT adapters, GGUF files, and writing them
//! completely or not at all.

mod adapter;
mod adapter_config;
mod adapter_conversion;
mod adapter_writer;
mod atomic;
mod atomic_dir;
mod bitsandbytes;
mod checkpoint;
mod disk;
mod file_watch;
mod fingerprint;
mod gguf_file;
mod hub_cache;
mod initialization;
mod layer_selection;
mod manifest;
mod mapped_file;
mod mapped_ranges;
mod mapping;
mod matrix_dropout;
mod model_dir;
mod module_patterns;
mod modules_to_save;
mod path_pattern;
mod quantize;
mod safetensors_writer;
mod target_modules;
mod tensor_names;

pub use adapter::{
    Adapter, CONFIG_FILE as ADAPTER_CONFIG_FILE, LORA_A, LORA_B, MAGNITUDE,
    PREFIX as ADAPTER_PREFIX, WEIGHT, WEIGHTS_FILE as ADAPTER_WEIGHTS_FILE, adapter_tensor_name,
};
pub use adapter_config::AdapterConfig;
pub use adapter_writer::{AdapterWriter, LoraShape};
pub use atomic::AtomicFile;
pub use atomic_dir::{AtomicDir, Existing, expect_replaceable, remove_dir, remove_leftovers};
pub(crate) use bitsandbytes::dtype_name;
pub use checkpoint::{
    Checkpoint, INDEX_FILE, SINGLE_FILE, TEXT_CONFIG, read_json, shard_names, text_config, untie,
};
pub use disk::{Disk, SystemDisk};
pub use file_watch::FileWatch;
pub(crate) use gguf_file::shortest_json;
pub use gguf_file::{GgufFile, StoredTensor};
pub use hub_cache::{hub_snapshot, model_name};
pub use initialization::{
    FILE as INITIALIZATION_FILE, INITIAL_ADAPTER, Initialization, RelativeTo,
};
pub use layer_selection::LayerSelection;
pub(crate) use manifest::hex;
pub use manifest::{Manifest, ManifestWriter};
pub use mapped_file::MappedFile;
pub use mapped_ranges::mapped_path_at;
pub use matrix_dropout::{FILE as MATRIX_DROPOUT_FILE, MatrixDropoutScale, MatrixDropoutSettings};
pub use model_dir::{
    GENERATION_CONFIG_FILE, ModelDir, Quantization, TensorSource, WeightQuantizer, WriteProgress,
    WriteReport,
};
pub use module_patterns::ModulePatterns;
pub use modules_to_save::ModulesToSave;
pub use quantize::{QuantizeJob, quantize, quantize_with};
pub use safetensors_writer::{SafetensorsWriter, TensorSpec, write_tensors};
pub use target_modules::TargetModules;
pub use tensor_names::{module_path, vision_part};
