//! Time of the 64 largest singular values of a 4096 x 11008 weight on the CPU, by the number of power iterations.
//!
//! `thrpt` counts the floating-point operations of the products with the weight (`Gelem/s` = GFLOP/s).

use std::hint::black_box;

use candle_core::Device;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use qlora::ops::low_rank::{PowerIterations, SvdOptions, subtract_product, truncated_svd};
use qlora::ops::philox::Normal;

const OUT: usize = 4096;
const IN: usize = 11008;
const RANK: usize = 64;
/// Vectors that the products are made with: the rank and the oversampling.
const VECTORS: usize = RANK + 16;

/// A few strong directions, their strength falling off, and noise.
fn weight() -> Vec<f32> {
    const DIRECTIONS: usize = 128;
    let mut normal = Normal::new(0, [0, 0]);
    let mut random = |len| -> Vec<f32> { (0..len).map(|_| normal.next_f32()).collect() };
    let mut b = random(OUT * DIRECTIONS);
    let a = random(DIRECTIONS * IN);
    for (at, value) in b.iter_mut().enumerate() {
        *value *= 0.2 / ((at % DIRECTIONS + 1) as f32).sqrt();
    }
    let mut w = random(OUT * IN);
    subtract_product(&mut w, &b, &a, DIRECTIONS, -1.0);
    w
}

fn singular_values(c: &mut Criterion) {
    let w = weight();
    let mut group = c.benchmark_group("singular values");
    group.sample_size(10);
    for iterations in [0, 4, 16] {
        let options = SvdOptions {
            rank: RANK,
            power_iterations: PowerIterations::Fixed(iterations),
            seed: 0,
            device: Device::Cpu,
        };
        let svd = truncated_svd(&w, (OUT, IN), &options).unwrap();
        assert!(svd.values.is_sorted_by(|a, b| a >= b), "{:?}", svd.values);
        let products = 2 * iterations + 2;
        let operations = 2 * OUT * IN * VECTORS * products;
        group.throughput(Throughput::Elements(operations as u64));
        group.bench_function(format!("{iterations} power iterations"), |b| {
            b.iter(|| truncated_svd(black_box(&w), (OUT, IN), &options).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, singular_values);
criterion_main!(benches);
