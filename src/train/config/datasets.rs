//! Config values that name data: several data sets, their weights, and their columns.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// One data set or several: paths, or names that whoever runs the training has to make paths of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DatasetList(pub Vec<PathBuf>);

impl<P: Into<PathBuf>> From<P> for DatasetList {
    fn from(path: P) -> Self {
        Self(vec![path.into()])
    }
}

impl std::fmt::Display for DatasetList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let paths: Vec<_> = self
            .0
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        f.write_str(&paths.join(", "))
    }
}

impl Serialize for DatasetList {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.as_slice() {
            [] => serializer.serialize_str(""),
            // A comma would part it when it is read.
            [path] if !path.to_string_lossy().contains(',') => path.serialize(serializer),
            paths => paths.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for DatasetList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum OneOrSeveral {
            One(String),
            Several(Vec<PathBuf>),
        }
        Ok(match OneOrSeveral::deserialize(deserializer)? {
            OneOrSeveral::One(text) if text.is_empty() => Self::default(),
            // A name with a comma can still be given in a list.
            OneOrSeveral::One(text) => {
                Self(text.split(',').map(|name| name.trim().into()).collect())
            }
            OneOrSeveral::Several(paths) => Self(paths),
        })
    }
}

/// How often each data set is used in an epoch; all are greater than 0.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DatasetWeights(pub Vec<f64>);

impl<'de> Deserialize<'de> for DatasetWeights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let weights = Vec::<f64>::deserialize(deserializer)?;
        match weights
            .iter()
            .find(|weight| !(weight.is_finite() && **weight > 0.0))
        {
            Some(weight) => Err(serde::de::Error::custom(format!(
                "{weight} is not a weight; expected a number greater than 0"
            ))),
            None => Ok(Self(weights)),
        }
    }
}

/// Columns by the name that the format gives them, and by the one that they have in the file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DatasetColumns(pub Vec<(String, String)>);

impl Serialize for DatasetColumns {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let pairs = self
            .0
            .iter()
            .map(|(name, in_file)| format!("{name}={in_file}"));
        serializer.collect_seq(pairs)
    }
}

impl<'de> Deserialize<'de> for DatasetColumns {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut columns = Vec::new();
        for pair in Vec::<String>::deserialize(deserializer)? {
            let (name, in_file) = match pair.split_once('=') {
                Some((name, in_file)) if !name.is_empty() && !in_file.is_empty() => (name, in_file),
                _ => {
                    return Err(serde::de::Error::custom(format!(
                        "`{pair}` is not a pair such as instruction=question"
                    )));
                }
            };
            if columns.iter().any(|(known, _)| known == name) {
                return Err(serde::de::Error::custom(format!("`{name}` is given twice")));
            }
            columns.push((name.to_string(), in_file.to_string()));
        }
        Ok(Self(columns))
    }
}
