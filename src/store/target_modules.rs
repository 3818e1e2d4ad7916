//! Which linear layers get an adapter, by PEFT's rules.

use std::collections::BTreeSet;

use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Value, json};

use super::tensor_names::module_path;

/// What a decoder has in PEFT's eyes beside the linear layers of its blocks; `N` is a block.
const OTHER_MODULES: [&str; 21] = [
    "model",
    "model.embed_tokens",
    "model.layers",
    "N",
    "N.self_attn",
    "N.self_attn.q_norm",
    "N.self_attn.k_norm",
    "N.self_attn.rotary_emb",
    "N.mlp",
    "N.mlp.act_fn",
    "N.input_layernorm",
    "N.post_attention_layernorm",
    "N.pre_feedforward_layernorm",
    "N.post_feedforward_layernorm",
    "N.post_self_attn_layernorm",
    "N.post_mlp_layernorm",
    "N.post_norm1",
    "N.post_norm2",
    "model.norm",
    "model.rotary_emb",
    "lm_head",
];

/// The keyword for every linear layer but the head.
const ALL_LINEAR: &str = "all-linear";

/// Which linear layers of the decoder blocks get an adapter.
#[derive(Debug, Clone)]
pub enum TargetModules {
    /// Every linear layer but the head.
    AllLinear,
    /// Layers whose path is one of these names or ends in one after a dot.
    Names(Vec<String>),
    /// Layers whose whole path matches; the regex is anchored at both ends.
    Pattern {
        /// As the user wrote it.
        text: String,
        regex: Regex,
    },
}

impl TargetModules {
    /// Reads `all-linear`, a name, a comma-separated list of names, or a regex: a text with any character that names do
    /// not have.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text == ALL_LINEAR {
            return Ok(Self::AllLinear);
        }
        let is_name_list = |c: char| c.is_ascii_alphanumeric() || "_-., ".contains(c);
        if text.chars().all(is_name_list) && !text.contains(".*") {
            return Self::from_names(text.split(',').map(str::to_string).collect());
        }
        Self::pattern(text)
    }

    /// A regex that has to match a layer's whole path.
    ///
    /// # Errors
    /// What is wrong with the regex.
    pub fn pattern(text: &str) -> Result<Self, String> {
        /// Bytes that the compiled regex may take: more would be out of proportion to the file that it comes from.
        const MAX_BYTES: usize = 1 << 20;
        let mut regex = RegexBuilder::new(&format!("^(?:{text})$"));
        let regex = regex.size_limit(MAX_BYTES).build().map_err(|e| {
            let last = e.to_string();
            let last = last.lines().last().unwrap_or_default();
            let last = last.trim_start_matches("error: ");
            format!("`{text}` is not a regex: {last}")
        })?;
        Ok(Self::Pattern {
            text: text.to_string(),
            regex,
        })
    }

    fn from_names(names: Vec<String>) -> Result<Self, String> {
        let names: Vec<String> = names.iter().map(|name| name.trim().to_string()).collect();
        if names.is_empty() || names.iter().any(String::is_empty) {
            return Err("expected a name of a module, found an empty one".to_string());
        }
        if let [only] = names.as_slice()
            && only == ALL_LINEAR
        {
            return Ok(Self::AllLinear);
        }
        Ok(Self::named(&names))
    }

    /// Layers with these names, or paths, which may be from before transformers 4.52.
    pub(super) fn named(names: &[String]) -> Self {
        let names = names.iter().map(|name| module_path(name).into_owned());
        Self::Names(names.collect())
    }

    /// Whether the linear layer at `path`, for example `model.layers.0.self_attn.q_proj`, gets an adapter.
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::AllLinear => path.rsplit('.').next() != Some("lm_head"),
            Self::Names(names) => names.iter().any(|name| ends_in(path, name)),
            Self::Pattern { regex, .. } => regex.is_match(path),
        }
    }
}

impl TargetModules {
    /// What PEFT is to read for an adapter on the layers at `paths`: of all linear layers their last names; the paths of a
    /// regex that also fits what is no such layer, on which PEFT would end, and in a model that also sees images, whose other
    /// parts have layers of the same names.
    pub(super) fn for_peft<'a>(&self, paths: impl Iterator<Item = &'a str> + Clone) -> Self {
        let sorted =
            |names: BTreeSet<&str>| Self::Names(names.into_iter().map(str::to_string).collect());
        if !paths.clone().all(|path| path.starts_with("model.layers.")) {
            return sorted(paths.collect());
        }
        match self {
            Self::AllLinear => sorted(paths.filter_map(|path| path.rsplit('.').next()).collect()),
            Self::Pattern { regex, .. } if fits_more(regex, paths.clone()) => {
                sorted(paths.collect())
            }
            Self::Names(_) | Self::Pattern { .. } => self.clone(),
        }
    }

    /// Whether one of the names is the whole of `path`.
    pub(super) fn names(&self, path: &str) -> bool {
        matches!(self, Self::Names(names) if names.iter().any(|name| name == path))
    }

    /// What PEFT reads: the names sorted, each once.
    pub(super) fn to_json(&self) -> Value {
        match self {
            Self::AllLinear => json!(ALL_LINEAR),
            Self::Pattern { text, .. } => json!(text),
            Self::Names(names) => json!(names.iter().collect::<BTreeSet<_>>()),
        }
    }

    /// The first name that no one of `paths` has.
    pub fn unmatched(&self, paths: &[String]) -> Option<&str> {
        let Self::Names(names) = self else {
            return None;
        };
        let is_unknown = |name: &&String| !paths.iter().any(|path| ends_in(path, name));
        names.iter().find(is_unknown).map(String::as_str)
    }
}

