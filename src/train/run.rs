//! The run: step after step, evaluations and checkpoints between, until the end or until it is asked to stop.

use std::path::{Path, PathBuf};

use super::best_model::BestModelRule;
use super::checkpoint;
use super::checkpoint_writer::CheckpointWriter;
use super::config::{Resume, TrainConfig};
use super::initial_adapter;
use super::metrics::{EvalRecord, MetricsWriter, StepRecord};
use super::requests::Requests;
use super::run_lock::RunLock;
use super::trainer::Trainer;
use crate::store::{Adapter, AtomicFile, MatrixDropoutSettings, remove_leftovers};
use crate::{Error, Result};

/// The records of a run, in its directory.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// The resolved configuration of a run, in its directory.
pub const CONFIG_FILE: &str = "config.toml";

/// What a run tells while it goes on.
#[derive(Debug)]
pub enum Event<'a> {
    Step(&'a StepRecord),
    Evaluation(&'a EvalRecord),
    /// A checkpoint is complete and durable. It was begun at the latest step or before.
    Checkpoint(&'a Path),
    /// Something a user should know.
    Notice(&'a str),
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The final adapter is in the run directory.
    Finished,
    /// Stopped by the caller after this checkpoint.
    Stopped(PathBuf),
}

/// What a run writes to, and who listens.
struct Outputs<'o> {
    metrics: MetricsWriter,
    saves: CheckpointWriter,
    /// The checkpoint of the latest position that has one.
    newest: Option<PathBuf>,
    /// Whether the latest one could not be written.
    save_failed: bool,
    /// Whether the rows are being evaluated after a step, rather than a step done.
    evaluates: bool,
    observe: &'o mut dyn FnMut(Event<'_>),
}

impl Trainer {
    /// Trains to the end, or until it is asked to stop: evaluates, saves, and keeps the run directory. A stop, and a
    /// checkpoint that is asked for, come between two micro-batches.
    ///
    /// # Errors
    /// Those of [`step`](Self::step), and of writing. [`Error::Locked`] if another run is at work in the directory.
    /// Where the error left the state of before the step, it is saved first.
    pub fn run<'a>(
        &mut self,
        requests: impl Into<Requests<'a>>,
        mut observe: impl FnMut(Event<'_>),
    ) -> Result<Outcome> {
        let requests = requests.into();
        let dir = self.config.output_dir.clone();
        self.expect_no_other_run()?;
        std::fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
        let _lock = RunLock::acquire(&dir)?;
        let mut outputs = self.open_outputs(&dir, &mut observe)?;
        self.remove_earlier_end(&dir)?;
        let ended = self.train(&requests, &mut outputs);
        if let Err(error) = &ended {
            self.save_from_before(error, &mut outputs);
        }
        let saved = outputs.report_last_checkpoint();
        let listed = checkpoint::list(&dir).map(|list| self.known_checkpoints = list);
        let is_finished = match (ended, saved.and(listed)) {
            // The error that ended the run is the one to tell.
            (Err(error), second) => {
                outputs.note_second(second);
                return Err(error);
            }
            (ended, saved) => saved.and(ended)?,
        };
        if !is_finished {
            let newest = outputs.newest.take();
            return Ok(Outcome::Stopped(
                newest.expect("a run is stopped after it was saved"),
            ));
        }
        self.expect_base_unchanged()?;
        self.take_best_model(&mut outputs)?;
        MatrixDropoutSettings::write(self.matrix_dropout.as_ref(), &dir)?;
        let adapter = self.decoder.adapter(&self.adapter_config)?;
        adapter.write(&dir)?;
        self.convert(&adapter, &mut outputs)?;
        Ok(Outcome::Finished)
    }

    /// The adapter that a run had ended with is not that of the run that goes on; its last checkpoint has it.
    fn remove_earlier_end(&self, dir: &Path) -> Result<()> {
        let goes_on = self.resumed.is_some() && self.state.global_step < self.total_steps;
        match goes_on && self.config.adapter.as_deref() != Some(dir) {
            true => Adapter::remove(dir),
            false => Ok(()),
        }
    }

    /// An adapter that began with weights of the base is of use to nobody without that base: writes it for the original
    /// model as well.
    fn convert(&self, adapter: &Adapter, outputs: &mut Outputs<'_>) -> Result<()> {
        let (model, dir) = (&self.config.model_name_or_path, &self.config.output_dir);
        let notice = match initial_adapter::write_converted(model, adapter, dir) {
            Ok(None) => return Ok(()),
            Ok(Some(converted)) => format!(
                "the adapter is for {}; {} has it for the original model",
                model.display(),
                converted.display()
            ),
            Err(Error::TensorMismatch {
                expected, found, ..
            }) => format!(
                "the adapter is for {} alone: to be converted it has to have {expected}, and has {found}",
                model.display()
            ),
            Err(error) => return Err(error),
        };
        (outputs.observe)(Event::Notice(&notice));
        Ok(())
    }

    /// Trains until all steps are done (`true`) or a stop was asked for and the state is saved (`false`).
    fn train(&mut self, requests: &Requests<'_>, outputs: &mut Outputs<'_>) -> Result<bool> {
        let best_model = BestModelRule::from_config(&self.config);
        while self.state.global_step < self.total_steps {
            outputs.report_finished_checkpoint()?;
            let Some(record) = self.step_unless(|| requests.is_any_set())? else {
                let stops = requests.stops();
                if requests.takes_save() || stops {
                    self.save(outputs)?;
                }
                if stops {
                    return Ok(false);
                }
                continue;
            };
            outputs.metrics.write_step(&record)?;
            self.state.metrics_records += 1;
            (outputs.observe)(Event::Step(&record));
            let is_last = record.step == self.total_steps;
            let is_due = |every: usize| is_last || record.step.is_multiple_of(every);
            outputs.evaluates = is_due(self.config.eval_steps.unwrap_or(self.total_steps));
            if outputs.evaluates
                && let Some(record) = self.evaluate()?
            {
                outputs.metrics.write_eval(&record)?;
                self.state.metrics_records += 1;
                if let Some(rule) = best_model
                    && is_due(self.config.save_steps)
                {
                    let name = self.state.checkpoint_name();
                    let better = rule.better(self.state.best.as_ref(), &record, &name);
                    self.state.best = better.or(self.state.best.take());
                }
                (outputs.observe)(Event::Evaluation(&record));
            }
            outputs.evaluates = false;
            let stops = requests.stops() && !is_last;
            if requests.takes_save() || stops || is_due(self.config.save_steps) {
                self.save(outputs)?;
            }
            if stops {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes a checkpoint of where the run stands, and waits until it is durable.
    ///
    /// # Errors
    /// Those of [`checkpoint`](Self::checkpoint) and [`checkpoint::write`].
    pub fn save_checkpoint(&self) -> Result<PathBuf> {
        checkpoint::write(&self.disk, &self.config.output_dir, &self.checkpoint()?)
    }

    /// Starts a checkpoint, unless there is one of this position.
    fn save(&mut self, outputs: &mut Outputs<'_>) -> Result<()> {
        let path = self.config.output_dir.join(self.state.checkpoint_name());
        if outputs.newest.as_ref() == Some(&path) && !outputs.save_failed {
            return Ok(());
        }
        outputs.report_last_checkpoint()?;
        let checkpoint = self.checkpoint()?;
        outputs.saves.start(checkpoint, outputs.metrics.file()?)?;
        outputs.newest = Some(path);
        // A directory that was removed under the run has the state again, but not the records.
        if outputs.metrics.is_removed() {
            outputs.report_last_checkpoint()?;
            let gone = std::io::Error::from(std::io::ErrorKind::NotFound);
            return Err(Error::io(self.config.output_dir.join(METRICS_FILE))(gone));
        }
        Ok(())
    }

    /// Saves the state where the run ended with all of it: before a step that failed without changing it, and after a
    /// checkpoint that could not be written, once more. Not where an evaluation failed, which would be left out for good.
    fn save_from_before(&mut self, error: &Error, outputs: &mut Outputs<'_>) {
        let failed_before_update = !outputs.evaluates
            && matches!(
                error,
                Error::NonFiniteStep { .. } | Error::OutOfDeviceMemory { .. }
            );
        if !failed_before_update && !outputs.save_failed {
            return;
        }
        let saved = self.save(outputs);
        let saved = saved.and_then(|()| outputs.report_last_checkpoint());
        outputs.note_second(saved);
    }

    fn open_outputs<'o>(
        &self,
        dir: &Path,
        observe: &'o mut dyn FnMut(Event<'_>),
    ) -> Result<Outputs<'o>> {
        if checkpoint::list(dir)? != self.known_checkpoints {
            let reason = format!(
                "another run has written to {} meanwhile; start again",
                dir.display()
            );
            return Err(Error::config("output_dir", reason));
        }
        remove_leftovers(dir)?;
        for aside in checkpoint::set_aside_after(dir, &self.state)? {
            let notice = format!("set aside as {}", aside.display());
            observe(Event::Notice(&notice));
        }
        if self.resumed.is_some() {
            // What a run that was killed before its cleanup left.
            self.prune(dir)?;
        }
        // What does the run again from its start, and consents to nothing.
        let from_start = TrainConfig {
            resume_from_checkpoint: Resume::Never,
            resume_with_changes: false,
            ..self.config.clone()
        };
        AtomicFile::write(dir.join(CONFIG_FILE), from_start.resolved_toml()?)?;
        let path = dir.join(METRICS_FILE);
        let metrics = match self.resumed.is_some() || self.state.global_step > 0 {
            false => MetricsWriter::create(path)?,
            true => {
                let metrics = MetricsWriter::truncate_after(&path, self.state.global_step)?;
                let missing = self.state.metrics_records.abs_diff(metrics.records());
                if missing > 0 {
                    let notice = format!(
                        "{}: has {} records up to step {}, there were {}",
                        path.display(),
                        metrics.records(),
                        self.state.global_step,
                        self.state.metrics_records
                    );
                    observe(Event::Notice(&notice));
                }
                metrics
            }
        };
        let here = dir.join(self.state.checkpoint_name());
        Ok(Outputs {
            metrics,
            saves: CheckpointWriter::new(
                self.disk.clone(),
                dir.to_path_buf(),
                self.config.save_total_limit,
            ),
            newest: self.known_checkpoints.contains(&here).then_some(here),
            save_failed: false,
            evaluates: false,
            observe,
        })
    }

    fn prune(&self, dir: &Path) -> Result<()> {
        let best = self.state.best.as_ref();
        let best = best.map(|best| best.best_model_checkpoint.as_str());
        checkpoint::prune(&*self.disk, dir, self.config.save_total_limit, best)
    }

    /// A new run does not mix its checkpoints with those of an earlier one.
    fn expect_no_other_run(&self) -> Result<()> {
        match self.known_checkpoints.last() {
            Some(path) if self.resumed.is_none() && self.state.global_step == 0 => {
                let reason = format!(
                    "{} is from an earlier run; continue it with resume_from_checkpoint, or choose another directory",
                    path.display()
                );
                Err(Error::config("output_dir", reason))
            }
            _ => Ok(()),
        }
    }

    /// Loads the adapter of the best checkpoint, if the run is to end with it.
    fn take_best_model(&mut self, outputs: &mut Outputs<'_>) -> Result<()> {
        let Some(best) = &self.state.best else {
            return Ok(());
        };
        if !self.config.load_best_model_at_end {
            return Ok(());
        }
        let dir = self.config.output_dir.join(&best.best_model_checkpoint);
        let notice = format!(
            "the final adapter is that of {}, metric {}",
            dir.display(),
            best.best_metric
        );
        self.decoder
            .load_adapter(&checkpoint::read(&dir)?.adapter)?;
        (outputs.observe)(Event::Notice(&notice));
        Ok(())
    }
}

impl Outputs<'_> {
    /// Tells of a failure to save beside the error that ended the run.
    fn note_second(&mut self, saved: Result<()>) {
        if let Err(second) = saved {
            let notice = format!("the state could not be saved: {second}");
            (self.observe)(Event::Notice(&notice));
        }
    }

    fn report_finished_checkpoint(&mut self) -> Result<()> {
        let finished = self.saves.finished();
        self.report(finished)
    }

    fn report_last_checkpoint(&mut self) -> Result<()> {
        let last = self.saves.wait();
        self.report(last)
    }

    fn report(&mut self, checkpoint: Result<Option<PathBuf>>) -> Result<()> {
        self.save_failed = checkpoint.is_err();
        if let Some(path) = checkpoint? {
            (self.observe)(Event::Checkpoint(&path));
        }
        Ok(())
    }
}
