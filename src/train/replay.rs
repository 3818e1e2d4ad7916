//! Doing steps of a run again from one of its checkpoints: the records and the bytes must be those that it left.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::checkpoint::{self, Checkpoint};
use super::config::{Resume, TrainConfig};
use super::metrics::StepRecord;
use super::run::METRICS_FILE;
use super::trainer::Trainer;
use crate::device::Placement;
use crate::quant::DenseTensor;
use crate::store::Adapter;
use crate::{Error, Result};

/// What is replayed.
#[derive(Debug, Clone, Default)]
pub struct ReplayOptions {
    /// Where to begin; unset: the newest checkpoint that has one after it, or else the start of the run.
    pub checkpoint: Option<PathBuf>,
    /// Optimizer steps; unset: up to the next checkpoint, or else to the end of the records.
    pub steps: Option<usize>,
}

/// What a replay was held against, and what came out otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReplayReport {
    /// `None` for the start of the run.
    pub from: Option<PathBuf>,
    pub first_step: usize,
    pub last_step: usize,
    /// Records of `metrics.jsonl`.
    pub records: usize,
    /// Tensors of checkpoints and of the final adapter.
    pub tensors: usize,
    /// A line each; none for a run that repeats bit for bit.
    pub differences: Vec<String>,
}

/// The records of a run that are not about time and memory, by their step.
#[derive(Debug, Default)]
struct Records {
    steps: BTreeMap<usize, Value>,
    evaluations: BTreeMap<usize, Value>,
}

/// Replays steps of the run that `config` describes, in its `output_dir`. Nothing is written.
///
/// # Errors
/// Those of [`Trainer::new`] and [`Trainer::step`]; [`Error::Row`] for a record that cannot be read; [`Error::Config`] if
/// there is no step to replay. A difference is not an error.
pub fn replay(
    config: TrainConfig,
    options: &ReplayOptions,
    placement: &Placement,
) -> Result<ReplayReport> {
    let dir = config.output_dir.clone();
    let records = Records::read(&dir.join(METRICS_FILE))?;
    let checkpoints = checkpoint::list(&dir)?;
    let from = options
        .checkpoint
        .clone()
        .or_else(|| match checkpoints[..] {
            [.., ref before, _] => Some(before.clone()),
            _ => None,
        });
    let mut trainer = Trainer::new(
        TrainConfig {
            resume_from_checkpoint: from.clone().map_or(Resume::Never, Resume::From),
            ..config
        },
        placement,
    )?;
    let start = trainer.steps_done();
    let recorded = records.steps.keys().next_back().copied().unwrap_or(0);
    let end = match options.steps {
        Some(steps) => start.saturating_add(steps),
        None => next_checkpoint(&checkpoints, start).unwrap_or(recorded),
    };
    let end = end.min(recorded);
    if end <= start {
        let reason = format!(
            "{} has no record of a step after {start}",
            dir.join(METRICS_FILE).display()
        );
        return Err(Error::config("output_dir", reason));
    }
    let mut report = ReplayReport {
        from,
        first_step: start + 1,
        last_step: end,
        records: 0,
        tensors: 0,
        differences: Vec::new(),
    };
    while trainer.steps_done() < end {
        let record = trainer.step()?;
        report.compare_record(
            &record,
            records.steps.get(&record.step),
            &record_what(&record),
        )?;
        if let Some(recorded) = records.evaluations.get(&record.step)
            && let Some(evaluation) = trainer.evaluate()?
        {
            let what = format!("evaluation after step {}", record.step);
            report.compare_record(&evaluation, Some(recorded), &what)?;
        }
        let here = trainer.checkpoint()?;
        let recorded = dir.join(here.state.checkpoint_name());
        if checkpoints.contains(&recorded) {
            report.compare_checkpoint(&here, &checkpoint::read(&recorded)?);
        }
    }
    let is_final = end == trainer.total_steps() && !trainer.config().load_best_model_at_end;
    if is_final && Adapter::exists(&dir) {
        let found = trainer.checkpoint()?.adapter;
        let expected = Adapter::read(&dir)?;
        report.compare_tensors("final adapter", &found.tensors, &expected.tensors);
    }
    Ok(report)
}

