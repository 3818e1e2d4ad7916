//! The tensors that a decoder is stored as, each with its name and shape in a Hugging Face checkpoint.

use super::config::{DecoderConfig, QkNorm};
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
    Input,
    /// On the input of the MLP; in models with [`branch_norms`](DecoderConfig::branch_norms) on the output of the attention.
    PostAttention,
    PreFeedforward,
    PostFeedforward,
    Query,
    Key,
}

impl Norm {
    const ALL: [Self; 6] = [
        Self::Input,
        Self::PostAttention,
        Self::PreFeedforward,
        Self::PostFeedforward,
        Self::Query,
        Self::Key,
    ];

    /// The norm on the input of the MLP, in models that have one.
    pub fn of_mlp(config: &DecoderConfig) -> Option<Self> {
        let norm = match config.branch_norms {
            true => Self::PreFeedforward,
            false => Self::PostAttention,
        };
        config.input_norms.then_some(norm)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Input => "input_layernorm",
            Self::PostAttention => "post_attention_layernorm",
            Self::PreFeedforward => "pre_feedforward_layernorm",
            Self::PostFeedforward => "post_feedforward_layernorm",
            Self::Query => "self_attn.q_norm",
            Self::Key => "self_attn.k_norm",
        }
    }

    fn is_in(self, config: &DecoderConfig) -> bool {
        match self {
            Self::Input => config.input_norms,
            Self::PostAttention => config.input_norms || config.branch_norms,
            Self::PreFeedforward => config.input_norms && config.branch_norms,
            Self::PostFeedforward => config.branch_norms,
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
                format!("{}.{}.weight", config.block_path(layer), norm.name())
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
