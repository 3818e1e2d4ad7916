//! Taking up a run where a checkpoint left it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;

use super::best_model::BestModelRule;
use super::checkpoint::{self, Checkpoint};
use super::config::{Resume, expect_same_adapter, other_adapter};
use super::matrix_dropout;
use super::optimizer::Optimizer;
use super::schedule::Schedule;
use super::trainer::{Trainer, does_not_fit};
use crate::quant::DenseTensor;
use crate::store::AdapterConfig;
use crate::{Error, Result};

/// How a run was taken up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resumed {
    pub checkpoint: PathBuf,
    /// What is wrong with the newer checkpoints.
    pub damaged: Vec<String>,
    /// What is different from the run that wrote the checkpoint (`resume_with_changes`).
    pub changes: Vec<String>,
}

impl Trainer {
    /// Takes up the checkpoint that the configuration names, if it does.
    pub(super) fn resume(&mut self) -> Result<()> {
        self.known_checkpoints = checkpoint::list(&self.config.output_dir)?;
        let (dir, checkpoint, damaged) = match &self.config.resume_from_checkpoint {
            Resume::Never => return Ok(()),
            Resume::From(dir) => (dir.clone(), checkpoint::read(dir)?, Vec::new()),
            Resume::Latest => newest_complete(&self.config.output_dir, &self.known_checkpoints)?,
        };
        let found = &checkpoint.adapter.config;
        if self.config.adapter.is_none() {
            let model = self.decoder.config();
            expect_same_adapter(&self.adapter_config, found, &dir, model)?;
        }
        expect_same_dropout(found, &self.adapter_config, &dir)?;
        matrix_dropout::expect_same(
            checkpoint.matrix_dropout.as_ref(),
            self.matrix_dropout.as_ref(),
            &dir,
        )?;
        let changes = self.changes_since(&checkpoint)?;
        if !changes.is_empty() && !self.config.resume_with_changes {
            let reason = format!(
                "{} is of another run: {}; resume_with_changes = true continues all the same",
                dir.display(),
                changes.join("; ")
            );
            return Err(Error::config("resume_from_checkpoint", reason));
        }
        if checkpoint.state.partial_step.is_some()
            && !self.fingerprint.has_batches_of(&checkpoint.fingerprint)
        {
            let reason = format!(
                "{} was saved within a step, whose micro-batches are others now; continue from a checkpoint between two steps",
                dir.display()
            );
            return Err(Error::config("resume_from_checkpoint", reason));
        }
        self.take_up(&dir, checkpoint)?;
        let mut damaged = damaged;
        if let Some(best) = &self.state.best {
            let best = self.config.output_dir.join(&best.best_model_checkpoint);
            if !best.is_dir() {
                damaged.push(format!(
                    "{}: the best checkpoint is not there",
                    best.display()
                ));
                self.state.best = None;
            }
        }
        if let (Some(best), Some(rule)) =
            (&self.state.best, BestModelRule::from_config(&self.config))
            && !rule.is_of(best)
        {
            // Numbers of two metrics cannot be compared.
            self.state.best = None;
        }
        self.resumed = Some(Resumed {
            checkpoint: dir,
            damaged,
            changes,
        });
        Ok(())
    }

    fn changes_since(&self, checkpoint: &Checkpoint) -> Result<Vec<String>> {
        let mut changes = self.fingerprint.changes_since(&checkpoint.fingerprint)?;
        let state = &checkpoint.state;
        let before = Schedule {
            total_steps: state.total_steps,
            ..Schedule::from_config(&self.config, state.total_steps)
        };
        // A change of learning_rate is told as that.
        let other_rate = (0..self.total_steps.min(state.total_steps))
            .find(|&step| self.schedule.learning_rate(step) != before.learning_rate(step));
        if let Some(step) = other_rate {
            changes.push(format!(
                "the run has {} steps, it had {}: the learning rate of step {} is {:e}, it was {:e}",
                self.total_steps,
                state.total_steps,
                step + 1,
                self.schedule.learning_rate(step),
                before.learning_rate(step)
            ));
        }
        Ok(changes)
    }

