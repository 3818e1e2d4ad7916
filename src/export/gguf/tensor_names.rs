//! The names that llama.cpp gives a decoder's tensors, and the order of rows that its rotary embedding wants.
//!
//! Source: `gguf-py/gguf/constants.py` and `LlamaModel.permute` of llama.cpp.

use super::architecture::Architecture;
use crate::model::{ModelTensor, Module, Norm};

/// `blk.0.attn_q.weight`.
pub(super) fn tensor_name(tensor: ModelTensor, architecture: Architecture) -> String {
    match tensor {
        ModelTensor::Embedding => "token_embd.weight".into(),
        ModelTensor::Head => "output.weight".into(),
        ModelTensor::FinalNorm => "output_norm.weight".into(),
        ModelTensor::Norm(layer, norm) => {
            format!("blk.{layer}.{}.weight", norm_name(norm, architecture))
        }
        ModelTensor::Weight(layer, module) => {
            format!("blk.{layer}.{}.weight", module_name(module))
        }
        ModelTensor::Bias(layer, module) => format!("blk.{layer}.{}.bias", module_name(module)),
    }
}

fn norm_name(norm: Norm, architecture: Architecture) -> &'static str {
    match norm {
        Norm::Input => "attn_norm",
        Norm::Mlp if architecture == Architecture::SeedOss => "post_attention_norm",
        Norm::Mlp => "ffn_norm",
        Norm::AfterAttention => "post_attention_norm",
        Norm::AfterMlp => "post_ffw_norm",
        Norm::Query => "attn_q_norm",
        Norm::Key => "attn_k_norm",
    }
}

fn module_name(module: Module) -> &'static str {
    match module {
        Module::Q => "attn_q",
        Module::K => "attn_k",
        Module::V => "attn_v",
        Module::O => "attn_output",
        Module::Gate => "ffn_gate",
        Module::Up => "ffn_up",
        Module::Down => "ffn_down",
        Module::Qkv => "attn_qkv",
        // As llama.cpp has them, too.
        Module::GateUp => "ffn_up",
    }
}

/// The row of a projection to queries or keys that llama.cpp's llama architecture wants at `row`.
///
/// It turns neighbours together, where transformers turns row `i` of a head with row `i + head_dim / 2`.
pub(super) fn rotary_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    head * head_dim + within % 2 * (head_dim / 2) + within / 2
}
