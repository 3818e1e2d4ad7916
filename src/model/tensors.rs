//! The tensors that a decoder is stored as, each with its name and shape in a Hugging Face checkpoint.

use super::config::{DecoderConfig, NormNames, QkNorm};
use super::names::Module;
use super::vocabulary::ModuleToSave;

/// A tensor of a decoder; the number is that of its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelTensor {
    Embedding,
    Head,
    FinalNorm,
    Norm(usize, Norm),
    Weight(usize, Module),
    Bias(usize, Module),
}

/// A norm of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    /// On the input of the attention.
    Input,
    /// On the input of the MLP.
    Mlp,
    /// On the output of the attention.
    AfterAttention,
    /// On the output of the MLP.
    AfterMlp,
    Query,
    Key,
}

impl Norm {
    const ALL: [Self; 6] = [
        Self::Input,
        Self::AfterAttention,
        Self::Mlp,
        Self::AfterMlp,
        Self::Query,
        Self::Key,
    ];

    fn name(self, config: &DecoderConfig) -> &'static str {
        match (self, config.norm_names) {
            (Self::Input, _) => "input_layernorm",
            (Self::Mlp, NormNames::Gemma) if config.branch_norms => "pre_feedforward_layernorm",
            (Self::Mlp, _) | (Self::AfterAttention, NormNames::Gemma) => "post_attention_layernorm",
            (Self::AfterMlp, NormNames::Gemma) => "post_feedforward_layernorm",
            (Self::AfterAttention, NormNames::Glm) => "post_self_attn_layernorm",
            (Self::AfterMlp, NormNames::Glm) => "post_mlp_layernorm",
            (Self::AfterAttention, NormNames::HyperClovaX) => "post_norm1",
            (Self::AfterMlp, NormNames::HyperClovaX) => "post_norm2",
            (Self::Query, _) => "self_attn.q_norm",
            (Self::Key, _) => "self_attn.k_norm",
        }
    }

    fn is_in(self, config: &DecoderConfig) -> bool {
        match self {
            Self::Input | Self::Mlp => config.input_norms,
            Self::AfterAttention | Self::AfterMlp => config.branch_norms,
            Self::Query | Self::Key => config.qk_norm.is_some(),
        }
    }

    fn size(self, config: &DecoderConfig) -> usize {
        let heads = match (self, config.qk_norm) {
            (Self::Query, Some(QkNorm::Token)) => config.num_heads,
            (Self::Key, Some(QkNorm::Token)) => config.num_kv_heads,
            (Self::Query | Self::Key, _) => 1,
            _ => return config.hidden_size,
        };
        heads * config.head_dim
    }
}

impl ModelTensor {
    /// All tensors of a decoder; the head is one of them where the model does not tie it to the embedding.
    pub fn all(config: &DecoderConfig) -> Vec<Self> {
        let mut tensors = vec![Self::Embedding, Self::FinalNorm];
        if !config.tie_word_embeddings {
            tensors.push(Self::Head);
        }
        for layer in 0..config.num_layers {
            let norms = Norm::ALL.into_iter();
            let norms = norms.filter(|norm| norm.is_in(config));
            tensors.extend(norms.map(|norm| Self::Norm(layer, norm)));
            for module in config.modules() {
                tensors.push(Self::Weight(layer, module));
                if config.has_bias(module) {
                    tensors.push(Self::Bias(layer, module));
                }
            }
        }
        tensors
    }

    /// `model.layers.0.self_attn.q_proj.weight`.
    pub fn name(self, config: &DecoderConfig) -> String {
        match self {
            Self::Embedding => format!("{}.weight", ModuleToSave::Embedding.path(config)),
            Self::Head => format!("{}.weight", ModuleToSave::Head.path(config)),
            Self::FinalNorm => format!("{}.norm.weight", config.decoder_path),
            Self::Norm(layer, norm) => {
                format!("{}.{}.weight", config.block_path(layer), norm.name(config))
            }
            Self::Weight(layer, module) => format!("{}.weight", config.linear_path(layer, module)),
            Self::Bias(layer, module) => format!("{}.bias", config.linear_path(layer, module)),
        }
    }

    pub fn shape(self, config: &DecoderConfig) -> Vec<usize> {
        match self {
            Self::Embedding | Self::Head => vec![config.vocab_size, config.hidden_size],
            Self::FinalNorm => vec![config.hidden_size],
            Self::Norm(_, norm) => vec![norm.size(config)],
            Self::Weight(_, module) => {
                let (d_out, d_in) = config.linear_shape(module);
                vec![d_out, d_in]
            }
            Self::Bias(_, module) => vec![config.linear_shape(module).0],
        }
    }
}
