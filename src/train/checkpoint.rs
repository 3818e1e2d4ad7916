//! `checkpoint-N/`: what a run needs to go on after step N as if it had never stopped.
//!
//! A PEFT adapter (the f32 master weights), `optimizer.safetensors` (the moments) and `trainer_state.json`. Everything
//! else is a function of the config and of the position. The directory appears complete or not at all.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::optimizer::Optimizer;
use crate::quant::DenseTensor;
use crate::store::{Adapter, AtomicDir, AtomicFile, Existing, MappedFile, SafetensorsWriter};
use crate::{Error, Result};

const PREFIX: &str = "checkpoint-";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const STATE_FILE: &str = "trainer_state.json";

/// Where a run stands; key names as in transformers where it has them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Optimizer steps done.
    pub global_step: usize,
    /// Passes over the training data so far.
    pub epoch: f64,
    /// Position in the order of rows: how many sequences have been used. A packed one counts as one.
    pub examples_seen: u64,
}

/// A checkpoint that was read.
#[derive(Debug)]
pub struct Checkpoint {
    pub state: TrainerState,
    pub adapter: Adapter,
    pub moments: BTreeMap<String, DenseTensor>,
}

/// Writes `checkpoint-N` into `run_dir` and gives its path.
pub fn write(
    run_dir: &Path,
    state: &TrainerState,
    adapter: &Adapter,
    optimizer: &Optimizer,
) -> Result<PathBuf> {
    let path = run_dir.join(format!("{PREFIX}{}", state.global_step));
    let dir = AtomicDir::create(&path, Existing::Replace)?;
    adapter.write(dir.path())?;
    let moments = dir.path().join(OPTIMIZER_FILE);
    SafetensorsWriter::write_f32(moments, &optimizer.state()?, BTreeMap::new())?;
    let json =
        serde_json::to_string_pretty(state).map_err(|e| Error::malformed(&path, e.to_string()))?;
    AtomicFile::write(dir.path().join(STATE_FILE), json + "\n")?;
    dir.commit()?;
    Ok(path)
}

/// Reads a checkpoint.
pub fn read(dir: &Path) -> Result<Checkpoint> {
    let state_path = dir.join(STATE_FILE);
    let json = std::fs::read(&state_path).map_err(Error::io(&state_path))?;
    let state =
        serde_json::from_slice(&json).map_err(|e| Error::malformed(&state_path, e.to_string()))?;
    Ok(Checkpoint {
        state,
        adapter: Adapter::read(dir)?,
        moments: MappedFile::open(&dir.join(OPTIMIZER_FILE))?.tensors()?,
    })
}

/// The checkpoints of a run, the oldest first.
pub fn list(run_dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(run_dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(run_dir)(e)),
    };
    let mut found = BTreeMap::new();
    for entry in entries {
        let path = entry.map_err(Error::io(run_dir))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let step = name.and_then(|name| name.strip_prefix(PREFIX)?.parse::<usize>().ok());
        if let Some(step) = step {
            found.insert(step, path);
        }
    }
    Ok(found.into_values().collect())
}

/// Removes the oldest checkpoints until `limit` are left; 0 keeps all.
pub fn prune(run_dir: &Path, limit: usize) -> Result<()> {
    let checkpoints = list(run_dir)?;
    let surplus = if limit == 0 {
        0
    } else {
        checkpoints.len().saturating_sub(limit)
    };
    checkpoints[..surplus]
        .iter()
        .try_for_each(|path| std::fs::remove_dir_all(path).map_err(Error::io(path)))
}
