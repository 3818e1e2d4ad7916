//! The types of config values, and how a value typed as text becomes one.

use std::path::PathBuf;

use chrono::NaiveDate;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use super::{DatasetColumns, DatasetList, DatasetWeights, Preset};
use crate::data::{DatasetFormat, ExcessLength};
use crate::device::{ComputeDtype, DeviceKind};
use crate::model::InitLoraWeights;
use crate::quant::QuantType;
use crate::store::{MatrixDropoutScale, ModulePatterns, ModulesToSave, TargetModules};
use crate::train::schedule::SchedulerType;

/// What can be typed for a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueKind {
    Bool,
    Integer,
    /// An integer that is not negative.
    Count,
    Number,
    Path,
    Text,
    Date,
    /// One text, or a list of texts.
    List,
    /// One number, or a list of numbers.
    Numbers,
    /// One count, or a list of counts.
    Counts,
    /// `name=other` pairs.
    Pairs,
    /// `name=number` pairs.
    NumberPairs,
    /// `true`, `false` or a path.
    BoolOrPath,
    /// `true`, `false` or a name.
    BoolOrText,
}

impl ValueKind {
    /// What stands for a value in a help text.
    pub fn placeholder(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::Integer | Self::Count => "N",
            Self::Number => "X",
            Self::Path => "PATH",
            Self::Text => "NAME",
            Self::Date => "DATE",
            Self::List => "NAMES",
            Self::Numbers => "X,X",
            Self::Counts => "N,N",
            Self::Pairs => "A=B",
            Self::NumberPairs => "NAME=N",
            Self::BoolOrPath => "BOOL|PATH",
            Self::BoolOrText => "true|NAME",
        }
    }

    /// Whether the key alone, without a value, means `true`.
    pub fn is_flag(self) -> bool {
        matches!(self, Self::Bool | Self::BoolOrPath)
    }

    /// Turns a text into the type the key has; other values are checked.
    ///
    /// # Errors
    /// What was expected and what was found.
    pub fn coerce(self, value: Value) -> Result<Value, String> {
        let expected = match self {
            Self::Bool => "true or false",
            Self::Integer => "an integer",
            Self::Count => "a non-negative integer",
            Self::Number => "a number",
            Self::Path => "a path",
            Self::Text => "a name",
            Self::Date => "a date such as 2026-11-27",
            Self::List => "a name or a list of names",
            Self::Numbers => "a number or a list of numbers",
            Self::Counts => "a non-negative integer or a list of them",
            Self::Pairs => "pairs such as instruction=question",
            Self::NumberPairs => "pairs such as q_proj=8",
            Self::BoolOrPath => "true, false or a path",
            Self::BoolOrText => "true or a name",
        };
        let found = match &value {
            Value::String(text) => format!("`{text}`"),
            other => other.to_string(),
        };
        let coerced = match (self, value) {
            (Self::Bool, Value::String(text)) => parse_bool(&text).map(Value::Bool),
            (Self::BoolOrPath | Self::BoolOrText, Value::String(text)) => {
                Some(parse_bool(&text).map_or(Value::String(text), Value::Bool))
            }
            (Self::Bool | Self::BoolOrPath | Self::BoolOrText, Value::Bool(flag)) => {
                Some(Value::Bool(flag))
            }
            (Self::Integer, Value::String(text)) => text.parse::<i64>().ok().map(Value::from),
            (Self::Count, Value::String(text)) => text.parse::<u64>().ok().map(Value::from),
            (Self::Number, Value::String(text)) => parse_finite(&text).map(Value::from),
            (Self::Integer, Value::Number(n)) => n.is_i64().then_some(Value::Number(n)),
            (Self::Count, Value::Number(n)) => n.is_u64().then_some(Value::Number(n)),
            (Self::Number, Value::Number(n)) => Some(Value::Number(n)),
            // What TOML calls a date.
            (Self::Date, Value::Object(date)) if date.len() == 1 => {
                let text = date.into_iter().next().map(|(_, text)| text);
                return Self::Date.coerce(text.unwrap_or_default());
            }
            (Self::Date, Value::String(text)) => {
                let date = text.parse::<NaiveDate>().ok();
                date.map(|date| Value::String(date.to_string()))
            }
            (Self::Path | Self::Text | Self::List, Value::String(text)) => {
                Some(Value::String(text))
            }
            (Self::Numbers, Value::String(text)) => {
                let numbers = text.split(',').map(|number| parse_finite(number.trim()));
                numbers.collect::<Option<Vec<f64>>>().map(Value::from)
            }
            (Self::Numbers, Value::Number(number)) => Some(Value::Array(vec![number.into()])),
            (Self::Numbers, Value::Array(items)) => items
                .iter()
                .all(Value::is_number)
                .then_some(Value::Array(items)),
            (Self::Counts, Value::String(text)) => {
                let counts = text.split(',').map(|count| count.trim().parse().ok());
                counts.collect::<Option<Vec<u64>>>().map(Value::from)
            }
            (Self::Counts, Value::Number(n)) => n.is_u64().then(|| Value::Array(vec![n.into()])),
            (Self::Counts, Value::Array(items)) => items
                .iter()
                .all(Value::is_u64)
                .then_some(Value::Array(items)),
            (Self::Pairs | Self::NumberPairs, Value::String(text)) => Some(
                text.split(',')
                    .map(|pair| pair.trim().to_string())
                    .collect(),
            ),
            (Self::Pairs, Value::Object(pairs)) => pairs
                .into_iter()
                .map(|(name, other)| Some(format!("{name}={}", other.as_str()?)))
                .collect::<Option<Vec<String>>>()
                .map(Value::from),
            (Self::NumberPairs, Value::Object(pairs)) => pairs
                .into_iter()
                .map(|(name, n)| n.is_number().then(|| format!("{name}={n}")))
                .collect::<Option<Vec<String>>>()
                .map(Value::from),
            (Self::List | Self::Pairs | Self::NumberPairs, Value::Array(items)) => items
                .iter()
                .all(Value::is_string)
                .then_some(Value::Array(items)),
            _ => None,
        };
        coerced.ok_or_else(|| format!("expected {expected}, found {found}"))
    }
}

