//! Values that some modules have instead of the one that all others have: PEFT's `rank_pattern` and `alpha_pattern`.
//!
//! A key is the end of a module's path from a dot on, or all of it, and may be a regex; the first that matches counts.
//!
//! Source: `get_pattern_key` of PEFT 0.21.

use std::cmp::Ordering;
use std::fmt::Display;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use super::path_pattern::PathPattern;

/// More of them are not held: each takes memory out of proportion to its text.
const MAX_REGEXES: usize = 64;

/// Values by pattern, in the order in which the patterns are tried.
#[derive(Debug, Clone)]
pub struct ModulePatterns<V>(Vec<Entry<V>>);

#[derive(Debug, Clone)]
struct Entry<V> {
    pattern: PathPattern,
    value: V,
}

impl<V> Default for ModulePatterns<V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<V: Copy + Default + PartialOrd + FromStr + Display> ModulePatterns<V> {
    /// Of patterns and values, in their order.
    ///
    /// # Errors
    /// What is wrong with a pattern or with its value, which has to be greater than 0.
    pub fn new(pairs: impl IntoIterator<Item = (String, V)>) -> Result<Self, String> {
        let mut entries: Vec<Entry<V>> = Vec::new();
        for (pattern, value) in pairs {
            if value.partial_cmp(&V::default()) != Some(Ordering::Greater) {
                return Err(format!("`{pattern}` is {value}, expected more than 0"));
            }
            let pattern = PathPattern::new(pattern)?;
            if entries.iter().any(|entry| entry.pattern == pattern) {
                return Err(format!("`{}` is given twice", pattern.text()));
            }
            entries.push(Entry { pattern, value });
        }
        let regexes = entries.iter().filter(|entry| entry.pattern.is_regex());
        match regexes.count() > MAX_REGEXES {
            true => Err(format!("has more than {MAX_REGEXES} regexes")),
            false => Ok(Self(entries)),
        }
    }

    /// Reads the object that PEFT writes.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn from_json(object: &Map<String, Value>) -> Result<Self, String> {
        let pairs = object.iter().map(|(pattern, value)| {
            let read = value.to_string().parse();
            let value = read.map_err(|_| format!("`{pattern}` has {value} for a value"))?;
            Ok((pattern.clone(), value))
        });
        Self::new(pairs.collect::<Result<Vec<_>, String>>()?)
    }

    /// The object that PEFT reads.
    pub fn to_json(&self) -> Value {
        let number = |value: &V| value.to_string().parse().unwrap_or(Value::Null);
        let pairs = self.0.iter();
        pairs
            .map(|entry| (entry.pattern.text().to_string(), number(&entry.value)))
            .collect::<Map<_, _>>()
            .into()
    }

    /// The value of the module at `path`, for example `model.layers.0.self_attn.q_proj`, if a pattern matches it.
    pub fn of(&self, path: &str) -> Option<V> {
        let entry = self.0.iter().find(|entry| entry.pattern.matches(path));
        entry.map(|entry| entry.value)
    }

    /// The same patterns with other values.
    pub fn map(mut self, change: impl Fn(V) -> V) -> Self {
        for entry in &mut self.0 {
            entry.value = change(entry.value);
        }
        self
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first pattern that matches none of `paths`.
    pub fn unmatched(&self, paths: &[String]) -> Option<&str> {
        let matches = |entry: &&Entry<V>| !paths.iter().any(|path| entry.pattern.matches(path));
        self.0
            .iter()
            .find(matches)
            .map(|entry| entry.pattern.text())
    }

    fn pairs(&self) -> impl Iterator<Item = String> {
        let pairs = self.0.iter();
        pairs.map(|Entry { pattern, value }| format!("{}={value}", pattern.text()))
    }
}

impl<V: PartialEq> PartialEq for ModulePatterns<V> {
    fn eq(&self, other: &Self) -> bool {
        let pairs = |patterns: &Self| patterns.0.len();
        let is_same = |(a, b): (&Entry<V>, &Entry<V>)| a.pattern == b.pattern && a.value == b.value;
        pairs(self) == pairs(other) && self.0.iter().zip(&other.0).all(is_same)
    }
}

/// `q_proj=8,down_proj=4`.
impl<V: Copy + Default + PartialOrd + FromStr + Display> Display for ModulePatterns<V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.pairs().collect::<Vec<_>>().join(","))
    }
}

/// As a list of `pattern=value`.
impl<V: Copy + Default + PartialOrd + FromStr + Display> Serialize for ModulePatterns<V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.pairs())
    }
}

impl<'de, V: Copy + Default + PartialOrd + FromStr + Display> Deserialize<'de>
    for ModulePatterns<V>
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let read = |pair: String| {
            // A regex may have a `=`, a number has none.
            let (pattern, value) = pair.rsplit_once('=')?;
            Some((pattern.trim().to_string(), value.trim().parse().ok()?))
                .filter(|(pattern, _)| !pattern.is_empty())
        };
        let mut pairs = Vec::new();
        for pair in Vec::<String>::deserialize(deserializer)? {
            let reason = format!("`{pair}` is not a pair such as q_proj=8");
            pairs.push(read(pair).ok_or_else(|| serde::de::Error::custom(reason))?);
        }
        Self::new(pairs).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranks(pairs: &[(&str, usize)]) -> ModulePatterns<usize> {
        let pairs = pairs.iter().map(|(name, r)| (name.to_string(), *r));
        ModulePatterns::new(pairs).unwrap()
    }

    #[test]
    fn a_key_is_the_end_of_a_path_from_a_dot_on_or_a_regex_of_it() {
        let path = "model.layers.3.self_attn.q_proj";
        for key in [
            "q_proj",
            "self_attn.q_proj",
            path,
            r"model\.layers\.\d\.self_attn\..*",
            "(q|v)_proj",
            "^model.*q_proj",
        ] {
            assert_eq!(ranks(&[(key, 7)]).of(path), Some(7), "{key}");
        }
        for key in ["proj", "q_pro", "attn.q_proj", "layers.3", "^layers.*"] {
            assert_eq!(ranks(&[(key, 7)]).of(path), None, "{key}");
        }
    }

    #[test]
    fn the_first_key_that_matches_counts() {
        let ranks = ranks(&[("3.self_attn.q_proj", 2), ("q_proj", 4)]);
        assert_eq!(ranks.of("model.layers.3.self_attn.q_proj"), Some(2));
        assert_eq!(ranks.of("model.layers.4.self_attn.q_proj"), Some(4));
        let json = ranks.to_json();
        assert_eq!(json.to_string(), r#"{"3.self_attn.q_proj":2,"q_proj":4}"#);
        let read = ModulePatterns::from_json(json.as_object().unwrap());
        assert_eq!(read, Ok(ranks));
    }

    #[test]
    fn values_that_cannot_be_are_refused() {
        let read = |json: Value| ModulePatterns::<usize>::from_json(json.as_object().unwrap());
        for json in [
            serde_json::json!({"q_proj": 0}),
            serde_json::json!({"q_proj": 1.5}),
            serde_json::json!({"q_proj": "8"}),
            serde_json::json!({"(q_proj": 8}),
        ] {
            assert!(read(json.clone()).is_err(), "{json}");
        }
        let infinite = [("q_proj".to_string(), f64::NAN)];
        assert!(ModulePatterns::new(infinite).is_err());
    }
}
