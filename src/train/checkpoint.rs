//! `checkpoint-N/`: what a run needs to go on after step N as if it had never stopped.
//!
//! A PEFT adapter (the f32 master weights), `optimizer.safetensors` (the moments), `trainer_state.json`, and
//! `manifest.json` with the SHA-256 of each. Everything else is a function of the config and of the position. One that was
//! saved between the micro-batches of a step is `checkpoint-N.M`, after micro-batch M of step N + 1, and has
//! `gradients.safetensors` too: the sums so far. The directory appears complete or not at all.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::DType;
use serde::{Deserialize, Serialize};

use super::best_model::BestModel;
use super::fingerprint::Fingerprint;
use crate::quant::DenseTensor;
use crate::store::{
    Adapter, AtomicDir, Disk, Existing, Initialization, Manifest, ManifestWriter, MappedFile,
    MatrixDropoutSettings, remove_dir, write_tensors,
};
use crate::{Error, Result};

const PREFIX: &str = "checkpoint-";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const GRADIENTS_FILE: &str = "gradients.safetensors";
const STATE_FILE: &str = "trainer_state.json";
/// Before the name of a checkpoint that a continued run does not build upon.
const SUPERSEDED: &str = "superseded-";

/// Where a run stands; key names as in transformers where it has them.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct TrainerState {
    /// Optimizer steps done.
    pub global_step: usize,
    /// Optimizer steps of the whole run.
    #[serde(rename = "max_steps")]
    pub total_steps: usize,
    /// Passes over the training data so far.
    pub epoch: f64,
    /// Position in the order of rows, of the first sequence of the step at hand. A packed one counts as one.
    pub examples_seen: u64,
    /// Updates of the optimizer: the steps that were not skipped.
    pub optimizer_updates: usize,
    /// Steps skipped since the last update.
    pub skipped_in_a_row: usize,
    /// Lines of `metrics.jsonl` so far.
    pub metrics_records: usize,
    /// What of the step at hand is done, if a part of it is.
    pub partial_step: Option<PartialStep>,
    #[serde(flatten)]
    pub best: Option<BestModel>,
}

/// A step of which some micro-batches are done.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PartialStep {
    pub micro_batches: usize,
    /// Of the token losses of these micro-batches.
    pub loss_sum: f64,
}

/// All that a checkpoint holds, in host memory.
#[derive(Debug)]
pub struct Checkpoint {
    pub state: TrainerState,
    pub fingerprint: Fingerprint,
    pub adapter: Adapter,
    /// How the adapter's matrices are masked, if they are.
    pub matrix_dropout: Option<MatrixDropoutSettings>,
    /// Which weights the adapter is a change of, where those are not the original ones.
    pub initialization: Option<Initialization>,
    pub moments: BTreeMap<String, DenseTensor>,
    /// Of the micro-batches of [`TrainerState::partial_step`].
    pub gradients: BTreeMap<String, DenseTensor>,
}

#[derive(Serialize, Deserialize)]
struct StateFile {
    #[serde(flatten)]
    state: TrainerState,
    fingerprint: Fingerprint,
}

impl TrainerState {
    /// The name of a checkpoint at this position.
    pub fn checkpoint_name(&self) -> String {
        match self.partial_step {
            None => format!("{PREFIX}{}", self.global_step),
            Some(partial) => format!("{PREFIX}{}.{}", self.global_step, partial.micro_batches),
        }
    }
}

/// Writes a checkpoint into `run_dir`, in place of one of its name, and gives its path. When this returns, it survives a
/// loss of power.
///
/// # Errors
/// [`Error::Io`]; there is no new directory then.
pub fn write(disk: &Arc<dyn Disk>, run_dir: &Path, checkpoint: &Checkpoint) -> Result<PathBuf> {
    let path = run_dir.join(checkpoint.state.checkpoint_name());
    let dir = AtomicDir::create_on(Arc::clone(disk), &path, Existing::Replace)?;
    let mut dir = ManifestWriter::new(dir);
    checkpoint.adapter.write_into(&mut dir)?;
    if let Some(settings) = &checkpoint.matrix_dropout {
        settings.write_into(&mut dir)?;
    }
    if let Some(initialization) = &checkpoint.initialization {
        initialization.write_into(&mut dir)?;
    }
    let none = BTreeMap::new();
    dir.write(OPTIMIZER_FILE, |out| {
        write_tensors(out, &checkpoint.moments, &none)
    })?;
    if checkpoint.state.partial_step.is_some() {
        dir.write(GRADIENTS_FILE, |out| {
            write_tensors(out, &checkpoint.gradients, &none)
        })?;
    }
    let file = StateFile {
        state: checkpoint.state.clone(),
        fingerprint: checkpoint.fingerprint.clone(),
    };
    dir.write(STATE_FILE, |out| {
        serde_json::to_writer_pretty(&mut *out, &file)?;
        writeln!(out)
    })?;
    dir.commit()?;
    Ok(path)
}

