//! What a caller may ask of a run while it goes on.

use std::sync::atomic::{AtomicBool, Ordering};

/// Flags that a caller, or a signal, sets. A run looks at them between micro-batches.
#[derive(Debug, Clone, Copy)]
pub struct Requests<'a> {
    /// Save a checkpoint and stop.
    pub stop: &'a AtomicBool,
    /// Save a checkpoint and go on; taken back when the checkpoint is on its way.
    pub save: Option<&'a AtomicBool>,
}

impl<'a> From<&'a AtomicBool> for Requests<'a> {
    fn from(stop: &'a AtomicBool) -> Self {
        Self { stop, save: None }
    }
}

impl Requests<'_> {
    pub(super) fn stops(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Whether a checkpoint is asked for; the request is taken.
    pub(super) fn takes_save(&self) -> bool {
        self.save
            .is_some_and(|save| save.swap(false, Ordering::Relaxed))
    }

    pub(super) fn is_any_set(&self) -> bool {
        let saves = self.save.is_some_and(|save| save.load(Ordering::Relaxed));
        self.stops() || saves
    }
}
