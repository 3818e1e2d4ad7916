//! Every kernel of `cuda/` against a plain reference: on the host emulator, and on a GPU where the tests are asked for one.

#[path = "../emulated/mod.rs"]
mod emulated;
#[path = "../oracle/mod.rs"]
mod oracle;

mod device_under_test;

mod embedding;
mod nf4;
mod ops;
