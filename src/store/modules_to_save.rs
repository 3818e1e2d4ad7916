//! Which modules beside the linear layers are trained whole and saved with an adapter, by PEFT's rules.

use std::collections::BTreeSet;

use serde::{Deserialize, Deserializer, Serialize};

/// How the paths of these modules end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ModulesToSave(BTreeSet<String>);

impl ModulesToSave {
    /// # Errors
    /// For an empty name, with which every path would end.
    pub fn of(names: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let names = names.into_iter().map(|name| name.trim().to_string());
        let names: BTreeSet<String> = names.collect();
        match names.contains("") {
            true => Err("expected a name of a module, found an empty one".to_string()),
            false => Ok(Self(names)),
        }
    }

    /// Whether the module at `path`, for example `lm_head`, is one of them.
    pub fn matches(&self, path: &str) -> bool {
        self.names().any(|name| path.ends_with(name))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

/// From a list of names, or one text with commas between them.
impl<'de> Deserialize<'de> for ModulesToSave {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum TextOrList {
            Text(String),
            List(Vec<String>),
        }
        let names = match TextOrList::deserialize(deserializer)? {
            TextOrList::Text(text) => text.split(',').map(str::to_string).collect(),
            TextOrList::List(names) => names,
        };
        Self::of(names).map_err(serde::de::Error::custom)
    }
}
