//! Record formats: which columns a record has, and how they become token ids and labels.
//!
//! `alpaca` and `input-output` follow qlora.py (artidoro/qlora, July 2023): its prompts, and its collator, which
//! tokenizes `bos + input` and `output + eos` apart and cuts each on the right.

use serde_json::{Map, Value};

use super::{Example, LoadOptions, Tokenizer, TrainOnSource};
use crate::{IGNORE_INDEX, Result};

const ALPACA_WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an input that provides \
further context. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n\
### Input:\n{input}\n\n### Response: ";
const ALPACA_WITHOUT_INPUT: &str = "Below is an instruction that describes a task. Write a response that \
appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response: ";

/// What a record of a data file looks like (`dataset_format`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DatasetFormat {
    /// `input_ids` and, unless every token carries loss, `labels` with -100 for no loss; not shifted.
    Tokenized,
    /// `instruction`, `output` and optionally `input`, in the prompts of Stanford Alpaca.
    Alpaca,
    /// `input` and `output`, without a prompt around them.
    InputOutput,
    /// `messages` with `role` and `content`, through the model's chat template; loss on assistant turns.
    Messages,
}

impl DatasetFormat {
    /// All formats, in the order in which detection tries them.
    pub const ALL: [Self; 4] = [
        Self::Tokenized,
        Self::Messages,
        Self::Alpaca,
        Self::InputOutput,
    ];

    /// The name in configs and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tokenized => "tokenized",
            Self::Alpaca => "alpaca",
            Self::InputOutput => "input-output",
            Self::Messages => "messages",
        }
    }

    /// The columns a record must have.
    fn required_columns(self) -> &'static [&'static str] {
        match self {
            Self::Tokenized => &["input_ids"],
            Self::Messages => &["messages"],
            Self::Alpaca => &["instruction", "output"],
            Self::InputOutput => &["input", "output"],
        }
    }

    /// The format of a file whose first record is `record`, with a sentence that says why; or what was looked for.
    pub(super) fn detect(record: &Map<String, Value>) -> Result<(Self, String), String> {
        let found = Self::ALL.into_iter().find(|format| {
            format
                .required_columns()
                .iter()
                .all(|column| record.contains_key(*column))
        });
        match found {
            Some(format) => Ok((
                format,
                format!(
                    "dataset_format {} was detected: the first row has {}",
                    format.name(),
                    quoted(format.required_columns())
                ),
            )),
            None => Err(format!(
                "no dataset_format fits the columns {}; expected {}",
                quoted(&record.keys().map(String::as_str).collect::<Vec<_>>()),
                Self::ALL
                    .map(|f| format!("{} ({})", quoted(f.required_columns()), f.name()))
                    .join(", or ")
            )),
        }
    }
}

impl std::fmt::Display for DatasetFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for DatasetFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let canonical = name.replace('_', "-");
        Self::ALL
            .into_iter()
            .find(|format| format.name() == canonical)
            .ok_or_else(|| {
                format!(
                    "`{name}` is not a dataset format; expected {}",
                    quoted(&Self::ALL.map(Self::name))
                )
            })
    }
}

fn quoted(names: &[&str]) -> String {
    if names.is_empty() {
        return "(none)".into();
    }
    names
        .iter()
        .map(|name| format!("`{name}`"))
        .collect::<Vec<_>>()
        .join(", ")
}

/// Turns one record into token ids and unshifted labels, before `max_seq_len` is applied. The error is the reason.
pub(super) fn example(
    record: &Map<String, Value>,
    format: DatasetFormat,
    line: usize,
    options: &LoadOptions,
    tokenizer: Option<&Tokenizer>,
) -> Result<Example, String> {
    let tokenizer = || tokenizer.ok_or_else(|| format!("format {format} needs a tokenizer"));
    let (input_ids, labels) = match format {
        DatasetFormat::Tokenized => tokenized(record)?,
        DatasetFormat::Alpaca => {
            let (source, target) = alpaca(record)?;
            source_target(tokenizer()?, &source, &target, options)?
        }
        DatasetFormat::InputOutput => {
            let (source, target) = (text(record, "input")?, text(record, "output")?);
            source_target(tokenizer()?, source, target, options)?
        }
        DatasetFormat::Messages => messages(record, tokenizer()?, options)?,
    };
    Ok(Example {
        input_ids,
        labels,
        line,
    })
}

fn column<'a>(record: &'a Map<String, Value>, name: &str) -> Result<&'a Value, String> {
    record.get(name).ok_or_else(|| {
        format!(
            "column `{name}` is missing; the row has {}",
            quoted(&record.keys().map(String::as_str).collect::<Vec<_>>())
        )
    })
}

fn text<'a>(record: &'a Map<String, Value>, name: &str) -> Result<&'a str, String> {
    let value = column(record, name)?;
    value
        .as_str()
        .ok_or_else(|| format!("`{name}` is {}, expected a string", kind(value)))
}