    fn take_up(&mut self, dir: &Path, checkpoint: Checkpoint) -> Result<()> {
        let adapter = checkpoint.adapter;
        self.expect_position(&checkpoint.state, dir)?;
        self.decoder
            .load_adapter(&adapter)
            .map_err(does_not_fit(dir))?;
        self.adapter_config = adapter.config;
        if !self.optimizer.is_of(&self.decoder) {
            self.optimizer = Optimizer::new(&self.config, &self.decoder)?;
        }
        self.optimizer
            .restore(checkpoint.state.optimizer_updates, &checkpoint.moments)?;
        if checkpoint.state.partial_step.is_some() {
            self.restore_gradients(&checkpoint.gradients)?;
        }
        self.state = checkpoint.state;
        self.state.total_steps = self.total_steps;
        Ok(())
    }

    /// A position that this run could have come to.
    fn expect_position(&self, state: &checkpoint::TrainerState, dir: &Path) -> Result<()> {
        let partial = state
            .partial_step
            .map_or(0, |partial| partial.micro_batches);
        if partial > 0 && partial >= self.config.gradient_accumulation_steps {
            let reason = format!(
                "was saved after micro-batch {partial} of a step, of which there are {} now; continue from a checkpoint between two steps",
                self.config.gradient_accumulation_steps
            );
            return Err(Error::malformed(dir, reason));
        }
        // Beyond it, positions would not be whole numbers in JSON's floating point.
        const LARGEST: u64 = 1 << 53;
        if state.examples_seen > LARGEST || state.global_step as u64 > LARGEST {
            return Err(Error::malformed(dir, "has a position that no run comes to"));
        }
        Ok(())
    }

    /// The gradients by the name of their tensor.
    pub(super) fn gradients(&self) -> Result<BTreeMap<String, DenseTensor>> {
        let parameters = self.decoder.parameters();
        let named = parameters.slots().iter().map(|slot| {
            let gradient = slot.view(parameters.grads())?;
            let values: Vec<f32> = gradient.flatten_all()?.to_vec1()?;
            let gradient = DenseTensor::from_f32(gradient.dims().to_vec(), &values);
            Ok((slot.name.clone(), gradient))
        });
        named.collect()
    }

    fn restore_gradients(&self, stored: &BTreeMap<String, DenseTensor>) -> Result<()> {
        let parameters = self.decoder.parameters();
        for slot in parameters.slots() {
            let gradient = slot.view(parameters.grads())?;
            let stored = checkpoint::expect_f32(stored, &slot.name, gradient.dims())?;
            let values =
                Tensor::from_vec(stored.to_f32_vec(), gradient.shape(), gradient.device())?;
            gradient.slice_set(&values, 0, 0)?;
        }
        Ok(())
    }
}

/// The newest checkpoint that can be read, and what is wrong with those after it.
fn newest_complete(
    run_dir: &Path,
    checkpoints: &[PathBuf],
) -> Result<(PathBuf, Checkpoint, Vec<String>)> {
    let mut damaged = Vec::new();
    for dir in checkpoints.iter().rev() {
        match checkpoint::read(dir) {
            Ok(checkpoint) => return Ok((dir.clone(), checkpoint, damaged)),
            Err(error) => damaged.push(error.to_string()),
        }
    }
    let reason = match damaged.is_empty() {
        true => format!("there is no checkpoint in {}", run_dir.display()),
        false => format!(
            "no checkpoint in {} is complete: {}",
            run_dir.display(),
            damaged.join("; ")
        ),
    };
    Err(Error::config("resume_from_checkpoint", reason))
}

