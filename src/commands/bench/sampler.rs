//! Memory over time, read by a thread of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use qlora::device::Placement;

const INTERVAL: Duration = Duration::from_millis(1);

/// Seconds since the start, and bytes.
pub type Samples = Vec<(f64, u64)>;

/// Reads the memory in use until it is stopped.
pub struct Sampler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Samples>,
}

impl Sampler {
    pub fn start(placement: &Placement) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, placement) = (Arc::clone(&stop), placement.clone());
        let thread = std::thread::spawn(move || {
            let started = Instant::now();
            let mut samples = Samples::new();
            while !stopped.load(Ordering::Relaxed) {
                if let Some(bytes) = placement.used_memory_bytes() {
                    samples.push((started.elapsed().as_secs_f64(), bytes));
                }
                std::thread::sleep(INTERVAL);
            }
            samples
        });
        Self { stop, thread }
    }

    pub fn stop(self) -> Samples {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_default()
    }
}
