//! Values that kernels are tested on: the same in every run, and apart from each other by their stream.

use half::bf16;
use qlora::ops::philox::Uniform;

/// `n` values of mean 0 and variance 1.
pub fn random(stream: u32, n: usize) -> Vec<f32> {
    let mut uniform = Uniform::new(0, [stream, 0]);
    // The sum of twelve uniform numbers is as good as normal here.
    let mut normal = || (0..12).map(|_| uniform.next_f32()).sum::<f32>() - 6.0;
    (0..n).map(|_| normal()).collect()
}

/// The same, rounded.
pub fn random_bf16(stream: u32, n: usize) -> Vec<bf16> {
    round(&random(stream, n))
}

/// The nearest bf16 to each value: what a kernel that works exactly would store.
pub fn round<T: Copy + Into<f64>>(values: &[T]) -> Vec<bf16> {
    let nearest = |&value: &T| bf16::from_f64(value.into());
    values.iter().map(nearest).collect()
}

/// The values as they are, for a reference in f64.
pub fn exact<T: Copy + Into<f64>>(values: &[T]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}