/// A run cannot go on with other masks and still end as if it had never stopped.
fn expect_same_dropout(
    found: &AdapterConfig,
    configured: &AdapterConfig,
    dir: &Path,
) -> Result<()> {
    let (found, configured) = (found.lora_dropout, configured.lora_dropout);
    if found == configured {
        return Ok(());
    }
    let [configured, found] = [configured, found].map(|p| p.to_string());
    Err(other_adapter("lora_dropout", &configured, &found, dir))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::Arc;

    use super::*;
    use crate::device::Placement;
    use crate::store::{Disk, SystemDisk};
    use crate::train::TrainConfig;

    const STEPS: usize = 2;
    const MICRO_BATCHES: usize = 3;

    fn trainer(output_dir: &Path, resume_from_checkpoint: Resume) -> Trainer {
        let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/engine/llama_gqa");
        let config = TrainConfig {
            dataset: case.join("train/data.jsonl").into(),
            model_name_or_path: case,
            output_dir: output_dir.to_path_buf(),
            lora_r: Some(4),
            learning_rate: 5e-3,
            per_device_train_batch_size: 2,
            gradient_accumulation_steps: MICRO_BATCHES,
            max_steps: STEPS as i64,
            resume_from_checkpoint,
            ..TrainConfig::default()
        };
        Trainer::new(config, &Placement::cpu()).unwrap()
    }

    /// The losses of the steps that are left, and the adapter at the end.
    fn finish(mut trainer: Trainer) -> (Vec<u64>, Vec<Vec<u8>>) {
        let mut losses = Vec::new();
        while trainer.steps_done() < trainer.total_steps() {
            losses.push(trainer.step().unwrap().loss.to_bits());
        }
        let tensors = trainer.checkpoint().unwrap().adapter.tensors;
        let bytes = tensors.values().map(|tensor| tensor.data.to_vec());
        (losses, bytes.collect())
    }

    #[test]
    fn a_run_continues_from_any_micro_batch_with_the_same_bits() {
        let dir = tempfile::tempdir().unwrap();
        let whole = finish(trainer(dir.path(), Resume::Never));
        let disk: Arc<dyn Disk> = Arc::new(SystemDisk);
        for done in 1..STEPS * MICRO_BATCHES {
            let mut stopped = trainer(dir.path(), Resume::Never);
            for _ in 0..done / MICRO_BATCHES {
                stopped.step().unwrap();
            }
            let within = done % MICRO_BATCHES;
            if within > 0 {
                let asked = Cell::new(0);
                let pauses = || {
                    asked.set(asked.get() + 1);
                    asked.get() == within
                };
                assert_eq!(stopped.step_unless(pauses).unwrap(), None);
                assert_eq!(stopped.state.partial_step.unwrap().micro_batches, within);
            }
            let saved = stopped.checkpoint().unwrap();
            drop(stopped);
            let path = checkpoint::write(&disk, dir.path(), &saved).unwrap();
            let (losses, adapter) = finish(trainer(dir.path(), Resume::From(path)));
            assert_eq!(losses, whole.0[done / MICRO_BATCHES..], "after {done}");
            assert!(adapter == whole.1, "after {done}");
        }
    }

    #[test]
    fn a_step_that_was_divided_otherwise_is_not_continued_within() {
        let dir = tempfile::tempdir().unwrap();
        let mut stopped = trainer(dir.path(), Resume::Never);
        let asked = Cell::new(0);
        let at_the_second = || asked.replace(asked.get() + 1) == 1;
        assert_eq!(stopped.step_unless(at_the_second).unwrap(), None);
        let disk: Arc<dyn Disk> = Arc::new(SystemDisk);
        let saved = stopped.checkpoint().unwrap();
        let path = checkpoint::write(&disk, dir.path(), &saved).unwrap();
        assert!(path.ends_with("checkpoint-0.2"));
        // Fewer, as many rows in smaller ones, and other rows.
        for (rows, micro_batches, data_seed) in [(2, 2, 42), (1, 6, 42), (2, 3, 43)] {
            let config = TrainConfig {
                per_device_train_batch_size: rows,
                gradient_accumulation_steps: micro_batches,
                data_seed,
                resume_from_checkpoint: Resume::From(path.clone()),
                resume_with_changes: true,
                ..stopped.config().clone()
            };
            let error = Trainer::new(config, &Placement::cpu()).err().unwrap();
            assert!(error.to_string().contains("saved within a step"), "{error}");
        }
    }
}
