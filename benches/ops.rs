//! Time of each operation at the sizes of a 110M-parameter llama: 4 sequences of 256 tokens, rank 16.
//!
//! `thrpt` counts floating-point operations (`Gelem/s` = GFLOP/s) for products, bytes read and written for the others.

use std::hint::black_box;

use candle_core::{DType, Device, Tensor};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use qlora::device::ComputeDtype;
use qlora::ops::attention::{self, Heads, Segment, Segments};
use qlora::ops::dropout::Dropout;
use qlora::ops::gated_act::Activation;
use qlora::ops::linear::{self, Lora, LoraGrad};
use qlora::ops::philox::Uniform;
use qlora::ops::weight::Weight;
use qlora::ops::{gated_act, linear_cross_entropy, residual, rms_norm};
use qlora::quant::{DenseTensor, FrozenWeight, Params4bit, QuantizeOptions};

const SEQUENCES: usize = 4;
const TOKENS: usize = 256;
const N: usize = SEQUENCES * TOKENS;
const D: usize = 768;
const F: usize = 2048;
const R: usize = 16;
const VOCAB: usize = 32_000;

fn random(shape: &[usize]) -> Vec<f32> {
    let mut uniform = Uniform::new(0, [shape[0] as u32, 0]);
    (0..shape.iter().product())
        .map(|_| 2.0 * uniform.next_f32() - 1.0)
        .collect()
}

