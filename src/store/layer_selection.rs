//! Which decoder layers get an adapter: PEFT's `layers_to_transform`, with `layers_pattern`.
//!
//! Source: `check_target_module_exists` of PEFT 0.21.

use regex::{Regex, RegexBuilder};
use serde_json::{Value, json};

/// Indices of layers, and how a module's path tells the one it is in.
#[derive(Debug, Clone)]
pub struct LayerSelection {
    indices: Vec<usize>,
    /// Names before the index; empty: the first number behind two components of a path is the index.
    patterns: Vec<(String, Regex)>,
}

impl LayerSelection {
    /// The layers of these indices.
    pub fn of(indices: Vec<usize>) -> Self {
        Self {
            indices,
            patterns: Vec::new(),
        }
    }

    /// The layers of these indices, which stand behind one of the names.
    ///
    /// # Errors
    /// What is wrong with a name, which may be a regex.
    pub fn new(indices: Vec<usize>, patterns: Vec<String>) -> Result<Self, String> {
        /// More are not held, nor larger ones: their memory would be out of proportion to their text.
        const MAX_PATTERNS: usize = 64;
        const MAX_REGEX_BYTES: usize = 1 << 17;
        if patterns.len() > MAX_PATTERNS {
            return Err(format!("has more than {MAX_PATTERNS} names"));
        }
        let compiled = patterns.into_iter().map(|pattern| {
            let regex = format!(r"^(?:.*?\.)??(?:{pattern})\.(?<index>[0-9]+)\.");
            let regex = RegexBuilder::new(&regex)
                .size_limit(MAX_REGEX_BYTES)
                .build();
            let regex = regex.map_err(|_| format!("`{pattern}` is neither a name nor a regex"))?;
            Ok((pattern, regex))
        });
        Ok(Self {
            indices,
            patterns: compiled.collect::<Result<_, String>>()?,
        })
    }

    pub fn indices(&self) -> &[usize] {
        &self.indices
    }

    fn patterns(&self) -> impl Iterator<Item = &str> {
        self.patterns.iter().map(|(pattern, _)| &**pattern)
    }

    /// The `layers_pattern` that PEFT reads, if there is one.
    pub(super) fn patterns_json(&self) -> Option<Value> {
        let patterns: Vec<&str> = self.patterns().collect();
        (!patterns.is_empty()).then(|| json!(patterns))
    }

    /// Whether the module at `path`, for example `model.layers.0.self_attn.q_proj`, is in one of the layers.
    pub fn contains(&self, path: &str) -> bool {
        let index = match self.patterns.is_empty() {
            true => first_index(path),
            false => {
                let found = self.patterns.iter();
                let mut found = found.filter_map(|(_, regex)| regex.captures(path));
                found.next().and_then(|found| found["index"].parse().ok())
            }
        };
        index.is_some_and(|index| self.indices.contains(&index))
    }
}

/// The first whole number behind at least two components and in front of one.
fn first_index(path: &str) -> Option<usize> {
    let (above, _) = path.rsplit_once('.')?;
    let mut components = above.split('.').skip(2);
    let is_number = |text: &&str| !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
    components.find(is_number)?.parse().ok()
}

impl PartialEq for LayerSelection {
    fn eq(&self, other: &Self) -> bool {
        self.indices == other.indices && self.patterns().eq(other.patterns())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(indices: &[usize], patterns: &[&str]) -> LayerSelection {
        let patterns = patterns.iter().map(|pattern| pattern.to_string());
        LayerSelection::new(indices.to_vec(), patterns.collect()).unwrap()
    }

    #[test]
    fn a_layer_is_told_by_the_first_number_of_a_path() {
        let layers = selection(&[0, 11], &[]);
        assert!(layers.contains("model.layers.0.self_attn.q_proj"));
        assert!(layers.contains("model.layers.11.mlp.experts.3.up_proj"));
        assert!(!layers.contains("model.layers.1.mlp.experts.0.up_proj"));
        assert!(!layers.contains("model.layers.0"));
        assert!(!layers.contains("layers.0.q_proj"));
    }

    #[test]
    fn a_layers_pattern_says_what_stands_before_the_number() {
        let layers = selection(&[3], &["h", "layers"]);
        assert!(layers.contains("model.layers.3.mlp.up_proj"));
        assert!(layers.contains("transformer.h.3.mlp.up_proj"));
        assert!(layers.contains("layers.3.mlp.up_proj"));
        assert!(!layers.contains("model.blocks.3.mlp.up_proj"));
        assert!(!layers.contains("model.mylayers.3.mlp.up_proj"));
    }
}