/// Reads a checkpoint whose files are those that were written.
///
/// # Errors
/// [`Error::Io`] or [`Error::Malformed`] naming the file that is missing, damaged, or not what it should be.
pub fn read(dir: &Path) -> Result<Checkpoint> {
    let manifest = Manifest::verify(dir)?;
    let state_path = dir.join(STATE_FILE);
    let json = std::fs::read(&state_path).map_err(Error::io(&state_path))?;
    let StateFile { state, fingerprint } =
        serde_json::from_slice(&json).map_err(|e| Error::malformed(&state_path, e.to_string()))?;
    if dir.file_name().and_then(|name| name.to_str()) != Some(&state.checkpoint_name()) {
        let reason = format!(
            "is of {}, not of the directory it is in",
            state.checkpoint_name()
        );
        return Err(Error::malformed(state_path, reason));
    }
    let tensors = |name: &str| match manifest.contains(name) {
        true => MappedFile::open(&dir.join(name))?.tensors_and_codes(),
        false => Err(Error::malformed(dir, format!("has no {name}"))),
    };
    Ok(Checkpoint {
        adapter: Adapter::read(dir)?,
        matrix_dropout: MatrixDropoutSettings::read(dir)?,
        initialization: Initialization::read(dir)?,
        moments: tensors(OPTIMIZER_FILE)?,
        gradients: match state.partial_step {
            None => BTreeMap::new(),
            Some(_) => tensors(GRADIENTS_FILE)?,
        },
        state,
        fingerprint,
    })
}

/// The checkpoints of a run, the oldest first.
///
/// # Errors
/// [`Error::Io`].
pub fn list(run_dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(run_dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(run_dir)(e)),
    };
    let mut found = BTreeMap::new();
    for entry in entries {
        let path = entry.map_err(Error::io(run_dir))?.path();
        if let Some(position) = position(&path) {
            found.insert(position, path);
        }
    }
    Ok(found.into_values().collect())
}

/// The steps and the micro-batches that a checkpoint's name tells.
fn position(path: &Path) -> Option<(usize, usize)> {
    let name = path.file_name()?.to_str()?.strip_prefix(PREFIX)?;
    let (step, micro_batch) = name.split_once('.').unwrap_or((name, "0"));
    Some((step.parse().ok()?, micro_batch.parse().ok()?))
}

/// The steps of a checkpoint that was saved between two of them, by its name.
pub(super) fn whole_steps(path: &Path) -> Option<usize> {
    position(path).and_then(|(step, micro_batch)| (micro_batch == 0).then_some(step))
}

/// Removes the oldest checkpoints until `limit` are left; 0 keeps all. The newest one and `best` are never removed.
///
/// # Errors
/// [`Error::Io`].
pub fn prune(disk: &dyn Disk, run_dir: &Path, limit: usize, best: Option<&str>) -> Result<()> {
    let mut old = list(run_dir)?;
    if limit == 0 || old.pop().is_none() {
        return Ok(());
    }
    let is_best = |path: &PathBuf| best.is_some_and(|best| path.ends_with(best));
    let kept = 1 + old.iter().filter(|path| is_best(path)).count();
    old.retain(|path| !is_best(path));
    let surplus = (old.len() + kept).saturating_sub(limit).min(old.len());
    old[..surplus]
        .iter()
        .try_for_each(|path| remove_dir(disk, path))
}

