//! Dataset formats: their names, and which one a row has.

use serde_json::Value;

use super::columns::{Columns, names, quoted};
use crate::Result;

/// What a row of a data file looks like (`dataset_format`).
///
/// The names are those of qlora.py where it has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case", try_from = "String")]
pub enum DatasetFormat {
    /// `input_ids` and, unless every token carries loss, `labels` with -100 for no loss; not shifted.
    Tokenized,
    /// `messages` with `role` and `content`, through the model's chat template; loss on assistant turns.
    Messages,
    /// `conversations` with `from` and `value`: the same in ShareGPT's names.
    Sharegpt,
    /// Super-Natural Instructions: `Definition`, `Positive Examples` and `Instance` or `Instances`.
    SuperNaturalInstructions,
    /// `instruction`, `output` and optionally `input`, in the prompts of Stanford Alpaca.
    Alpaca,
    /// Unnatural Instructions: `instances`, and optionally `reformulations`, with `instruction_with_input` and `output`.
    UnnaturalInstructions,
    /// `input` and `output`, without a prompt around them.
    InputOutput,
    /// `prompt` and `completion`.
    SelfInstruct,
    /// `inputs` and `targets`.
    Flan,
    /// `chosen`: a whole dialogue, all of it with loss.
    HhRlhf,
    /// `text` with one question after `<human>: ` and one answer after `<bot>: `.
    Chip2,
    /// `text` with a whole dialogue (`### Human:` and `### Assistant:`), all of it with loss.
    Oasst1,
    /// `text`, all of it with loss.
    Completion,
}

/// Other names of a format, as data sets are called.
const SYNONYMS: [(&str, DatasetFormat); 4] = [
    ("alpaca-clean", DatasetFormat::Alpaca),
    ("longform", DatasetFormat::InputOutput),
    ("openai", DatasetFormat::Messages),
    ("super-ni", DatasetFormat::SuperNaturalInstructions),
];

impl DatasetFormat {
    /// All formats, in the order in which detection tries them.
    pub const ALL: [Self; 13] = [
        Self::Tokenized,
        Self::Messages,
        Self::Sharegpt,
        Self::SuperNaturalInstructions,
        Self::UnnaturalInstructions,
        Self::Alpaca,
        Self::InputOutput,
        Self::SelfInstruct,
        Self::Flan,
        Self::HhRlhf,
        Self::Chip2,
        Self::Oasst1,
        Self::Completion,
    ];

    /// The name in configs and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tokenized => "tokenized",
            Self::Messages => "messages",
            Self::Sharegpt => "sharegpt",
            Self::SuperNaturalInstructions => "super-natural-instructions",
            Self::Alpaca => "alpaca",
            Self::UnnaturalInstructions => "unnatural-instructions",
            Self::InputOutput => "input-output",
            Self::SelfInstruct => "self-instruct",
            Self::Flan => "flan",
            Self::HhRlhf => "hh-rlhf",
            Self::Chip2 => "chip2",
            Self::Oasst1 => "oasst1",
            Self::Completion => "completion",
        }
    }

    /// Longest target in tokens where nothing else is said: that of qlora.py, or of Wang et al. (arXiv:2204.07705).
    pub fn default_target_max_len(self) -> usize {
        match self {
            Self::SuperNaturalInstructions => 128,
            _ => 256,
        }
    }

    /// The columns that a row must have. Unnatural Instructions also come without `instances`, one to a row.
    fn required_columns(self) -> &'static [&'static str] {
        match self {
            Self::Tokenized => &["input_ids"],
            Self::Messages => &["messages"],
            Self::Sharegpt => &["conversations"],
            Self::SuperNaturalInstructions => &["Definition"],
            Self::Alpaca => &["instruction", "output"],
            Self::UnnaturalInstructions => &["instances"],
            Self::InputOutput => &["input", "output"],
            Self::SelfInstruct => &["prompt", "completion"],
            Self::Flan => &["inputs", "targets"],
            Self::HhRlhf => &["chosen"],
            Self::Chip2 | Self::Oasst1 | Self::Completion => &["text"],
        }
    }

    /// What the text of a row has to contain besides.
    fn required_text(self) -> &'static [&'static str] {
        match self {
            Self::Chip2 => &["<human>: ", "\n<bot>: "],
            Self::Oasst1 => &["### Human:", "### Assistant:"],
            _ => &[],
        }
    }

    fn fits(self, row: &Columns) -> bool {
        let has_columns = self
            .required_columns()
            .iter()
            .all(|name| row.contains_key(*name));
        let text = row.get("text").and_then(Value::as_str).unwrap_or_default();
        let has_text = self.required_text().iter().all(|part| text.contains(part));
        let is_flat = self == Self::UnnaturalInstructions
            && ["instruction_with_input", "output"]
                .iter()
                .all(|name| row.contains_key(*name));
        (has_columns && has_text) || is_flat
    }

    /// The format of a file whose first row is `row`, with a sentence that says why; or what was looked for.
    pub(super) fn detect(row: &Columns) -> Result<(Self, String), String> {
        match Self::ALL.into_iter().find(|format| format.fits(row)) {
            Some(format) => Ok((
                format,
                format!(
                    "dataset_format {format} was detected: the first row has {}",
                    format.reason()
                ),
            )),
            None => Err(format!(
                "no dataset_format fits the columns {}; expected {}; dataset_columns can give columns other names",
                names(row),
                Self::ALL
                    .map(|format| format!("{} ({format})", format.reason()))
                    .join(", or ")
            )),
        }
    }

    fn reason(self) -> String {
        let columns = quoted(self.required_columns());
        match self.required_text() {
            [] => columns,
            parts => format!(
                "{columns} with {}",
                quoted(&parts.iter().map(|part| part.trim()).collect::<Vec<_>>())
            ),
        }
    }
}

impl std::fmt::Display for DatasetFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl TryFrom<String> for DatasetFormat {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        name.parse()
    }
}

impl std::str::FromStr for DatasetFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let canonical = name.replace('_', "-");
        let known = Self::ALL.into_iter().map(|format| (format.name(), format));
        known
            .chain(SYNONYMS)
            .find(|(known, _)| *known == canonical)
            .map(|(_, format)| format)
            .ok_or_else(|| {
                format!(
                    "`{name}` is not a dataset format; expected {}",
                    quoted(&Self::ALL.map(Self::name))
                )
            })
    }
}