/// A JSON value's type, as an error names it.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn tokenized(record: &Map<String, Value>) -> Result<(Vec<u32>, Vec<i64>), String> {
    let input_ids = integers::<u32>(record, "input_ids")?;
    if input_ids.is_empty() {
        return Err("`input_ids` is empty".into());
    }
    let labels = match record.get("labels") {
        None => input_ids.iter().map(|&id| i64::from(id)).collect(),
        Some(_) => integers::<i64>(record, "labels")?,
    };
    if labels.len() != input_ids.len() {
        return Err(format!(
            "`labels` has {} entries and `input_ids` has {}, expected as many",
            labels.len(),
            input_ids.len()
        ));
    }
    if let Some(i) = labels.iter().position(|&l| l < 0 && l != IGNORE_INDEX) {
        return Err(format!(
            "`labels[{i}]` is {}, expected a token id or {IGNORE_INDEX}",
            labels[i]
        ));
    }
    Ok((input_ids, labels))
}

fn integers<T: TryFrom<i64>>(record: &Map<String, Value>, name: &str) -> Result<Vec<T>, String> {
    let value = column(record, name)?;
    let values = value
        .as_array()
        .ok_or_else(|| format!("`{name}` is {}, expected an array of integers", kind(value)))?;
    values
        .iter()
        .enumerate()
        .map(|(i, value)| {
            value
                .as_i64()
                .and_then(|number| T::try_from(number).ok())
                .ok_or_else(|| format!("`{name}[{i}]` is {value}, expected a token id"))
        })
        .collect()
}

/// The prompt is filled in one pass, so that braces in the data stay as they are.
fn alpaca(record: &Map<String, Value>) -> Result<(String, String), String> {
    let instruction = text(record, "instruction")?;
    let output = text(record, "output")?;
    let input = match record.get("input") {
        None => "",
        Some(_) => text(record, "input")?,
    };
    let prompt = if input.is_empty() {
        ALPACA_WITHOUT_INPUT
    } else {
        ALPACA_WITH_INPUT
    };
    let (before, after) = prompt
        .split_once("{instruction}")
        .expect("the prompt has an instruction");
    let source = format!(
        "{before}{instruction}{}",
        after.replacen("{input}", input, 1)
    );
    Ok((source, output.to_string()))
}

fn source_target(
    tokenizer: &Tokenizer,
    source: &str,
    target: &str,
    options: &LoadOptions,
) -> Result<(Vec<u32>, Vec<i64>), String> {
    let bos = tokenizer.bos_token().unwrap_or_default();
    let eos = tokenizer.eos_token().unwrap_or_default();
    let encode = |text: String, max_len: usize| -> Result<Vec<u32>, String> {
        let mut ids = tokenizer.encode(&text).map_err(|e| e.to_string())?;
        ids.truncate(max_len);
        Ok(ids)
    };
    let mut input_ids = encode(format!("{bos}{source}"), options.source_max_len)?;
    let target_ids = encode(format!("{target}{eos}"), options.target_max_len)?;
    let source_len = input_ids.len();
    input_ids.extend(target_ids);
    let mut labels: Vec<i64> = input_ids.iter().map(|&id| i64::from(id)).collect();
    if options.train_on_source == TrainOnSource::No {
        labels[..source_len].fill(IGNORE_INDEX);
    }
    Ok((input_ids, labels))
}

fn messages(
    record: &Map<String, Value>,
    tokenizer: &Tokenizer,
    options: &LoadOptions,
) -> Result<(Vec<u32>, Vec<i64>), String> {
    let value = column(record, "messages")?;
    let messages = value
        .as_array()
        .ok_or_else(|| format!("`messages` is {}, expected an array", kind(value)))?;
    check_messages(messages)?;
    let template = tokenizer.chat_template().ok_or(
        "the model has no chat template; add `chat_template` to its tokenizer_config.json or use dataset_format \
         input-output",
    )?;
    let chat = template
        .render_for_training(messages, record.get("tools"))
        .map_err(|e| e.to_string())?;
    let encoding = tokenizer
        .encode_with_offsets(&chat.text)
        .map_err(|e| e.to_string())?;
    let mut labels: Vec<i64> = encoding.ids.iter().map(|&id| i64::from(id)).collect();
    if options.train_on_source == TrainOnSource::No {
        let mask = encoding.mask(&chat.assistant);
        for (label, is_assistant) in labels.iter_mut().zip(mask) {
            if !is_assistant {
                *label = IGNORE_INDEX;
            }
        }
    }
    Ok((encoding.ids, labels))
}

fn check_messages(messages: &[Value]) -> Result<(), String> {
    if messages.is_empty() {
        return Err("`messages` is empty".into());
    }
    for (i, message) in messages.iter().enumerate() {
        let object = message
            .as_object()
            .ok_or_else(|| format!("`messages[{i}]` is {}, expected an object", kind(message)))?;
        for name in ["role", "content"] {
            match object.get(name) {
                Some(Value::String(_)) => {}
                Some(value) => {
                    return Err(format!(
                        "`messages[{i}].{name}` is {}, expected a string",
                        kind(value)
                    ));
                }
                None => return Err(format!("`messages[{i}]` has no `{name}`")),
            }
        }
    }
    Ok(())
}
