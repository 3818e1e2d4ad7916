//! model

pub mod config;

pub use config::*;
