//! Throughput of quantization and dequantization on the CPU; criterion prints it as bytes of the dense side per second.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use qlora::quant::{
    DenseTensor, DoubleQuant, FrozenWeight, Params4bit, QuantType, QuantizeOptions,
};
use rayon::prelude::*;

const OUT: usize = 4096;
const IN: usize = 11008;

/// About normally distributed with deviation 0.02: the sum of four uniform values of a xorshift generator.
fn weight() -> Vec<bf16> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    (0..OUT * IN)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let sum: f32 = (0..4).map(|k| f32::from((state >> (16 * k)) as u16)).sum();
            bf16::from_f32((sum / 65536.0 - 2.0) * 0.035)
        })
        .collect()
}

/// The widest half step of NF4 is 0.152 of the block's absmax, the error of its 8-bit scale a few percent more.
fn assert_close(dense: &[bf16], dequantized: &[f32]) {
    for (dense, dequantized) in dense.chunks(64).zip(dequantized.chunks(64)) {
        let absmax = dense.iter().fold(0.0f32, |m, v| m.max(v.to_f32().abs()));
        for (a, b) in dense.iter().zip(dequantized) {
            assert!((a.to_f32() - b).abs() < 0.2 * absmax, "{a} became {b}");
        }
    }
}

fn quantize(c: &mut Criterion) {
    let values = weight();
    let f32_values: Vec<f32> = values.iter().map(|v| v.to_f32()).collect();
    let f16_values: Vec<f16> = f32_values.iter().map(|&v| f16::from_f32(v)).collect();
    let inputs = [
        ("bf16", DenseTensor::from_bf16(vec![OUT, IN], &values)),
        ("f16", DenseTensor::from_f16(vec![OUT, IN], &f16_values)),
        ("f32", DenseTensor::from_f32(vec![OUT, IN], &f32_values)),
    ];
    let mut group = c.benchmark_group("quantize_4096x11008");
    group.sample_size(20);
    let nf4_double = QuantizeOptions::default();
    let nf4_single = QuantizeOptions {
        double_quant: DoubleQuant::No,
        ..nf4_double
    };
    let fp4_double = QuantizeOptions {
        quant_type: QuantType::Fp4,
        ..nf4_double
    };
    for (input, quant, options) in [
        (0, "nf4_double", nf4_double),
        (0, "nf4_single", nf4_single),
        (0, "fp4_double", fp4_double),
        (1, "nf4_double", nf4_double),
        (2, "nf4_double", nf4_double),
    ] {
        let (name, input) = &inputs[input];
        group.throughput(Throughput::Bytes(input.data.len() as u64));
        group.bench_function(format!("{name}_to_{quant}"), |b| {
            b.iter(|| {
                Params4bit::quantize("w", black_box(input), options).expect("the weight is finite")
            });
        });
    }
}

fn dequantize(c: &mut Criterion) {
    let values = weight();
    let dense = DenseTensor::from_bf16(vec![OUT, IN], &values);
    let quantized = Params4bit::quantize("w", &dense, QuantizeOptions::default())
        .expect("the weight is finite");
    let mut f32s = vec![0.0f32; OUT * IN];
    quantized.dequantize(&mut f32s);
    assert_close(&values, &f32s);
    let mut bf16s = vec![bf16::ZERO; OUT * IN];
    let mut f16s = vec![f16::ZERO; OUT * IN];

    let mut group = c.benchmark_group("dequantize_4096x11008");
    group.sample_size(30);
    group.throughput(Throughput::Bytes((OUT * IN * 2) as u64));
    group.bench_function("bf16", |b| {
        b.iter(|| quantized.dequantize(black_box(&mut bf16s)))
    });
    group.bench_function("f16", |b| {
        b.iter(|| quantized.dequantize(black_box(&mut f16s)))
    });
    group.throughput(Throughput::Bytes((OUT * IN * 4) as u64));
    group.bench_function("f32", |b| {
        b.iter(|| quantized.dequantize(black_box(&mut f32s)))
    });
    group.bench_function("limit_filling_with_f32_zeros", |b| {
        b.iter(|| {
            black_box(&mut f32s)
                .par_chunks_mut(1 << 16)
                .for_each(|out| out.fill(0.0))
        });
    });
    group.finish();

    let mut group = c.benchmark_group("read_tile_one_thread");
    let sources = [
        ("nf4", FrozenWeight::Quantized(quantized)),
        ("bf16", FrozenWeight::Dense(dense)),
    ];
    for (source, weight) in sources {
        for (rows, cols) in [(64, 64), (64, 256), (16, 512), (24, IN)] {
            let mut tile = vec![0.0f32; rows * cols];
            group.throughput(Throughput::Bytes((rows * cols * 4) as u64));
            group.bench_function(format!("{source}_{rows}x{cols}"), |b| {
                b.iter(|| weight.read_tile(640..640 + rows, 0..cols, black_box(&mut tile)));
            });
        }
    }
}

criterion_group!(benches, quantize, dequantize);
criterion_main!(benches);