/// Whether a regex fits a module that is no linear layer, of those around the layers at `paths`.
fn fits_more<'a>(regex: &Regex, paths: impl Iterator<Item = &'a str>) -> bool {
    let blocks = paths.filter_map(|path| path.rsplit_once('.')?.0.rsplit_once('.'));
    let blocks: BTreeSet<&str> = blocks.map(|(block, _)| block).collect();
    blocks.into_iter().any(|block| {
        let mut others = OTHER_MODULES.iter();
        others.any(|other| match other.strip_prefix('N') {
            Some(within) => regex.is_match(&format!("{block}{within}")),
            None => regex.is_match(other),
        })
    })
}

/// Whether `path` is `name`, or ends in it after a dot.
fn ends_in(path: &str, name: &str) -> bool {
    let rest = path.strip_suffix(name);
    rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

impl PartialEq for TargetModules {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::AllLinear, Self::AllLinear) => true,
            (Self::Names(a), Self::Names(b)) => a == b,
            (Self::Pattern { text: a, .. }, Self::Pattern { text: b, .. }) => a == b,
            _ => false,
        }
    }
}

impl Serialize for TargetModules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::AllLinear => serializer.serialize_str(ALL_LINEAR),
            Self::Names(names) => names.serialize(serializer),
            Self::Pattern { text, .. } => serializer.serialize_str(text),
        }
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum TextOrNames {
            Text(String),
            Names(Vec<String>),
        }
        match TextOrNames::deserialize(deserializer)? {
            TextOrNames::Text(text) => Self::parse(&text),
            TextOrNames::Names(names) => Self::from_names(names),
        }
        .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const Q_PROJ: &str = "model.layers.3.self_attn.q_proj";

    #[test]
    fn a_regex_that_fits_more_than_linear_layers_is_written_as_their_paths() {
        let written = |text: &str| {
            let targets = TargetModules::parse(text).unwrap();
            targets.for_peft([Q_PROJ].into_iter()).to_json()
        };
        for exact in [r".*\.(q|k)_proj", r"model\.layers\.3\.self_attn\.q_proj"] {
            assert_eq!(written(exact), json!(exact));
        }
        for wide in [
            ".*",
            r".*\.3\..*",
            ".*self_attn.*",
            ".*(q_proj|lm_head)",
            ".*q_.*",
        ] {
            assert_eq!(written(wide), json!([Q_PROJ]), "{wide}");
        }
        assert_eq!(written("all-linear"), json!(["q_proj"]));
        let within = ["model.language_model.layers.0.mlp.up_proj"];
        for text in ["all-linear", "up_proj", ".*up_proj"] {
            let targets = TargetModules::parse(text).unwrap();
            let written = targets.for_peft(within.into_iter()).to_json();
            assert_eq!(written, json!(within), "{text}");
        }
        assert_eq!(written("q_proj, v_proj"), json!(["q_proj", "v_proj"]));
    }

    #[test]
    fn names_match_whole_path_components_as_in_peft() {
        let names = TargetModules::parse("q_proj, mlp.up_proj").unwrap();
        assert!(names.matches(Q_PROJ));
        assert!(names.matches("q_proj"));
        assert!(names.matches("model.layers.0.mlp.up_proj"));
        assert!(!names.matches("model.layers.0.self_attn.not_q_proj"));
        assert!(!names.matches("model.layers.0.self_attn.v_proj"));
    }

    #[test]
    fn a_regex_has_to_match_the_whole_path_as_in_peft() {
        let pattern = TargetModules::parse(r".*\.layers\.[0-3]\.self_attn\.(q|v)_proj").unwrap();
        assert!(pattern.matches(Q_PROJ));
        assert!(!pattern.matches("model.layers.3.self_attn.k_proj"));
        assert!(!TargetModules::parse("(q|v)_proj").unwrap().matches(Q_PROJ));
        assert!(TargetModules::parse(".*q_proj").unwrap().matches(Q_PROJ));
    }

    #[test]
    fn all_linear_leaves_out_the_head() {
        assert!(TargetModules::AllLinear.matches(Q_PROJ));
        assert!(!TargetModules::AllLinear.matches("lm_head"));
    }

    #[test]
    fn bad_targets_are_refused() {
        assert!(TargetModules::parse("").is_err());
        assert!(TargetModules::parse("q_proj,,v_proj").is_err());
        let error = TargetModules::parse("(q_proj").unwrap_err();
        assert!(
            error.contains("is not a regex") && !error.contains('\n'),
            "{error}"
        );
    }
}
