//! Writes checkpoints beside the training: a step waits for the copy to host memory and no longer.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::checkpoint::{self, Checkpoint};
use crate::store::Disk;
use crate::{Error, Result};

/// At most one checkpoint on its way to a run directory.
#[derive(Debug)]
pub(super) struct CheckpointWriter {
    disk: Arc<dyn Disk>,
    run_dir: PathBuf,
    save_total_limit: usize,
    job: Option<JoinHandle<Result<PathBuf>>>,
}

impl CheckpointWriter {
    pub(super) fn new(disk: Arc<dyn Disk>, run_dir: PathBuf, save_total_limit: usize) -> Self {
        Self {
            disk,
            run_dir,
            save_total_limit,
            job: None,
        }
    }

    /// Starts to write a checkpoint; the one before has been waited for. `metrics` is synced first: a checkpoint never knows
    /// of a record that a loss of power took.
    ///
    /// # Errors
    /// [`Error::Io`] if no thread can be started.
    pub(super) fn start(&mut self, checkpoint: Checkpoint, metrics: File) -> Result<()> {
        debug_assert!(self.job.is_none(), "the caller has waited for it");
        let (disk, run_dir) = (Arc::clone(&self.disk), self.run_dir.clone());
        let limit = self.save_total_limit;
        let write = move || {
            metrics.sync_all().map_err(Error::io(&run_dir))?;
            let path = checkpoint::write(&disk, &run_dir, &checkpoint)?;
            let best = checkpoint.state.best.as_ref();
            let best = best.map(|best| best.best_model_checkpoint.as_str());
            checkpoint::prune(&*disk, &run_dir, limit, best)?;
            Ok(path)
        };
        let thread = std::thread::Builder::new().name("checkpoint".into());
        self.job = Some(thread.spawn(write).map_err(Error::io(&self.run_dir))?);
        Ok(())
    }

    /// The path of a checkpoint that is durable since the last call; does not wait.
    ///
    /// # Errors
    /// Those of [`checkpoint::write`] and [`checkpoint::prune`].
    pub(super) fn finished(&mut self) -> Result<Option<PathBuf>> {
        match self.job.as_ref().is_some_and(JoinHandle::is_finished) {
            true => self.wait(),
            false => Ok(None),
        }
    }

    /// Waits for the checkpoint that is on its way and gives its path.
    ///
    /// # Errors
    /// Those of [`finished`](Self::finished).
    pub(super) fn wait(&mut self) -> Result<Option<PathBuf>> {
        let Some(job) = self.job.take() else {
            return Ok(None);
        };
        match job.join() {
            Ok(written) => written.map(Some),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for CheckpointWriter {
    /// A program that ends because of another error does not cut a checkpoint off.
    fn drop(&mut self) {
        if let Some(job) = self.job.take() {
            let _ = job.join();
        }
    }
}
