//! Training: the configuration, the step, the optimizer, schedules, checkpoints and metrics.

pub mod batch_plan;
mod best_model;
pub mod checkpoint;
mod checkpoint_writer;
pub mod config;
mod fingerprint;
mod initial_adapter;
mod matrix_dropout;
pub mod metrics;
mod optimizer;
pub mod plan;
mod replay;
mod requests;
mod resume;
mod run;
mod run_data;
mod run_lock;
pub mod schedule;
mod synthetic;
mod trainer;

pub use batch_plan::BatchPlan;
pub use best_model::BestModel;
pub use config::TrainConfig;
pub use fingerprint::Fingerprint;
pub use optimizer::Optimizer;
pub use replay::{ReplayOptions, ReplayReport, replay};
pub use requests::Requests;
pub use resume::Resumed;
pub use run::{Event, Outcome};
pub use run_data::{RunData, Source, load_options};
pub use synthetic::{Shape, SyntheticRun};
pub use trainer::{Loaded, Trainer};
