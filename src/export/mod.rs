//! A trained adapter for other programs: merged into its model, or in the files of llama.cpp.

mod gguf;
mod merged;
mod ollama;

pub use gguf::{
    GgufBase, GgufModel, GgufReport, GgufType, config_in_llama_cpp, is_gguf_adapter,
    read_gguf_adapter, write_gguf_adapter, write_gguf_model,
};
pub use merged::{Merged, MergedQuantizer};
pub use ollama::modelfile;
