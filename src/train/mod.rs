//! Training: the configuration, the step, the optimizer, schedules, checkpoints and metrics.

pub mod batch_plan;
mod checkpoint;
pub mod config;
mod memory;
pub mod metrics;
mod optimizer;
mod run_data;
pub mod schedule;
mod synthetic;
mod trainer;

pub use batch_plan::BatchPlan;
pub use config::TrainConfig;
pub use memory::activation_policies;
pub use optimizer::Optimizer;
pub use run_data::{RunData, Source, load_options};
pub use synthetic::{Shape, SyntheticRun};
pub use trainer::{Event, Outcome, Trainer};
