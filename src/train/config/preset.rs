//! Settings under one name: those with which the models of the QLoRA paper were trained.
//!
//! `guanaco-SIZE` is a published script, `qlora-DATA-SIZE` a row of the paper's table of hyperparameters.
//!
//! Source: the scripts of artidoro/qlora (July 2023) and the defaults of its qlora.py; arXiv:2305.14314, appendix B.2 with
//! table 9.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::file::NEAREST_SIMILARITY;

/// A set of values for keys that are not given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Preset {
    recipe: Recipe,
    size: Size,
}

/// What was trained on, and whose word on it counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Recipe {
    /// The scripts that made the guanaco models, of OASST1.
    Guanaco,
    /// Any data set of instructions.
    All,
    Oasst1,
    HhRlhf,
    Longform,
}

/// A size of LLaMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Size {
    B7,
    B13,
    B33,
    B65,
}

/// A row of the paper's table, for one size.
struct Row {
    batch_size: usize,
    max_steps: usize,
    source_max_len: usize,
    target_max_len: usize,
}

impl Recipe {
    const ALL: [Self; 5] = [
        Self::Guanaco,
        Self::All,
        Self::Oasst1,
        Self::HhRlhf,
        Self::Longform,
    ];

    /// What a preset's name begins with.
    fn name(self) -> &'static str {
        match self {
            Self::Guanaco => "guanaco",
            Self::All => "qlora-all",
            Self::Oasst1 => "qlora-oasst1",
            Self::HhRlhf => "qlora-hh-rlhf",
            Self::Longform => "qlora-longform",
        }
    }

    /// The data set by its name in qlora.py, if it is a certain one.
    fn dataset(self) -> Option<&'static str> {
        match self {
            Self::All => None,
            Self::Guanaco | Self::Oasst1 => Some("oasst1"),
            Self::HhRlhf => Some("hh-rlhf"),
            Self::Longform => Some("longform"),
        }
    }
}

impl Size {
    const ALL: [Self; 4] = [Self::B7, Self::B13, Self::B33, Self::B65];

    /// What a preset's name ends with.
    fn name(self) -> &'static str {
        match self {
            Self::B7 => "7b",
            Self::B13 => "13b",
            Self::B33 => "33b",
            Self::B65 => "65b",
        }
    }

    fn model(self) -> &'static str {
        match self {
            Self::B7 => "huggyllama/llama-7b",
            Self::B13 => "huggyllama/llama-13b",
            Self::B33 => "huggyllama/llama-30b",
            Self::B65 => "huggyllama/llama-65b",
        }
    }

    /// The name of its shape.
    fn shape(self) -> &'static str {
        match self {
            Self::B7 => "llama-7b",
            Self::B13 => "llama-13b",
            Self::B33 => "llama-33b",
            Self::B65 => "llama-65b",
        }
    }

    fn learning_rate(self) -> f64 {
        match self {
            Self::B7 | Self::B13 => 2e-4,
            Self::B33 | Self::B65 => 1e-4,
        }
    }
}

