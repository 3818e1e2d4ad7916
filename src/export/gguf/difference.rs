//! Where the metadata of a file says something else than was expected, told for people.

use std::fmt;

use serde_json::{Value as Json, json};

use super::writer::Value;
use crate::store::{GgufFile, shortest_json};

/// Characters of a value that are shown.
const SHOWN: usize = 60;

/// A key of a file with another value than expected.
#[derive(Debug)]
pub(super) struct Difference {
    /// With the place, in a list.
    key: String,
    /// `None` where nothing was expected, or found.
    expected: Option<Json>,
    found: Option<Json>,
}

impl Difference {
    /// Of a key that should not be there.
    pub(super) fn unexpected(file: &GgufFile, key: &str) -> Self {
        Self {
            key: key.into(),
            expected: None,
            found: file.json(key),
        }
    }

    /// `None` where the two are the same.
    fn between(key: &str, expected: Json, found: Option<Json>) -> Option<Self> {
        let key = key.to_string();
        match (expected, found) {
            (expected, Some(found)) if expected == found => None,
            (Json::Array(expected), Some(Json::Array(found))) => {
                let pairs = expected.iter().zip(&found);
                let same = pairs.take_while(|(expected, found)| expected == found);
                let at = same.count();
                Some(Self {
                    key: format!("{key}[{at}]"),
                    expected: expected.get(at).cloned(),
                    found: found.get(at).cloned(),
                })
            }
            (Json::String(expected), Some(Json::String(found))) if expected.len() > SHOWN => {
                let pairs = expected.chars().zip(found.chars());
                let at = pairs
                    .take_while(|(expected, found)| expected == found)
                    .count();
                let rest = |text: String| json!(text.chars().skip(at).collect::<String>());
                Some(Self {
                    key: format!("{key}, from character {at} on,"),
                    expected: Some(rest(expected)),
                    found: Some(rest(found)),
                })
            }
            (expected, found) => Some(Self {
                key,
                expected: Some(expected),
                found,
            }),
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.found {
            Some(found) => write!(f, "{} is {}", self.key, shown(found))?,
            None => write!(f, "{} is not there", self.key)?,
        }
        match &self.expected {
            Some(expected) => write!(f, ", expected {}", shown(expected)),
            None => write!(f, ", which is not expected"),
        }
    }
}

/// The beginning of a long value.
fn shown(value: &Json) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// The differences of a file from what is `expected` of it.
pub(super) fn differences<'a>(
    expected: impl Iterator<Item = (&'a str, &'a Value)>,
    found: impl Fn(&str) -> Option<Json>,
) -> impl Iterator<Item = Difference> {
    expected
        .filter_map(move |(key, expected)| Difference::between(key, json_of(expected), found(key)))
}

pub(super) fn json_of(value: &Value) -> Json {
    match value {
        Value::U32(value) => json!(value),
        Value::F32(value) => shortest_json(*value),
        Value::Bool(value) => json!(value),
        Value::Text(value) => json!(value),
        Value::I32s(values) => json!(values),
        Value::F32s(values) => values.iter().copied().map(shortest_json).collect(),
        Value::Texts(values) => json!(values),
    }
}
