//! Training: the configuration, the step, the optimizer, schedules, checkpoints and metrics.

pub mod config;
pub mod metrics;
pub mod schedule;

pub use config::TrainConfig;
