//! Weight files: Hugging Face checkpoints, the bitsandbytes 4-bit layout, PEFT adapters, and writing them completely or
//! not at all.

mod adapter;
mod adapter_config;
mod atomic;
mod bitsandbytes;
mod checkpoint;
mod mapped_file;
mod quantize;
mod safetensors_writer;

pub use adapter::Adapter;
pub use adapter_config::{AdapterConfig, TargetModules};
pub use atomic::{AtomicDir, AtomicFile, Existing};
pub use checkpoint::Checkpoint;
pub use mapped_file::MappedFile;
pub use quantize::{QuantizeJob, QuantizeProgress, QuantizeReport, quantize};
pub use safetensors_writer::{SafetensorsWriter, TensorSpec};