/// Gives the checkpoints of `run_dir` that come after `state` another name, the newest first, and says which these were: a
/// run that goes on from `state` writes its own.
///
/// # Errors
/// [`Error::Io`].
pub fn set_aside_after(run_dir: &Path, state: &TrainerState) -> Result<Vec<PathBuf>> {
    let here = (
        state.global_step,
        state
            .partial_step
            .map_or(0, |partial| partial.micro_batches),
    );
    let is_later = |path: &PathBuf| position(path).is_some_and(|there| there > here);
    let later = list(run_dir)?.into_iter().rev().filter(is_later);
    let set_aside = |path: PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let numbered = (2..).map(|number| format!("{SUPERSEDED}{name}-{number}"));
        let aside = std::iter::once(format!("{SUPERSEDED}{name}"))
            .chain(numbered)
            .map(|name| run_dir.join(name))
            .find(|aside| !aside.exists())
            .expect("there are more numbers than directories");
        std::fs::rename(&path, &aside).map_err(Error::io(&path))?;
        Ok(aside)
    };
    later.map(set_aside).collect()
}

/// A stored tensor of the type and shape that a run needs.
pub(super) fn expect_f32<'a>(
    tensors: &'a BTreeMap<String, DenseTensor>,
    name: &str,
    shape: &[usize],
) -> Result<&'a DenseTensor> {
    let found = tensors.get(name);
    found
        .filter(|tensor| tensor.dtype == DType::F32 && tensor.shape == shape)
        .ok_or_else(|| Error::TensorMismatch {
            tensor: name.to_string(),
            expected: format!("f32 {shape:?}"),
            found: found.map_or("nothing".into(), |other| {
                format!("{} {:?}", other.dtype.as_str(), other.shape)
            }),
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::SystemDisk;

    fn names(dir: &Path) -> Vec<String> {
        let paths = list(dir).unwrap().into_iter();
        paths
            .map(|path| path.file_name().unwrap().to_str().unwrap().to_string())
            .collect()
    }

    fn run_with(checkpoints: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in checkpoints {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        dir
    }

    #[test]
    fn checkpoints_are_in_the_order_of_their_steps_and_micro_batches() {
        let dir = run_with(&[
            "checkpoint-10",
            "checkpoint-9",
            "checkpoint-9.12",
            "checkpoint-9.2",
            "checkpoint-x",
            "superseded-checkpoint-11",
            ".checkpoint-12.abc.partial",
        ]);
        let expected = [
            "checkpoint-9",
            "checkpoint-9.2",
            "checkpoint-9.12",
            "checkpoint-10",
        ];
        assert_eq!(names(dir.path()), expected);
    }

    #[test]
    fn pruning_keeps_the_newest_and_the_best() {
        let all = [
            "checkpoint-1",
            "checkpoint-2",
            "checkpoint-3",
            "checkpoint-4",
        ];
        for (limit, best, left) in [
            (0, None, &all[..]),
            (2, None, &["checkpoint-3", "checkpoint-4"]),
            (2, Some("checkpoint-1"), &["checkpoint-1", "checkpoint-4"]),
            (
                3,
                Some("checkpoint-1"),
                &["checkpoint-1", "checkpoint-3", "checkpoint-4"],
            ),
            (1, Some("checkpoint-2"), &["checkpoint-2", "checkpoint-4"]),
            (1, Some("checkpoint-4"), &["checkpoint-4"]),
            (9, None, &all[..]),
        ] {
            let dir = run_with(&all);
            prune(&SystemDisk, dir.path(), limit, best).unwrap();
            assert_eq!(names(dir.path()), left, "limit {limit}, best {best:?}");
        }
    }

    #[test]
    fn later_checkpoints_are_set_aside_and_not_overwritten() {
        let dir = run_with(&[
            "checkpoint-3",
            "checkpoint-4.1",
            "checkpoint-5",
            "superseded-checkpoint-5",
        ]);
        let state = TrainerState {
            global_step: 4,
            ..TrainerState::default()
        };
        let aside = set_aside_after(dir.path(), &state).unwrap();
        assert_eq!(
            aside,
            ["superseded-checkpoint-5-2", "superseded-checkpoint-4.1"]
                .map(|name| dir.path().join(name))
        );
        assert_eq!(names(dir.path()), ["checkpoint-3"]);
    }
}
