//! Every kernel of `cuda/` against a plain reference: on the host emulator, and on a GPU where the tests are asked for one.

#[path = "../emulated/mod.rs"]
mod emulated;
#[path = "../oracle/mod.rs"]
mod oracle;

mod device_under_test;
mod random_values;

mod adamw;
mod adamw_8bit;
mod attention;
mod embedding;
mod gated_act;
mod linear;
mod linear_cross_entropy;
mod lora;
mod nf4;
mod ops;
mod planted_faults;
mod residual;
mod rms_norm;
mod rope;
