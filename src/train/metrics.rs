//! `metrics.jsonl`: one JSON object per optimizer step and per evaluation, written out at once.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What happened in one optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Counted from 1: the number of optimizer steps done.
    pub step: usize,
    /// Passes over the training data so far.
    pub epoch: f64,
    /// Sum of the token losses over the number of labels, over all micro-batches of the step.
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    pub learning_rate: f64,
    /// Tokens that went through the model in this step.
    pub tokens: usize,
    pub tokens_per_second: f64,
    /// `None` where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
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
}

impl MetricsWriter {
    /// Starts an empty file; what was there is lost.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let file = File::create(&path).map_err(Error::io(&path))?;
        Ok(Self { path, file })
    }

    /// Opens a file, or starts one, and drops every record after `step`: what a run that is continued from there will
    /// write again. A last line that was cut short by a kill is dropped too.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Row`] for a line before the last that is not a record.
    pub fn truncate_after(path: impl AsRef<Path>, step: usize) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        if path.exists() {
            keep_until(&path, step)?;
        }
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(Error::io(&path))?;
        Ok(Self { path, file })
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

/// Rewrites the file with the records up to `step`, beside it first, so that a kill leaves the old or the new one.
fn keep_until(path: &Path, step: usize) -> Result<()> {
    #[derive(Deserialize)]
    struct AnyRecord {
        step: usize,
    }
    let mut reader = BufReader::new(File::open(path).map_err(Error::io(path))?);
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty());
    let mut kept = tempfile::NamedTempFile::new_in(directory.unwrap_or(Path::new(".")))
        .map_err(Error::io(path))?;
    let mut line = String::new();
    for number in 1.. {
        line.clear();
        let length = reader.read_line(&mut line).map_err(Error::io(path))?;
        if length == 0 || !line.ends_with('\n') {
            break;
        }
        let record: AnyRecord = serde_json::from_str(&line).map_err(|e| Error::Row {
            path: path.to_path_buf(),
            line: number,
            reason: format!("not a metrics record: {e}"),
        })?;
        if record.step <= step {
            kept.write_all(line.as_bytes()).map_err(Error::io(path))?;
        }
    }
    kept.as_file().sync_all().map_err(Error::io(path))?;
    kept.persist(path).map_err(|e| Error::io(path)(e.error))?;
    Ok(())
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
    fn a_line_that_is_no_record_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"step\":1}\nnonsense\n{\"step\":2}\n").unwrap();
        let error = MetricsWriter::truncate_after(&path, 2).unwrap_err();
        assert!(error.to_string().contains("metrics.jsonl:2:"), "{error}");
        assert!(std::fs::read_to_string(&path).unwrap().contains("nonsense"));
    }
}
