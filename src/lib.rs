//! 4-bit QLoRA fine-tuning: a frozen base in NF4 with double quantization, LoRA adapters trained on top.
//!
//! The base weights stay memory-mapped in the bitsandbytes 4-bit layout; forward and backward of every operation are
//! written out, so that memory is planned instead of discovered. Files are those of transformers, PEFT and bitsandbytes.
//!
//! # Layers
//! A module names only what stands below it (checked by `tests/layers.rs`):
//! ```text
//! commands (binary)
//! train
//! infer      export
//! model      data
//! ops        store
//! quant
//! device
//! ```
//!
//! # Shape letters
//! `B` sequences, `T` tokens in one, `N` all rows (tokens of all sequences, one after another), `D` hidden size,
//! `F` intermediate size, `H` query heads, `K` key/value heads, `E` head_dim, `V` vocabulary, `R` rank, `L` layers.

pub mod data;
pub mod device;
mod error;
pub mod export;
pub mod infer;
pub mod model;
pub mod ops;
pub mod quant;
pub mod store;
pub mod train;

pub use error::{Error, Result};

/// The label of a token that carries no loss, as in transformers.
pub const IGNORE_INDEX: i64 = -100;