fn parse_finite(text: &str) -> Option<f64> {
    text.parse().ok().filter(|x: &f64| x.is_finite())
}

/// As Python's argparse scripts write them, too: `True`, `False`.
fn parse_bool(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    }
}

/// A Rust type that a config key can have.
pub(super) trait ConfigValue {
    const KIND: ValueKind;
}

macro_rules! config_value {
    ($($type:ty => $kind:ident),* $(,)?) => {
        $( impl ConfigValue for $type { const KIND: ValueKind = ValueKind::$kind; } )*
    };
}

config_value! {
    bool => Bool,
    usize => Count,
    u64 => Count,
    i64 => Integer,
    f64 => Number,
    PathBuf => Path,
    NaiveDate => Date,
    DatasetFormat => Text,
    DatasetList => List,
    DatasetWeights => Numbers,
    DatasetColumns => Pairs,
    ExcessLength => Text,
    QuantType => Text,
    SchedulerType => Text,
    Optim => Text,
    Preset => Text,
    DeviceKind => Text,
    ComputeDtype => Text,
    TargetModules => List,
    ModulesToSave => List,
    Vec<usize> => Counts,
    ModulePatterns<usize> => NumberPairs,
    ModulePatterns<f64> => NumberPairs,
    EvalMetric => Text,
    OnNonFinite => Text,
    MatrixDropoutScale => Text,
    Resume => BoolOrPath,
    InitLoraWeights => BoolOrText,
    ByteCount => Text,
}

impl<T: ConfigValue> ConfigValue for Option<T> {
    const KIND: ValueKind = T::KIND;
}

/// An amount of memory, typed as `24GB`, `24GiB` or bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteCount(pub u64);

impl std::str::FromStr for ByteCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size: bytesize::ByteSize = text
            .parse()
            .map_err(|_| format!("`{text}` is not an amount of memory such as 24GB or 24GiB"))?;
        Ok(Self(size.as_u64()))
    }
}

impl Serialize for ByteCount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.to_string().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ByteCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The optimizer: AdamW, with its moments in f32 or, block-wise, in 8 bits, and on the device or in host memory. Where they lie
/// changes no result. Fusing changes none either, so that the names which ask for it are the plain ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Optim {
    #[serde(rename = "adamw_torch")]
    AdamwTorch,
    /// With block-wise moments in 8 bits, those of bitsandbytes.
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
    #[serde(rename = "paged_adamw_32bit")]
    PagedAdamw32bit,
    #[serde(rename = "paged_adamw_8bit")]
    PagedAdamw8bit,
}

impl Optim {
    /// Whether moments are codes of 8 bits, where a tensor is large enough.
    pub fn is_8bit(self) -> bool {
        matches!(self, Self::Adamw8bit | Self::PagedAdamw8bit)
    }

    /// The same with its moments on the device.
    pub fn resident(self) -> Self {
        match self.is_8bit() {
            false => Self::AdamwTorch,
            true => Self::Adamw8bit,
        }
    }

    /// Whether moments are in host memory.
    pub fn is_paged(self) -> bool {
        matches!(self, Self::PagedAdamw32bit | Self::PagedAdamw8bit)
    }
}

impl<'de> Deserialize<'de> for Optim {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        match name.as_str() {
            "adamw_torch" | "adamw_hf" | "adamw_torch_fused" => Ok(Self::AdamwTorch),
            "paged_adamw" | "paged_adamw_32bit" => Ok(Self::PagedAdamw32bit),
            "adamw_8bit" | "adamw_bnb_8bit" => Ok(Self::Adamw8bit),
            "paged_adamw_8bit" => Ok(Self::PagedAdamw8bit),
            _ => Err(serde::de::Error::custom(format!(
                "`{name}` is not supported; use adamw_torch, adamw_8bit, paged_adamw_32bit or paged_adamw_8bit"
            ))),
        }
    }
}

/// What becomes of a step whose loss or gradient is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnNonFinite {
    /// The run ends, with a checkpoint from before the step.
    Stop,
    /// The step passes without an update.
    Skip,
}

/// A metric that checkpoints are compared by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EvalMetric {
    #[serde(rename = "eval_loss", alias = "loss")]
    EvalLoss,
    #[serde(rename = "eval_perplexity", alias = "perplexity")]
    EvalPerplexity,
    #[serde(rename = "eval_token_accuracy", alias = "token_accuracy")]
    EvalTokenAccuracy,
}

/// Where a run continues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    Never,
    /// From the last checkpoint in the output directory.
    Latest,
    /// From this checkpoint directory.
    From(PathBuf),
}

impl Serialize for Resume {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Never => serializer.serialize_bool(false),
            Self::Latest => serializer.serialize_bool(true),
            Self::From(path) => path.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Resume {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum BoolOrPath {
            Bool(bool),
            Path(PathBuf),
        }
        Ok(match BoolOrPath::deserialize(deserializer)? {
            BoolOrPath::Bool(false) => Self::Never,
            BoolOrPath::Bool(true) => Self::Latest,
            BoolOrPath::Path(path) => Self::From(path),
        })
    }
}