fn record_what(record: &StepRecord) -> String {
    format!("step {}", record.step)
}

/// The steps of the first checkpoint after `start`.
fn next_checkpoint(checkpoints: &[PathBuf], start: usize) -> Option<usize> {
    let steps = checkpoints
        .iter()
        .filter_map(|path| checkpoint::whole_steps(path));
    steps.filter(|&steps| steps > start).min()
}

impl ReplayReport {
    fn compare_record(
        &mut self,
        found: &impl Serialize,
        expected: Option<&Value>,
        what: &str,
    ) -> Result<()> {
        let Some(expected) = expected else {
            self.differences.push(format!("{what}: there is no record"));
            return Ok(());
        };
        // Through text, as the recorded one went.
        let text = serde_json::to_string(found);
        let found = text.and_then(|text| serde_json::from_str(&text));
        let found = without_time_and_memory(
            found.map_err(|error| Error::malformed(METRICS_FILE, error.to_string()))?,
        );
        self.records += 1;
        let keys = |value: &Value| match value {
            Value::Object(map) => map.keys().cloned().collect::<Vec<_>>(),
            _ => Vec::new(),
        };
        let mut all_keys = keys(&found);
        all_keys.extend(keys(expected));
        all_keys.sort_unstable();
        all_keys.dedup();
        for key in all_keys {
            if found[&key] != expected[&key] {
                self.differences.push(format!(
                    "{what}: {key} is {}, recorded was {}",
                    found[&key], expected[&key]
                ));
            }
        }
        Ok(())
    }

    fn compare_checkpoint(&mut self, found: &Checkpoint, expected: &Checkpoint) {
        let name = expected.state.checkpoint_name();
        self.compare_tensors(&name, &found.adapter.tensors, &expected.adapter.tensors);
        self.compare_tensors(&name, &found.moments, &expected.moments);
        let position = |checkpoint: &Checkpoint| {
            (
                checkpoint.state.examples_seen,
                checkpoint.state.optimizer_updates,
                checkpoint.state.skipped_in_a_row,
            )
        };
        if position(found) != position(expected) {
            self.differences.push(format!("{name}: another position"));
        }
    }

    fn compare_tensors(
        &mut self,
        what: &str,
        found: &BTreeMap<String, DenseTensor>,
        expected: &BTreeMap<String, DenseTensor>,
    ) {
        self.tensors += expected.len();
        for (name, expected) in expected {
            let is_same = found.get(name).is_some_and(|found| {
                found.dtype == expected.dtype
                    && found.shape == expected.shape
                    && found.data == expected.data
            });
            if !is_same {
                self.differences.push(format!("{what}: `{name}` differs"));
            }
        }
        let new = found.keys().filter(|name| !expected.contains_key(*name));
        self.differences
            .extend(new.map(|name| format!("{what}: `{name}` was not there")));
    }
}

impl Records {
    fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let mut records = Self::default();
        for (number, line) in text.lines().enumerate() {
            let malformed = |reason: String| Error::Row {
                path: path.to_path_buf(),
                line: number + 1,
                reason: format!("not a metrics record: {reason}"),
            };
            let value: Value = serde_json::from_str(line).map_err(|e| malformed(e.to_string()))?;
            let step = value["step"].as_u64().and_then(|s| usize::try_from(s).ok());
            let step = step.ok_or_else(|| malformed("it has no step".into()))?;
            // Also one whose numbers are none, which JSON has no word for.
            let kind = match value.get("eval_loss").is_some() {
                true => &mut records.evaluations,
                false => &mut records.steps,
            };
            kind.insert(step, without_time_and_memory(value));
        }
        Ok(records)
    }
}

fn without_time_and_memory(mut record: Value) -> Value {
    if let Value::Object(keys) = &mut record {
        keys.retain(|key, _| key != "tokens_per_second" && key != "peak_memory_bytes");
    }
    record
}
