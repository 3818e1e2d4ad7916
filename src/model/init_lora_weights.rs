//! How a new adapter begins: PEFT's `init_lora_weights`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An initialization by PEFT's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InitLoraWeights {
    /// `true`: A uniform in `±1/sqrt(in)`, B zero.
    Default,
    /// `gaussian`: A normal with deviation `1/r`, B zero.
    Gaussian,
    /// `pissa`: the largest singular values of the weight (arXiv:2404.02948).
    Pissa,
    /// `pissa_niter_N`: the same after `N` iterations.
    PissaNiter(usize),
    /// `loftq`: the largest singular values of what quantization loses (arXiv:2310.08659).
    Loftq,
    /// `olora`: the first columns of the weight's QR decomposition (arXiv:2406.01775).
    Olora,
}

/// The names, for messages.
const INIT_NAMES: &str = "true, gaussian, pissa, pissa_niter_N, loftq or olora";

const PISSA_NITER: &str = "pissa_niter_";

impl InitLoraWeights {
    /// Whether the 4-bit weights are made together with the adapter.
    pub fn makes_base(self) -> bool {
        !matches!(self, Self::Default | Self::Gaussian)
    }

    /// Whether the adapter's factors are singular vectors of the weight itself.
    pub fn is_pissa(self) -> bool {
        matches!(self, Self::Pissa | Self::PissaNiter(_))
    }
}

impl fmt::Display for InitLoraWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("true"),
            Self::Gaussian => f.write_str("gaussian"),
            Self::Pissa => f.write_str("pissa"),
            Self::PissaNiter(iterations) => write!(f, "{PISSA_NITER}{iterations}"),
            Self::Loftq => f.write_str("loftq"),
            Self::Olora => f.write_str("olora"),
        }
    }
}

impl FromStr for InitLoraWeights {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.to_ascii_lowercase();
        if let Some(iterations) = name.strip_prefix(PISSA_NITER) {
            let iterations = iterations.parse().ok().filter(|n| (1..=1000).contains(n));
            return iterations
                .map(Self::PissaNiter)
                .ok_or_else(|| format!("`{text}` has to end in a number from 1 to 1000"));
        }
        match name.as_str() {
            "true" => Ok(Self::Default),
            "gaussian" => Ok(Self::Gaussian),
            "pissa" => Ok(Self::Pissa),
            "loftq" => Ok(Self::Loftq),
            "olora" => Ok(Self::Olora),
            "false" => {
                Err("`false` makes B random, so that training begins with noise; use true".into())
            }
            _ => Err(format!("`{text}` is not supported; use {INIT_NAMES}")),
        }
    }
}

impl Serialize for InitLoraWeights {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Default => serializer.serialize_bool(true),
            other => serializer.collect_str(other),
        }
    }
}

impl<'de> Deserialize<'de> for InitLoraWeights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum BoolOrName {
            Bool(bool),
            Name(String),
        }
        let name = match BoolOrName::deserialize(deserializer)? {
            BoolOrName::Bool(flag) => flag.to_string(),
            BoolOrName::Name(name) => name,
        };
        name.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_read_and_written_as_peft_has_it() {
        for name in [
            "true",
            "gaussian",
            "pissa",
            "pissa_niter_16",
            "loftq",
            "olora",
        ] {
            let init: InitLoraWeights = name.parse().unwrap();
            assert_eq!(init.to_string(), name);
            let json = serde_json::to_value(init).unwrap();
            assert_eq!(
                serde_json::from_value::<InitLoraWeights>(json).unwrap(),
                init
            );
        }
    }

    #[test]
    fn what_is_not_supported_is_said() {
        for (name, part) in [
            ("false", "use true"),
            ("eva", "gaussian"),
            ("pissa_niter_", "a number"),
            ("pissa_niter_0", "a number"),
            ("pissa_niter_x", "a number"),
        ] {
            let error = name.parse::<InitLoraWeights>().unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
