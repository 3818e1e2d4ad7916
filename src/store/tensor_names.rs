//! What the tensors of a checkpoint are called.
//!
//! The decoder of a model that also sees images is `model.language_model` in transformers, and `language_model.model` in the
//! files that it reads and writes. Source: `conversion_mapping.py` of transformers 5.24 (`llava`).

use std::borrow::Cow;

/// The beginnings of names in files and of paths in transformers.
const RENAMED: [(&str, &str); 4] = [
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
];

/// What a model sees images with.
const VISION_PARTS: [&str; 3] = [
    "model.multi_modal_projector",
    "model.vision_tower",
    "model.visual",
];

/// Where a decoder stands in its model.
const DECODERS: [&str; 2] = ["model.layers.", "model.language_model.layers."];

/// The layers that are quantized, by the last part of their name.
pub(super) const LINEAR_LAYERS: [&str; 9] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "qkv_proj",
    "gate_up_proj",
];

/// The name in transformers of a tensor that is `stored` under this one, or of a module.
pub fn module_path(stored: &str) -> Cow<'_, str> {
    let mut renamed = RENAMED.iter();
    let path =
        renamed.find_map(|(file, path)| Some(format!("{path}{}", stored.strip_prefix(file)?)));
    path.map_or(Cow::Borrowed(stored), Cow::Owned)
}

/// The name in files of a tensor that is at `path` in transformers, where it has another one.
pub(super) fn name_in_files(path: &str) -> Option<String> {
    let mut renamed = RENAMED.iter();
    renamed.find_map(|(file, prefix)| Some(format!("{file}{}", path.strip_prefix(prefix)?)))
}

/// Whether this is the weight of a linear layer of a decoder.
pub(super) fn is_linear_weight(stored: &str) -> bool {
    let name = module_path(stored);
    let is_in_block = DECODERS.iter().any(|decoder| name.starts_with(decoder));
    let layer = name.strip_suffix(".weight");
    let layer = layer.and_then(|path| path.rsplit('.').next());
    is_in_block && layer.is_some_and(|layer| LINEAR_LAYERS.contains(&layer))
}

/// What a model sees images with, if a tensor belongs to that: `model.vision_tower`, for one.
pub fn vision_part(stored: &str) -> Option<&'static str> {
    let path = module_path(stored);
    let mut parts = VISION_PARTS.into_iter();
    parts.find(|part| {
        path.strip_prefix(part)
            .is_some_and(|rest| rest.starts_with('.'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_files_are_those_of_transformers_and_back() {
        for (stored, path) in [
            (
                "language_model.model.layers.0.mlp.up_proj.weight",
                "model.language_model.layers.0.mlp.up_proj.weight",
            ),
            ("language_model.lm_head.weight", "lm_head.weight"),
            (
                "vision_tower.ln_pre.weight",
                "model.vision_tower.ln_pre.weight",
            ),
        ] {
            assert_eq!(module_path(stored), path);
            assert_eq!(module_path(path), path);
            assert_eq!(name_in_files(path).as_deref(), Some(stored));
        }
        assert_eq!(
            module_path("model.layers.0.mlp.up_proj.weight"),
            "model.layers.0.mlp.up_proj.weight"
        );
        assert_eq!(name_in_files("model.layers.0.mlp.up_proj.weight"), None);
    }

    #[test]
    fn only_the_weights_of_a_decoders_linear_layers_are_quantized() {
        for name in [
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.0.self_attn.qkv_proj.weight",
            "language_model.model.layers.0.mlp.down_proj.weight",
            "model.language_model.layers.0.mlp.down_proj.weight",
        ] {
            assert!(is_linear_weight(name), "{name}");
        }
        for name in [
            "model.layers.0.self_attn.q_proj.bias",
            "lm_head.weight",
            "model.layers.0.self_attn.q_norm.weight",
            "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
            "model.vision_tower.transformer.layers.0.feed_forward.up_proj.weight",
            "model.visual.blocks.0.mlp.up_proj.weight",
        ] {
            assert!(!is_linear_weight(name), "{name}");
        }
    }

    #[test]
    fn what_a_model_sees_with_is_told_from_its_decoder() {
        assert_eq!(
            vision_part("vision_tower.ln_pre.weight"),
            Some("model.vision_tower")
        );
        assert_eq!(
            vision_part("model.multi_modal_projector.norm.weight"),
            Some("model.multi_modal_projector")
        );
        assert_eq!(
            vision_part("model.visual.blocks.0.attn.qkv.weight"),
            Some("model.visual")
        );
        for name in [
            "model.norm.weight",
            "lm_head.weight",
            "language_model.model.norm.weight",
            "vision_towers.a",
        ] {
            assert_eq!(vision_part(name), None, "{name}");
        }
    }
}