fn tensor(shape: &[usize]) -> Tensor {
    Tensor::from_vec(random(shape), shape, &Device::Cpu).unwrap()
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

fn flops(count: usize) -> Throughput {
    Throughput::Elements(count as u64)
}

fn linears(c: &mut Criterion) {
    let mut group = c.benchmark_group("linear");
    for (d_in, d_out) in [(D, D), (D, F), (F, D)] {
        let dense = DenseTensor::from_f32(vec![d_out, d_in], &random(&[d_out, d_in]));
        let params = Params4bit::quantize("w", &dense, QuantizeOptions::default()).unwrap();
        let weight = Weight::from(FrozenWeight::Quantized(params));
        let (x, dy) = (tensor(&[N, d_in]), tensor(&[N, d_out]));
        let (a, b) = (tensor(&[R, d_in]), tensor(&[d_out, R]));
        let lora = Lora {
            a: &a,
            b: &b,
            scaling: 2.0,
            mask: None,
            compute_dtype: ComputeDtype::F32,
        };
        let (d_a, d_b) = (zeros(&[R, d_in]), zeros(&[d_out, R]));
        let (_, u) = linear::forward(&x, &weight, None, Some(lora)).unwrap();
        let u = u.unwrap();
        let grad = LoraGrad {
            d_a: &d_a,
            d_b: &d_b,
        };
        let du = linear::backward_lora(&dy, &x, &u, lora, grad).unwrap();
        let base = 2 * N * d_in * d_out;
        let rank = 2 * N * R * (d_in + d_out);
        group.throughput(flops(base));
        group.bench_function(format!("forward {d_in}x{d_out}"), |bench| {
            bench.iter(|| linear::forward(black_box(&x), &weight, None, None).unwrap());
        });
        group.bench_function(format!("backward_input {d_in}x{d_out}"), |bench| {
            bench.iter(|| linear::backward_input(black_box(&dy), &weight, None, None).unwrap());
        });
        group.throughput(flops(base + rank));
        group.bench_function(format!("forward with LoRA {d_in}x{d_out}"), |bench| {
            bench.iter(|| linear::forward(black_box(&x), &weight, None, Some(lora)).unwrap());
        });
        group.throughput(flops(base + rank / 2));
        group.bench_function(
            format!("backward_input with LoRA {d_in}x{d_out}"),
            |bench| {
                bench.iter(|| {
                    linear::backward_input(black_box(&dy), &weight, Some((&du, lora)), None)
                        .unwrap()
                });
            },
        );
        group.throughput(flops(rank + rank / 2));
        group.bench_function(format!("backward_lora {d_in}x{d_out}"), |bench| {
            bench.iter(|| linear::backward_lora(black_box(&dy), &x, &u, lora, grad).unwrap());
        });
        // A step of the layer, without and with dropout.
        let masked = Lora {
            mask: Dropout::new(0.05, 1, 0, 0).map(|dropout| dropout.mask(0, 0)),
            ..lora
        };
        group.throughput(flops(3 * rank + 2 * base));
        for (name, lora) in [("layer", lora), ("layer with dropout", masked)] {
            group.bench_function(format!("{name} {d_in}x{d_out}"), |bench| {
                bench.iter(|| {
                    linear::forward(black_box(&x), &weight, None, Some(lora)).unwrap();
                    let du = linear::backward_lora(&dy, &x, &u, lora, grad).unwrap();
                    linear::backward_input(&dy, &weight, Some((&du, lora)), None).unwrap()
                });
            });
        }
    }
    group.finish();
}

fn attention(c: &mut Criterion) {
    let heads = Heads {
        num_heads: 12,
        num_kv_heads: 12,
        head_dim: 64,
        window: None,
        scale: attention::default_scale(64),
        soft_cap: None,
        compute_dtype: ComputeDtype::F32,
    };
    let segments: Vec<_> = (0..SEQUENCES)
        .map(|s| s * TOKENS..(s + 1) * TOKENS)
        .map(|rows| Segment {
            queries: rows.clone(),
            keys: rows,
        })
        .collect();
    let segments = Segments::from(segments);
    let (q, k, v, d_out) = (
        tensor(&[N, D]),
        tensor(&[N, D]),
        tensor(&[N, D]),
        tensor(&[N, D]),
    );
    let saved = attention::forward(&q, &k, &v, &segments, heads).unwrap();
    let causal_product = N * TOKENS * D;
    let mut group = c.benchmark_group("attention");
    group.throughput(flops(2 * causal_product));
    group.bench_function("forward", |bench| {
        bench.iter(|| attention::forward(black_box(&q), &k, &v, &segments, heads).unwrap());
    });
    group.throughput(flops(5 * causal_product));
    group.bench_function("backward", |bench| {
        bench.iter(|| {
            attention::backward(black_box(&d_out), (&q, &k, &v), &saved, &segments, heads).unwrap()
        });
    });
    group.finish();
}

fn head_and_loss(c: &mut Criterion) {
    let dense = DenseTensor::from_f32(vec![VOCAB, D], &random(&[VOCAB, D]));
    let values: Vec<half::bf16> = random(&[VOCAB, D])
        .into_iter()
        .map(half::bf16::from_f32)
        .collect();
    let head = FrozenWeight::Dense(DenseTensor::from_bf16(dense.shape, &values));
    let head = Weight::from(head);
    let x = tensor(&[N, D]);
    let labels: Vec<i64> = (0..N as i64).collect();
    let mut group = c.benchmark_group("linear_cross_entropy");
    group.sample_size(10);
    group.throughput(flops(2 * N * D * VOCAB));
    group.bench_function("forward", |bench| {
        bench.iter(|| linear_cross_entropy::forward(black_box(&x), &head, &labels).unwrap());
    });
    group.throughput(flops(4 * N * D * VOCAB));
    group.bench_function("backward", |bench| {
        bench.iter(|| {
            linear_cross_entropy::backward(black_box(&x), &head, &labels, 1.0, None).unwrap()
        });
    });
    group.finish();
}

fn elementwise(c: &mut Criterion) {
    let bytes = |tensors: usize, width: usize| Throughput::Bytes((4 * tensors * N * width) as u64);
    let mut group = c.benchmark_group("elementwise");
    let (x, weight, dx) = (tensor(&[N, D]), tensor(&[D]), zeros(&[N, D]));
    group.throughput(bytes(2, D));
    group.bench_function("rms_norm forward", |bench| {
        bench.iter(|| rms_norm::forward(black_box(&x), &weight, 1e-5).unwrap());
    });
    group.throughput(bytes(4, D));
    group.bench_function("rms_norm backward", |bench| {
        bench.iter(|| rms_norm::backward(black_box(&x), &x, &weight, 1e-5, &dx).unwrap());
    });
    group.throughput(bytes(3, D));
    group.bench_function("residual forward", |bench| {
        bench.iter(|| residual::forward(black_box(&x), dx.clone()).unwrap());
    });
    let (gate, up, dy) = (tensor(&[N, F]), tensor(&[N, F]), tensor(&[N, F]));
    group.throughput(bytes(3, F));
    group.bench_function("gated_act forward", |bench| {
        bench.iter(|| gated_act::forward(black_box(&gate), &up, Activation::Silu).unwrap());
    });
    group.throughput(bytes(5, F));
    group.bench_function("gated_act backward", |bench| {
        // In place: each round starts from the activations, not from the gradients of the round before.
        let fresh = || (gate.copy().unwrap(), up.copy().unwrap());
        bench.iter_batched(
            fresh,
            |(gate, up)| gated_act::backward(black_box(&dy), &gate, &up, Activation::Silu).unwrap(),
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

criterion_group!(benches, linears, attention, head_and_loss, elementwise);
criterion_main!(benches);
