//! What a model is used for once it is trained.

mod sampling;

pub use sampling::{Sampler, SamplingOptions};
