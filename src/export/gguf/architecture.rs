//! The architecture of llama.cpp that computes a model, and what it cannot.
//!
//! Source: of llama.cpp, `src/models/{llama,mistral3,qwen2,qwen3,qwen3vl,phi3,glm4,smollm3,gemma,gemma2,gemma3,granite}.cpp`
//! and `src/models/{olmo2,seed-oss,exaone4}.cpp`.

use super::GgufBase;
use super::writer::Change;
use crate::Result;
use crate::model::{Activation, DecoderConfig, LayerRope, ModelTensor, Module, RopeScaling};

/// What llama.cpp knows a family of models as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    /// Mistral's models too, but for those of the third generation, the Code World Model and IQuest-Coder.
    Llama,
    /// Mistral Small 3's and Ministral 3's.
    Mistral3,
    Qwen2,
    Qwen3,
    Qwen3Vl,
    Smollm3,
    Gemma,
    Gemma2,
    Gemma3,
    Granite,
    /// OLMo 3's models too.
    Olmo2,
    SeedOss,
    Exaone4,
    /// Phi 4's models too.
    Phi3,
    Glm4,
}

impl Architecture {
    /// # Errors
    /// [`Error::UnsupportedModel`](crate::Error::UnsupportedModel) for what the architecture does not compute.
    pub(super) fn of(base: &GgufBase, config: &DecoderConfig) -> Result<Self> {
        let architecture = match base.field("model_type").as_str() {
            _ if base.config["model_type"] == "mistral3" => Self::Mistral3,
            Some("llama" | "mistral" | "cwm" | "iquestcoder") => Self::Llama,
            Some("ministral3") => Self::Mistral3,
            Some("qwen2") => Self::Qwen2,
            Some("qwen3") => Self::Qwen3,
            Some("qwen3_vl_text" | "qwen3_vl") => Self::Qwen3Vl,
            Some("smollm3") => Self::Smollm3,
            Some("gemma") => Self::Gemma,
            Some("gemma2") => Self::Gemma2,
            Some("gemma3_text" | "gemma3") => Self::Gemma3,
            Some("granite") => Self::Granite,
            Some("olmo2" | "olmo3") => Self::Olmo2,
            Some("seed_oss") => Self::SeedOss,
            Some("exaone4") => Self::Exaone4,
            Some("phi3") => Self::Phi3,
            Some("glm4") => Self::Glm4,
            _ => return Err(base.unsupported("model_type", "llama.cpp's name for it is not known")),
        };
        architecture.check(base, config)?;
        Ok(architecture)
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral3 => "mistral3",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Vl => "qwen3vl",
            Self::Smollm3 => "smollm3",
            Self::Gemma => "gemma",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3",
            Self::Granite => "granite",
            Self::Olmo2 => "olmo2",
            Self::SeedOss => "seed_oss",
            Self::Exaone4 => "exaone4",
            Self::Phi3 => "phi3",
            Self::Glm4 => "glm4",
        }
    }

    /// What is done to a tensor of the checkpoint.
    pub(super) fn change(self, tensor: ModelTensor, config: &DecoderConfig) -> Change {
        let is_rotated = matches!(
            tensor,
            ModelTensor::Weight(_, Module::Q | Module::K)
                | ModelTensor::Bias(_, Module::Q | Module::K)
        );
        let turns_neighbours = self.is_like_llama() || self == Self::Smollm3;
        let is_reordered = turns_neighbours && is_rotated;
        let is_norm = matches!(tensor, ModelTensor::FinalNorm | ModelTensor::Norm(..));
        let is_less_one = is_norm && config.norms_less_one;
        Change {
            rotary_head_dim: is_reordered.then_some(config.head_dim),
            offset: if is_less_one { 1.0 } else { 0.0 },
            ..Change::NONE
        }
    }

    /// The one that a file says, where it may be another: Mistral Small 3 was a llama before llama.cpp had its own for it.
    pub(super) fn in_file(self, name: Option<&str>, config: &DecoderConfig) -> Self {
        let is_plain = config.rope.query_scaling.is_none();
        match self == Self::Mistral3 && is_plain && name == Some(Self::Llama.name()) {
            true => Self::Llama,
            false => self,
        }
    }

    fn refuse(self, base: &GgufBase, field: &str, reason: &str) -> Result<()> {
        let hint = format!("the {} architecture of llama.cpp {reason}", self.name());
        Err(base.unsupported(field, &hint))
    }

    fn check(self, base: &GgufBase, config: &DecoderConfig) -> Result<()> {
        let refuse = |field, reason| self.refuse(base, field, reason);
        let has_biases = self.is_like_llama();
        if !has_biases && config.o_bias {
            let field = base.present(["attention_out_bias", "attention_bias"]);
            return refuse(field, "has no bias after the attention");
        }
        if !has_biases && config.mlp_bias {
            return refuse("mlp_bias", "has no bias in the MLP");
        }
        let is_gelu = config.activation == Activation::GeluTanh;
        if is_gelu != matches!(self, Self::Gemma | Self::Gemma2 | Self::Gemma3) {
            let field = base.present(["hidden_act", "hidden_activation"]);
            return refuse(field, "has another one");
        }
        let soft_caps = [
            ("attn_logit_softcapping", config.attention_soft_cap),
            ("final_logit_softcapping", config.logits_soft_cap),
        ];
        let is_capped = self == Self::Gemma2;
        if let Some((field, cap)) = soft_caps.iter().find(|(_, cap)| cap.is_some() != is_capped) {
            let reason = if cap.is_some() { "has none" } else { "has one" };
            return refuse(field, reason);
        }
        self.check_rope(base, config)?;
        match self {
            Self::Llama
            | Self::Mistral3
            | Self::Qwen2
            | Self::Qwen3
            | Self::Qwen3Vl
            | Self::Granite
            | Self::SeedOss
            | Self::Phi3
            | Self::Glm4 => Ok(()),
            Self::Smollm3 => self.check_smollm3(base, config),
            Self::Gemma => self.check_tied(base, config),
            Self::Gemma2 => self.check_gemma2(base, config),
            // That of 27B has 62 layers.
            Self::Gemma3 => self.check_scale(base, config, 62),
            Self::Olmo2 => self.check_olmo2(base, config),
            Self::Exaone4 => self.check_exaone4(base, config),
        }
    }

    /// Whether there is a place for every bias, and for a divisor of every rotary frequency, and neighbouring rows turn together.
    fn is_like_llama(self) -> bool {
        matches!(self, Self::Llama | Self::Mistral3 | Self::Granite)
    }

    fn check_rope(self, base: &GgufBase, config: &DecoderConfig) -> Result<()> {
        let field = base.rope_field();
        let refuse = |reason| self.refuse(base, field, reason);
        let has_yarn = matches!(config.rope.scaling, RopeScaling::Yarn { .. });
        if config.rope.query_scaling.is_some() && !has_yarn {
            return refuse("scales queries by the length that YaRN extends");
        }
        match config.rope.scaling {
            RopeScaling::Llama3 { .. } if !self.is_like_llama() && self != Self::Exaone4 => {
                refuse("does not scale rotary frequencies one by one")
            }
            RopeScaling::LongRope { .. } => {
                refuse("takes longrope's factors by the room for a text, not by its length")
            }
            RopeScaling::Yarn { .. } if config.local_rope.is_some() && self != Self::Olmo2 => {
                refuse("has YaRN in all layers or none")
            }
            RopeScaling::Yarn {
                beta_fast,
                beta_slow,
                ..
            } if (beta_fast, beta_slow) != (32.0, 1.0) && self != Self::Mistral3 => {
                refuse("has 32 for beta_fast of YaRN and 1 for beta_slow")
            }
            RopeScaling::Yarn {
                truncate: false, ..
            } => refuse("scales between whole pairs of rows alone"),
            _ => match config.local_rope.as_ref().map(|rope| &rope.scaling) {
                None | Some(RopeScaling::None) => Ok(()),
                Some(_) => refuse("does not scale the rotary frequencies of windows"),
            },
        }
    }

    fn check_smollm3(self, base: &GgufBase, config: &DecoderConfig) -> Result<()> {
        let mut ropes = config.layer_rope.iter().enumerate();
        if ropes.all(|(layer, rope)| (*rope == LayerRope::None) == (layer % 4 == 3)) {
            return Ok(());
        }
        let field = base.present(["no_rope_layers", "no_rope_layer_interval"]);
        let reason = "leaves every fourth layer without rotary embedding, and no other";
        self.refuse(base, field, reason)
    }

    fn check_tied(self, base: &GgufBase, config: &DecoderConfig) -> Result<()> {
        match config.tie_word_embeddings {
            true => Ok(()),
            false => self.refuse(base, "tie_word_embeddings", "has no head of its own"),
        }
    }

    fn check_gemma2(self, base: &GgufBase, config: &DecoderConfig) -> Result<()> {
        self.check_tied(base, config)?;
        if self.window_pattern(config) != Some(2) {
            let reason = "wants full attention in every second layer";
            return self.refuse(base, "layer_types", reason);
        }
        // That of 27B has 46 layers.
        self.check_scale(base, config, 46)
    }

    /// By the number of its layers llama.cpp knows the model of 27B, whose scores have another scale.
    fn check_scale(
        self,
        base: &GgufBase,
        config: &DecoderConfig,
        layers_of_27b: usize,
    ) -> Result<()> {
        let scaled = match config.num_layers == layers_of_27b {
            true => config.hidden_size / config.num_heads,
            false => config.head_dim,
        };
        if config.attention_scale != (scaled as f64).powf(-0.5) {
            let reason = format!("takes it for {scaled} in a model like this");
            return self.refuse(base, "query_pre_attn_scalar", &reason);
        }
        self.check_windows(base, config)
    }

    fn check_olmo2(self, base: &GgufBase, config: &DecoderConfig) -> Result<()> {
        let refuse = |field, reason| self.refuse(base, field, reason);
        if config.tie_word_embeddings {
            return refuse("tie_word_embeddings", "wants a head of its own");
        }
        if config.num_heads * config.head_dim != config.hidden_size {
            return refuse("head_dim", "takes it for the hidden size / heads");
        }
        if config
            .local_rope
            .as_ref()
            .is_some_and(|local| local.theta != config.rope.theta)
        {
            return refuse("rope_parameters", "has one theta for all layers");
        }
        match config.local_rope {
            None => Ok(()),
            Some(_) => self.check_windows(base, config),
        }
    }

    fn check_exaone4(self, base: &GgufBase, config: &DecoderConfig) -> Result<()> {
        // That of 32B, by which llama.cpp knows that there are windows, and no rotary embedding elsewhere.
        const LAYERS_WITH_WINDOWS: usize = 64;
        let refuse = |field, reason| self.refuse(base, field, reason);
        if config.num_heads * config.head_dim != config.hidden_size {
            return refuse("head_dim", "takes it for the hidden size / heads");
        }
        let has_windows = config.layer_rope.contains(&LayerRope::None);
        match (config.num_layers, has_windows) {
            (LAYERS_WITH_WINDOWS, true) if self.window_pattern(config) == Some(4) => Ok(()),
            (LAYERS_WITH_WINDOWS, _) => refuse(
                "layer_types",
                "wants full attention in every fourth layer of 64",
            ),
            (_, false) if config.sliding_window.iter().all(Option::is_none) => Ok(()),
            _ => refuse("sliding_window", "has one in models of 64 layers alone"),
        }
    }

    fn check_windows(self, base: &GgufBase, config: &DecoderConfig) -> Result<()> {
        match self.window_pattern(config) {
            Some(_) => Ok(()),
            None => self.refuse(
                base,
                "layer_types",
                "wants full attention in every n-th layer",
            ),
        }
    }

    /// What llama.cpp takes for the [`window_pattern`](Self::window_pattern) where a file does not say; `None` where layers
    /// have no windows.
    pub(super) fn default_window_pattern(self) -> Option<usize> {
        match self {
            Self::Gemma2 => Some(2),
            Self::Gemma3 => Some(6),
            Self::Olmo2 | Self::Exaone4 => Some(4),
            Self::Llama
            | Self::Mistral3
            | Self::Qwen2
            | Self::Qwen3
            | Self::Qwen3Vl
            | Self::Smollm3
            | Self::Gemma
            | Self::Granite
            | Self::SeedOss
            | Self::Phi3
            | Self::Glm4 => None,
        }
    }

    /// `n` where every n-th layer attends to all and the others to a window; 0 where all attend to one.
    pub(super) fn window_pattern(self, config: &DecoderConfig) -> Option<usize> {
        let fits = |n: &usize| {
            let mut windows = config.sliding_window.iter().enumerate();
            windows.all(|(layer, window)| window.is_none() == (*n != 0 && layer % n == n - 1))
        };
        let default = self.default_window_pattern()?;
        let candidates = std::iter::once(default).chain(0..=config.num_layers);
        candidates.into_iter().find(fits)
    }

    /// Whether layers may attend to a window.
    pub(super) fn has_windows(self) -> bool {
        self.default_window_pattern().is_some()
    }

    /// A model of this config as llama.cpp computes it.
    pub(super) fn computed(self, mut config: DecoderConfig) -> DecoderConfig {
        if !self.has_windows() {
            config.sliding_window.fill(None);
        }
        config
    }

    /// Where llama.cpp computes something else.
    pub(super) fn notes(self, config: &DecoderConfig) -> Vec<String> {
        let windows = config.sliding_window.iter().flatten();
        let shortest = windows
            .min()
            .filter(|w| **w < config.max_position_embeddings && !self.has_windows());
        let note = shortest.map(|window| {
            format!(
                "the model attends to the last {window} tokens alone; the {} architecture of llama.cpp has no such window \
                 and attends to all, so texts of more than {window} tokens are computed otherwise",
                self.name()
            )
        });
        note.into_iter().collect()
    }
}

pub(super) fn as_u32(size: usize) -> u32 {
    u32::try_from(size).expect("a config is read with sizes below 2^31")
}

/// The model as llama.cpp computes it: without the windows that it does not have.
///
/// # Errors
/// [`Error::UnsupportedModel`](crate::Error::UnsupportedModel) for one that it cannot compute.
pub fn config_in_llama_cpp(base: &GgufBase) -> Result<DecoderConfig> {
    let (config, architecture) = read(base)?;
    Ok(architecture.computed(config))
}

/// Reads the config of a model that llama.cpp is to compute.
pub(super) fn read(base: &GgufBase) -> Result<(DecoderConfig, Architecture)> {
    let config = DecoderConfig::from_json(base.config, &base.config_path())?;
    let architecture = Architecture::of(base, &config)?;
    Ok((config, architecture))
}
