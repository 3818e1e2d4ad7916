//! Rows of a source and a target: which columns they come from, and the collator of qlora.py.
//!
//! Prompts, mapping and collator follow qlora.py (artidoro/qlora, July 2023): `bos + source` and `target + eos` are
//! tokenized apart and each is cut on the right. Super-Natural Instructions follow Wang et al. (arXiv:2204.07705): the
//! definition, as many of two positive examples as fit, and the input.

use serde_json::Value;

use super::columns::{Columns, kind, objects, optional, optional_text, text};
use super::{DatasetFormat, Tokenizer};

const ALPACA_WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an input that provides \
further context. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n\
### Input:\n{input}\n\n### Response: ";
const ALPACA_WITHOUT_INPUT: &str = "Below is an instruction that describes a task. Write a response that \
appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response: ";

const POSITIVE_EXAMPLES: usize = 2;

/// What is read and what is to be written after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SourceTarget {
    pub source: String,
    pub target: String,
}

impl SourceTarget {
    fn new(source: impl Into<String>, target: impl Into<String>) -> Self {
        Self {
            source: source.into(),
            target: target.into(),
        }
    }
}

/// The pairs of a row; more than one only for formats that keep several instances together.
///
/// `fits` says whether a source is short enough to take another example in.
pub(super) fn pairs(
    row: &Columns,
    format: DatasetFormat,
    fits: impl Fn(&str) -> Result<bool, String>,
) -> Result<Vec<SourceTarget>, String> {
    let columns = |source, target| -> Result<Vec<SourceTarget>, String> {
        Ok(vec![SourceTarget::new(
            text(row, source)?,
            text(row, target)?,
        )])
    };
    let only_target = |target| Ok(vec![SourceTarget::new("", text(row, target)?)]);
    match format {
        DatasetFormat::Alpaca => Ok(vec![alpaca(row)?]),
        DatasetFormat::InputOutput => columns("input", "output"),
        DatasetFormat::SelfInstruct => columns("prompt", "completion"),
        DatasetFormat::Flan => columns("inputs", "targets"),
        DatasetFormat::HhRlhf => only_target("chosen"),
        DatasetFormat::Oasst1 | DatasetFormat::Completion => only_target("text"),
        DatasetFormat::Chip2 => Ok(vec![chip2(text(row, "text")?)?]),
        DatasetFormat::UnnaturalInstructions => unnatural_instructions(row),
        DatasetFormat::SuperNaturalInstructions => super_natural_instructions(row, fits),
        DatasetFormat::Tokenized | DatasetFormat::Messages | DatasetFormat::Sharegpt => {
            Err(format!("{format} has no source and target"))
        }
    }
}

/// The prompt is filled in one pass, so that braces in the data stay as they are.
fn alpaca(row: &Columns) -> Result<SourceTarget, String> {
    let instruction = text(row, "instruction")?;
    let output = text(row, "output")?;
    let input = optional_text(row, "input")?;
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
    Ok(SourceTarget::new(source, output))
}

/// As in qlora.py, what follows a second `<bot>: ` is left out.
fn chip2(text: &str) -> Result<SourceTarget, String> {
    let mut parts = text.split("\n<bot>: ");
    match (parts.next(), parts.next()) {
        (Some(question), Some(answer)) => {
            Ok(SourceTarget::new(question.replace("<human>: ", ""), answer))
        }
        _ => Err("`text` has no line that starts with `<bot>: `".into()),
    }
}

/// The core set has `instances`, the full set `reformulations` of them too; flat copies have one instance to a row.
fn unnatural_instructions(row: &Columns) -> Result<Vec<SourceTarget>, String> {
    let pair = |row: &Columns| -> Result<SourceTarget, String> {
        Ok(SourceTarget::new(
            text(row, "instruction_with_input")?,
            text(row, "output")?,
        ))
    };
    if optional(row, "instances").is_none() {
        return Ok(vec![pair(row)?]);
    }
    let mut pairs = Vec::new();
    for name in ["instances", "reformulations"] {
        if optional(row, name).is_none() {
            continue;
        }
        for (i, instance) in objects(row, name)?.enumerate() {
            pairs.push(pair(instance?).map_err(|reason| format!("`{name}[{i}]`: {reason}"))?);
        }
    }
    Ok(pairs)
}

fn super_natural_instructions(
    row: &Columns,
    fits: impl Fn(&str) -> Result<bool, String>,
) -> Result<Vec<SourceTarget>, String> {
    let definition = format!(
        "{}\n\n",
        sentence(format!(
            "Definition: {}",
            first_text(row, "Definition")?.trim()
        ))
    );
    let mut examples = Vec::new();
    if optional(row, "Positive Examples").is_some() {
        for (i, example) in objects(row, "Positive Examples")?
            .take(POSITIVE_EXAMPLES)
            .enumerate()
        {
            let example = example?;
            let input = sentence(format!("Input: {}", text(example, "input")?.trim()));
            let output = sentence(format!("Output: {}", text(example, "output")?.trim()));
            examples.push(format!(
                " Positive Example {} -\n{input}\n {output}\n\n",
                i + 1
            ));
        }
    }
    let instances: Vec<&Columns> = match optional(row, "Instance") {
        Some(Value::Object(instance)) => vec![instance],
        Some(other) => return Err(format!("`Instance` is {}, expected an object", kind(other))),
        None => objects(row, "Instances")?.collect::<Result<_, _>>()?,
    };
    instances
        .into_iter()
        .map(|instance| {
            let input = sentence(format!("Input: {}", text(instance, "input")?.trim()));
            let task = format!("Now complete the following example -\n{input}\nOutput: ");
            let mut source = definition.clone();
            for example in &examples {
                if !fits(&format!("{source}{example}{task}"))? {
                    break;
                }
                source.push_str(example);
            }
            Ok(SourceTarget::new(
                source + &task,
                first_text(instance, "output")?,
            ))
        })
        .collect()
}

/// A text, or the first of a list of texts: of several right answers the first is taken.
fn first_text<'a>(row: &'a Columns, name: &str) -> Result<&'a str, String> {
    match row.get(name) {
        Some(Value::Array(texts)) => texts
            .first()
            .and_then(Value::as_str)
            .ok_or_else(|| format!("`{name}` is a list without a text at its beginning")),
        _ => text(row, name),
    }
}

/// With a full stop, unless it ends in punctuation already.
fn sentence(mut text: String) -> String {
    if !text.ends_with(|c: char| c.is_ascii_punctuation()) {
        text.push('.');
    }
    text
}

/// Token ids of a pair, before any cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SourceTargetIds {
    pub source: Vec<u32>,
    pub target: Vec<u32>,
}

/// `bos + source` and `target + eos`, tokenized apart.
pub(super) fn tokenize(
    tokenizer: &Tokenizer,
    pair: &SourceTarget,
) -> Result<SourceTargetIds, String> {
    let bos = tokenizer.bos_token().unwrap_or_default();
    let eos = tokenizer.eos_token().unwrap_or_default();
    let encode = |text: String| tokenizer.encode(&text).map_err(|e| e.to_string());
    Ok(SourceTargetIds {
        source: encode(format!("{bos}{}", pair.source))?,
        target: encode(format!("{}{eos}", pair.target))?,
    })
}
