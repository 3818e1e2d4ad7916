//! Training: the configuration, the step, the optimizer, schedules, checkpoints and metrics.

pub mod checkpoint;
pub mod config;
pub mod metrics;
mod optimizer;
pub mod plan;
mod run_data;
pub mod schedule;
mod synthetic;
mod trainer;

pub use config::TrainConfig;
pub use optimizer::Optimizer;
pub use run_data::RunData;
pub use synthetic::{Shape, SyntheticRun};
pub use trainer::{Event, Outcome, Trainer};
