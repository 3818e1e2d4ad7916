//! The kernels of `cuda/adamw.cu` give the bits of the CPU's update, and of bitsandbytes where the moments are 8-bit codes.

use std::path::Path;

use candle_core::{Device, Tensor};
use half::bf16;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use qlora::ops::adamw::{self, AdamW};
use safetensors::SafeTensors;

use crate::device_under_test::{Arg, Buffer, DeviceUnderTest, assert_kernel_close, kernel_test};

const BLOCK_SIZE: usize = 256;

/// One element, a short last warp and block, and more blocks of 256 than the warps of a launch take at once.
const SIZES: [usize; 5] = [1, 42, 256, 1000, 5000];

fn update(step: usize) -> AdamW {
    AdamW {
        learning_rate: 2e-4,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        step,
        grad_scale: 0.37,
    }
}

/// The scalars that every update kernel takes last.
fn scalars(update: &AdamW) -> [Arg<'static>; 9] {
    let AdamW {
        learning_rate,
        beta1,
        beta2,
        ..
    } = *update;
    [
        beta1 as f32,
        (1.0 - beta1) as f32,
        beta2 as f32,
        (1.0 - beta2) as f32,
        (1.0 - learning_rate * update.weight_decay) as f32,
        (learning_rate / (1.0 - beta1.powi(update.step as i32))) as f32,
        (1.0 - beta2.powi(update.step as i32)).sqrt() as f32,
        update.epsilon as f32,
        update.grad_scale,
    ]
    .map(Arg::F32)
}

/// The f32 master weight in two halves, as `cuda/adamw.cu` keeps it.
struct Master {
    high: Buffer,
    low: Buffer,
}

impl Master {
    fn upload(device: &DeviceUnderTest, master: &[f32]) -> Self {
        let (high, low): (Vec<u16>, Vec<i16>) = master.iter().map(|w| split(w.to_bits())).unzip();
        Self {
            high: device.upload(&high),
            low: device.upload(&low),
        }
    }

    fn download(&self, device: &DeviceUnderTest) -> Vec<f32> {
        let high = device.download::<u16>(&self.high);
        let low = device.download::<i16>(&self.low);
        high.into_iter()
            .zip(low)
            .map(|(high, low)| f32::from_bits(join(high, low)))
            .collect()
    }
}

fn split(bits: u32) -> (u16, i16) {
    ((bits.wrapping_add(0x8000) >> 16) as u16, bits as i16)
}

fn join(high: u16, low: i16) -> u32 {
    (u32::from(high) << 16).wrapping_add_signed(i32::from(low))
}

/// Gradients of sizes from 1e-6 to 1, of both signs.
fn gradients(n: usize, step: usize) -> Vec<f32> {
    let mut state = step as u64;
    (0..n)
        .map(|i| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let uniform = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
            uniform * 10f32.powi(-((i % 7) as i32))
        })
        .collect()
}

fn weights(n: usize) -> Vec<f32> {
    gradients(n, 0).into_iter().map(|w| 0.02 * w).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The weight and both moments after some steps.
struct State<T> {
    weight: Vec<T>,
    m: Vec<T>,
    v: Vec<T>,
}

impl State<f32> {
    /// By the library, on the CPU.
    fn by_library(n: usize, steps: usize) -> Self {
        let tensor = |values: &[f32]| Tensor::from_slice(values, n, &Device::Cpu).unwrap();
        let (weight, m, v) = (
            tensor(&weights(n)),
            tensor(&vec![0.0; n]),
            tensor(&vec![0.0; n]),
        );
        for step in 1..=steps {
            adamw::forward(&update(step), &weight, &tensor(&gradients(n, step)), &m, &v).unwrap();
        }
        let [weight, m, v] = [weight, m, v].map(|t| t.to_vec1::<f32>().unwrap());
        Self { weight, m, v }
    }
}

impl State<f64> {
    /// By the formula, in f64.
    fn exact(n: usize, steps: usize) -> Self {
        let mut weight: Vec<f64> = weights(n).into_iter().map(f64::from).collect();
        let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
        for step in 1..=steps {
            let AdamW {
                learning_rate,
                beta1,
                beta2,
                epsilon,
                weight_decay,
                grad_scale,
                ..
            } = update(step);
            for (i, grad) in gradients(n, step).into_iter().enumerate() {
                let g = f64::from(grad) * f64::from(grad_scale);
                m[i] = beta1 * m[i] + (1.0 - beta1) * g;
                v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
                let m_hat = m[i] / (1.0 - beta1.powi(step as i32));
                let v_hat: f64 = v[i] / (1.0 - beta2.powi(step as i32));
                weight[i] -=
                    learning_rate * (weight_decay * weight[i] + m_hat / (v_hat.sqrt() + epsilon));
            }
        }
        Self { weight, m, v }
    }
}
