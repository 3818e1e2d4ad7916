//! `metrics.jsonl`: one JSON object per optimizer step and per evaluation, written out at once.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use crate::{Error, Result};

/// What happened in one optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Counted from 1: the number of optimizer steps done.
    pub step: usize,
    /// Passes over the training data so far.
    pub epoch: f64,
    /// Sum of the token losses over the number of labels, over all micro-batches of the step. NaN and infinities are `null`
    /// in JSON.
    #[serde(deserialize_with = "number_or_nan")]
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    #[serde(deserialize_with = "number_or_nan")]
    pub grad_norm: f64,
    pub learning_rate: f64,
    /// Tokens that went through the model in this step.
    pub tokens: usize,
    pub tokens_per_second: f64,
    /// `None` where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
    /// The lines of the data that made the step be skipped (`on_non_finite`); empty for a step that was taken.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped_rows: Vec<usize>,
}

fn number_or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// What an evaluation found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// The number of optimizer steps done.
    pub step: usize,
    pub eval_loss: f64,
    pub eval_perplexity: f64,
    pub eval_token_accuracy: f64,
}

/// Appends to a `metrics.jsonl`.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
    records: usize,
}

impl MetricsWriter {
    /// Starts an empty file; what was there is lost.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let file = File::create(&path).map_err(Error::io(&path))?;
        Ok(Self {
            path,
            file,
            records: 0,
        })
    }

    /// Opens a file, or starts one, and cuts it before the first record after `step`: what a run that is continued from
    /// there will write again. A last line that was cut short by a kill is cut off too.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Row`] for a line before the last that is not a record.
    pub fn truncate_after(path: impl AsRef<Path>, step: usize) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let file = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .open(&path)
            .map_err(Error::io(&path))?;
        let (records, bytes) = records_until(&path, &file, step)?;
        // Cut in place: the file never has a moment of being something else.
        file.set_len(bytes)
            .and_then(|()| file.sync_all())
            .map_err(Error::io(&path))?;
        Ok(Self {
            path,
            file,
            records,
        })
    }

    /// How many records the file had when it was opened.
    pub fn records(&self) -> usize {
        self.records
    }

    /// Whether the file was removed while it was written to.
    pub fn is_removed(&self) -> bool {
        self.file.metadata().is_ok_and(|file| file.nlink() == 0)
    }

    /// A handle to sync the file by.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn file(&self) -> Result<File> {
        self.file.try_clone().map_err(Error::io(&self.path))
    }

    /// Appends the record of a step.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_step(&mut self, record: &StepRecord) -> Result<()> {
        self.write_line(record)
    }

    /// Appends the record of an evaluation.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_eval(&mut self, record: &EvalRecord) -> Result<()> {
        self.write_line(record)
    }

    fn write_line(&mut self, record: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(record).map_err(std::io::Error::other);
        // One unbuffered write, so that a reader never sees half a line.
        line.and_then(|line| self.file.write_all(format!("{line}\n").as_bytes()))
            .map_err(Error::io(&self.path))
    }
}

/// How many complete records up to `step` the file begins with, and their bytes.
fn records_until(path: &Path, file: &File, step: usize) -> Result<(usize, u64)> {
    #[derive(Deserialize)]
    struct AnyRecord {
        step: usize,
    }
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    let mut bytes = 0;
    for records in 0.. {
        line.clear();
        let length = reader.read_until(b'\n', &mut line);
        let length = length.map_err(Error::io(path))?;
        if !line.ends_with(b"\n") {
            return Ok((records, bytes));
        }
        let record: AnyRecord = serde_json::from_slice(&line).map_err(|e| Error::Row {
            path: path.to_path_buf(),
            line: records + 1,
            reason: format!("not a metrics record: {e}"),
        })?;
        if record.step > step {
            return Ok((records, bytes));
        }
        bytes += length as u64;
    }
    unreachable!("a file ends")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: usize) -> StepRecord {
        StepRecord {
            step,
            epoch: 0.5,
            loss: 1.25,
            grad_norm: 0.1,
            learning_rate: 2e-4,
            tokens: 512,
            tokens_per_second: 100.0,
            peak_memory_bytes: Some(1 << 20),
            skipped_rows: Vec::new(),
        }
    }

    fn eval(step: usize) -> EvalRecord {
        EvalRecord {
            step,
            eval_loss: 1.0,
            eval_perplexity: 1f64.exp(),
            eval_token_accuracy: 0.5,
        }
    }

    fn steps_in(path: &Path) -> Vec<u64> {
        let text = std::fs::read_to_string(path).unwrap();
        let line = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap();
        text.lines()
            .map(|l| line(l)["step"].as_u64().unwrap())
            .collect()
    }

    #[test]
    fn a_line_is_on_disk_as_soon_as_it_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::create(&path).unwrap();
        writer.write_step(&step(1)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(serde_json::from_str::<StepRecord>(&text).unwrap(), step(1));
        writer.write_eval(&eval(1)).unwrap();
        assert_eq!(steps_in(&path), [1, 1]);
    }

    #[test]
    fn a_continued_run_drops_later_records_and_a_torn_last_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::create(&path).unwrap();
        for n in 1..=4 {
            writer.write_step(&step(n)).unwrap();
        }
        writer.write_eval(&eval(4)).unwrap();
        writer.file.write_all(b"{\"step\":2,\"ep").unwrap();
        drop(writer);

        let mut writer = MetricsWriter::truncate_after(&path, 2).unwrap();
        assert_eq!(steps_in(&path), [1, 2]);
        writer.write_step(&step(3)).unwrap();
        assert_eq!(steps_in(&path), [1, 2, 3]);
    }

    #[test]
    fn a_skipped_step_has_a_record_that_can_be_read() {
        let skipped = StepRecord {
            loss: f64::NAN,
            grad_norm: f64::INFINITY,
            skipped_rows: vec![3, 9],
            ..step(1)
        };
        let json = serde_json::to_string(&skipped).unwrap();
        assert!(json.contains(r#""loss":null"#) && json.contains(r#""skipped_rows":[3,9]"#));
        let read: StepRecord = serde_json::from_str(&json).unwrap();
        assert!(read.loss.is_nan() && read.skipped_rows == [3, 9]);
        let taken = serde_json::to_string(&step(1)).unwrap();
        assert!(!taken.contains("skipped_rows"));
    }

    #[test]
    fn a_line_that_is_no_record_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"step\":1}\nnonsense\n{\"step\":2}\n").unwrap();
        let error = MetricsWriter::truncate_after(&path, 2).unwrap_err();
        assert!(error.to_string().contains("metrics.jsonl:2:"), "{error}");
        assert!(std::fs::read_to_string(&path).unwrap().contains("nonsense"));
    }
}
