//! One operation, one file: its formula, `forward`, `backward`, and a `reference` of differentiable candle primitives.
//!
//! Operations take and give candle tensors; which device does the work is decided here and nowhere above. In f32 on the
//! CPU they compute over all threads of the rayon pool, in an order that does not depend on how many there are; matrix products
//! are made there in the [`ComputeDtype`](crate::device::ComputeDtype) of a weight, an adapter or the heads. In bf16
//! they launch the kernels of `cuda/`, which have the stem of their operation, on the device of the tensors.
//! The `reference` of an operation works in any float type and is what tests hold `forward` and `backward` against.

pub mod adamw;
pub mod attention;
pub mod dropout;
pub mod embedding;
pub mod gated_act;
pub mod host_memory;
pub mod linear;
pub mod linear_cross_entropy;
pub mod low_rank;
pub mod matrix_dropout;
pub mod neftune;
pub mod paged;
pub mod philox;
pub mod residual;
pub mod rms_norm;
pub mod rope;
pub mod scale;
pub mod soft_cap;
pub mod table;
pub mod weight;

mod cpu;
mod gemm;
mod launcher;
mod simd;

pub use gemm::{is_bf16_fast, packed_lhs_bytes};