impl Preset {
    /// What its model is called among the shapes.
    pub fn shape(self) -> &'static str {
        self.size.shape()
    }

    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        let of = |recipe| Size::ALL.map(|size| Self { recipe, size });
        Recipe::ALL.into_iter().flat_map(of)
    }

    /// Whether it leaves the data set to whoever takes it.
    pub fn is_for_any_dataset(self) -> bool {
        self.recipe.dataset().is_none()
    }

    /// The scripts have it otherwise for 13B than the paper.
    fn lora_dropout(self) -> f64 {
        match (self.recipe, self.size) {
            (_, Size::B7) => 0.1,
            (Recipe::Guanaco, _) => 0.05,
            (_, Size::B13) => 0.1,
            (_, Size::B33 | Size::B65) => 0.05,
        }
    }

    fn row(self) -> Row {
        /// Where the table has no length of a source, since there is none: that of the scripts.
        const NO_SOURCE: usize = 16;
        let (batch_size, max_steps) = match (self.recipe, self.size) {
            (Recipe::Guanaco | Recipe::Oasst1, _) => (16, 1875),
            (Recipe::All | Recipe::HhRlhf, Size::B7 | Size::B13) => (16, 10_000),
            (Recipe::All | Recipe::HhRlhf, Size::B33) => (32, 5000),
            (Recipe::All | Recipe::HhRlhf, Size::B65) => (64, 2500),
            (Recipe::Longform, Size::B7 | Size::B13) => (16, 4000),
            (Recipe::Longform, Size::B33 | Size::B65) => (32, 2343),
        };
        let (source_max_len, target_max_len) = match self.recipe {
            Recipe::All => (384, 128),
            Recipe::Guanaco | Recipe::Oasst1 => (NO_SOURCE, 512),
            Recipe::HhRlhf => (NO_SOURCE, 768),
            Recipe::Longform => (512, 1024),
        };
        Row {
            batch_size,
            max_steps,
            source_max_len,
            target_max_len,
        }
    }

    /// Its keys and values.
    pub(super) fn values(self) -> Map<String, Value> {
        let row = self.row();
        let mut values = object(json!({
            "model_name_or_path": self.size.model(),
            "source_max_len": row.source_max_len,
            "target_max_len": row.target_max_len,
            "group_by_length": true,
            "quant_type": "nf4",
            "double_quant": true,
            "lora_r": 64,
            "lora_alpha": 16.0,
            "lora_dropout": self.lora_dropout(),
            "lora_target_modules": ["all-linear"],
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": row.batch_size,
            "learning_rate": self.size.learning_rate(),
            "lr_scheduler_type": "constant",
            "max_steps": row.max_steps,
            "adam_beta2": 0.999,
            "max_grad_norm": 0.3,
            "optim": "paged_adamw_32bit",
        }));
        if let Some(dataset) = self.recipe.dataset() {
            values.insert("dataset".into(), json!([dataset]));
        }
        if self.recipe == Recipe::Guanaco {
            values.extend(self.values_of_script());
        }
        values
    }

    /// What the scripts of the guanaco models say besides.
    fn values_of_script(self) -> Map<String, Value> {
        let save_steps = match self.size {
            Size::B7 | Size::B13 => 500,
            Size::B33 | Size::B65 => 200,
        };
        object(json!({
            "dataset_format": "oasst1",
            "eval_dataset_size": 1024,
            "max_eval_samples": 1000,
            "per_device_eval_batch_size": 1,
            "warmup_ratio": 0.03,
            "weight_decay": 0.0,
            "seed": 0,
            "data_seed": 42,
            "eval_steps": 187,
            "save_steps": save_steps,
            "save_total_limit": 40,
            "logging_steps": 10,
        }))
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => unreachable!("written as an object"),
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.recipe.name(), self.size.name())
    }
}

impl From<Preset> for String {
    fn from(preset: Preset) -> Self {
        preset.to_string()
    }
}

impl FromStr for Preset {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        if let Some(preset) = Self::all().find(|preset| preset.to_string() == name) {
            return Ok(preset);
        }
        let alike = Self::all()
            .map(|preset| (strsim::jaro_winkler(name, &preset.to_string()), preset))
            .max_by(|a, b| a.0.total_cmp(&b.0));
        let hint = match alike {
            Some((similarity, nearest)) if similarity >= NEAREST_SIMILARITY => {
                format!(", did you mean `{nearest}`?")
            }
            _ => {
                let recipes = Recipe::ALL.map(Recipe::name).join("-, ");
                let [sizes @ .., last] = Size::ALL.map(Size::name);
                let sizes = sizes.join(", ");
                format!("; there are {recipes}-, each with {sizes} or {last}")
            }
        };
        Err(format!("`{name}` is not a preset{hint}"))
    }
}

impl TryFrom<String> for Preset {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        name.parse()
    }
}
