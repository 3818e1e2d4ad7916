//! Signals to a run. SIGINT or SIGTERM: the first one asks it to save and stop, the second one ends it at once. SIGUSR1 asks
//! it to save and go on.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;

/// The status of a run that a second signal ended.
const INTERRUPTED: i32 = 130;

/// Flags that signals set. Until they are watched the signals end the program, as they do everywhere.
pub struct Signals {
    pub stop: Arc<AtomicBool>,
    pub save: Arc<AtomicBool>,
}

impl Signals {
    pub fn watch() -> std::io::Result<Self> {
        let signals = Self {
            stop: Arc::default(),
            save: Arc::default(),
        };
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds the flag not set yet.
            flag::register_conditional_shutdown(signal, INTERRUPTED, signals.stop.clone())?;
            flag::register(signal, signals.stop.clone())?;
        }
        flag::register(SIGUSR1, signals.save.clone())?;
        Ok(signals)
    }
}
