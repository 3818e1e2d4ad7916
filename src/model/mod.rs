//! One configurable decoder: a family of models is data ([`DecoderConfig`]), never a branch of the forward pass.

mod adapter;
mod approximation;
mod block;
mod branches;
mod config;
mod decoder;
mod init_lora_weights;
mod initialize;
mod kv_cache;
mod load;
mod lora_dropout;
mod lora_linear;
mod merge;
mod names;
mod parameters;
mod rope_frequencies;
mod rope_tables;
mod tensors;
mod training_pass;
mod vocabulary;

pub(crate) use adapter::expect_stored;
pub use adapter::{RankAndScaling, are_together};
pub use approximation::{ApproximationError, LoraFactors};
pub use block::{ActivationPolicy, Activations, Block, InputGrad, Layout, MLP_TILE_ROWS, Saved};
pub(crate) use config::yarn_amplitude;
pub use config::*;
pub use decoder::{Decoder, Sequences};
pub use init_lora_weights::InitLoraWeights;
pub use initialize::{InitializeOptions, InitializingQuantizer};
pub use kv_cache::KvCache;
pub use load::{WeightSource, block_sizes, dense_linears};
pub use lora_dropout::LoraDropout;
pub use lora_linear::{LoraLinear, LoraPair, Magnitude, StackedA};
pub use names::Module;
pub use parameters::{LowerHalves, Parameters, Slot, TRAINED_ALIGNMENT, Trainable};
pub use rope_tables::RopeTables;
pub use tensors::{ModelTensor, Norm};
pub use training_pass::{MicroBatch, Regularization};
pub use vocabulary::{ModuleToSave, Vocabulary};

pub use crate::ops::linear_cross_entropy::TokenLoss;
pub use crate::ops::matrix_dropout::MatrixDropout;
