//! Weight files: Hugging Face checkpoints, the bitsandbytes 4-bit layout, PEFT adapters, and writing them completely or
//! not at all.

mod bitsandbytes;
mod checkpoint;
mod mapped_file;

pub use checkpoint::Checkpoint;
pub use mapped_file::MappedFile;
