//! Every CUDA kernel against the same mathematics in f64, on the emulator (`cargo test`) and on a GPU (`--features cuda`, ignored
//! where there is none). `device_under_test` says how a test is written.

#[path = "../emulated/mod.rs"]
mod emulated;
#[path = "../oracle/mod.rs"]
mod oracle;

mod device_under_test;
#[cfg(feature = "cuda")]
mod gpu;
mod random_values;

mod adamw;
mod adamw_8bit;
mod attention;
mod embedding;
mod gated_act;
mod linear;
mod linear_cross_entropy;
mod lora;
mod matrix_dropout;
mod nf4;
mod ops;
mod planted_faults;
mod residual;
mod rms_norm;
mod rope;
