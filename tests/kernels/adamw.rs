//! The kernels of `cuda/adamw.cu` give the bits of the CPU's update, and an exact norm; 8-bit moments are in `adamw_8bit`.

use candle_core::{Device, Tensor};
use half::bf16;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use qlora::ops::adamw::{self, AdamW};

use crate::device_under_test::{Arg, Buffer, DeviceUnderTest, assert_kernel_close};
use crate::kernel_test;

/// One element, a short last warp and block, and more than the threads of a launch take at once.
pub const SIZES: [usize; 5] = [1, 42, 256, 1000, 5000];

pub const STEPS: usize = 4;

/// The settings of update `step`: those of `tests/fixtures/make_adamw_8bit.py`.
pub fn update(step: usize) -> AdamW {
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

/// The numbers that the update kernels take last.
#[derive(Clone, Copy)]
pub struct Scalars {
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    decay: f32,
    step_size: f32,
    root_correction: f32,
    epsilon: f32,
    grad_scale: f32,
}

impl From<&AdamW> for Scalars {
    fn from(update: &AdamW) -> Self {
        let correction = |beta: f64| 1.0 - beta.powi(update.step as i32);
        Self {
            beta1: update.beta1 as f32,
            rest1: (1.0 - update.beta1) as f32,
            beta2: update.beta2 as f32,
            rest2: (1.0 - update.beta2) as f32,
            decay: (1.0 - update.learning_rate * update.weight_decay) as f32,
            step_size: (update.learning_rate / correction(update.beta1)) as f32,
            root_correction: correction(update.beta2).sqrt() as f32,
            epsilon: update.epsilon as f32,
            grad_scale: update.grad_scale,
        }
    }
}

impl Scalars {
    fn args(&self) -> [Arg<'static>; 9] {
        [
            self.beta1,
            self.rest1,
            self.beta2,
            self.rest2,
            self.decay,
            self.step_size,
            self.root_correction,
            self.epsilon,
            self.grad_scale,
        ]
        .map(Arg::F32)
    }

    /// The update of one element in plain f32.
    pub fn apply(&self, grad: f32, weight: &mut f32, m: &mut f32, v: &mut f32) {
        let g = grad * self.grad_scale;
        *m = self.beta1 * *m + self.rest1 * g;
        *v = self.beta2 * *v + self.rest2 * g * g;
        let root = v.sqrt() / self.root_correction + self.epsilon;
        *weight = *weight * self.decay - self.step_size * *m / root;
    }
}

/// Numbers of sizes from 1e-6 to 1 and of both signs; different for each `seed`.
fn numbers(n: usize, seed: usize) -> Vec<f32> {
    let mut state = seed as u64;
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

pub fn weights(n: usize) -> Vec<f32> {
    numbers(n, 0).into_iter().map(|w| 0.02 * w).collect()
}

/// The gradients of update `step`; the second block of 256 has none before the third.
pub fn gradients(n: usize, step: usize) -> Vec<f32> {
    let mut gradients = numbers(n, step);
    if let (true, Some(block)) = (step < 3, gradients.chunks_mut(256).nth(1)) {
        block.fill(0.0);
    }
    gradients
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The f32 master weight on the device, in the halves that `cuda/adamw.cu` keeps.
pub struct Master {
    high: Buffer,
    low: Buffer,
}

impl Master {
    pub fn upload(device: &DeviceUnderTest, master: &[f32]) -> Self {
        let (high, low): (Vec<u16>, Vec<i16>) = master.iter().map(|w| split(w.to_bits())).unzip();
        Self {
            high: device.upload(&high),
            low: device.upload(&low),
        }
    }

    pub fn download(&self, device: &DeviceUnderTest) -> Vec<f32> {
        let high = device.download::<u16>(&self.high);
        let low = device.download::<i16>(&self.low);
        let halves = high.into_iter().zip(low);
        halves
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

/// One launch of an update kernel.
pub struct Update<'a> {
    pub device: &'a DeviceUnderTest,
    pub grid: u32,
    pub master: &'a Master,
    pub grad: &'a [f32],
    pub scalars: Scalars,
}

impl Update<'_> {
    fn with_f32_moments(&self, m: &Buffer, v: &Buffer) {
        self.launch("adamw_f32_moments", &[m, v]);
    }

    pub fn launch(&self, kernel: &str, moments: &[&Buffer]) {
        let grad = self.device.upload(self.grad);
        let mut args: Vec<_> = [&self.master.high, &self.master.low, &grad]
            .into_iter()
            .chain(moments.iter().copied())
            .map(Arg::Buffer)
            .collect();
        args.push(Arg::U64(self.grad.len() as u64));
        args.extend(self.scalars.args());
        self.device.launch(kernel, [self.grid, 1, 1], 0, &args);
    }
}

/// The weight and its moments after [`STEPS`] updates, by the CPU of the library.
fn by_library(n: usize) -> [Vec<f32>; 3] {
    let tensor = |values: Vec<f32>| Tensor::from_vec(values, n, &Device::Cpu).unwrap();
    let [weight, m, v] = [weights(n), vec![0.0; n], vec![0.0; n]].map(tensor);
    for step in 1..=STEPS {
        let grad = tensor(gradients(n, step));
        let weight = adamw::Weight {
            value: &weight,
            low: None,
        };
        adamw::forward(&update(step), weight, &grad, &m, &v).unwrap();
    }
    [weight, m, v].map(|t| t.to_vec1().unwrap())
}

/// The same by the formula, in f64.
fn exactly(n: usize) -> [Vec<f64>; 3] {
    let mut weight: Vec<f64> = weights(n).into_iter().map(f64::from).collect();
    let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
    for step in 1..=STEPS {
        let settings = update(step);
        let (beta1, beta2) = (settings.beta1, settings.beta2);
        for (i, grad) in gradients(n, step).into_iter().enumerate() {
            let g = f64::from(grad) * f64::from(settings.grad_scale);
            m[i] = beta1 * m[i] + (1.0 - beta1) * g;
            v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
            let m_hat = m[i] / (1.0 - beta1.powi(step as i32));
            let v_hat: f64 = v[i] / (1.0 - beta2.powi(step as i32));
            let direction =
                settings.weight_decay * weight[i] + m_hat / (v_hat.sqrt() + settings.epsilon);
            weight[i] -= settings.learning_rate * direction;
        }
    }
    [weight, m, v]
}

kernel_test!(updates_have_the_bits_of_the_cpu, |device| {
    for n in SIZES {
        let master = Master::upload(device, &weights(n));
        let [m, v] = [0; 2].map(|_| device.upload(&vec![0f32; n]));
        for step in 1..=STEPS {
            let launch = Update {
                device,
                // Results do not depend on the grid.
                grid: step as u32,
                master: &master,
                grad: &gradients(n, step),
                scalars: Scalars::from(&update(step)),
            };
            launch.with_f32_moments(&m, &v);
        }
        let ours = [
            master.download(device),
            device.download(&m),
            device.download(&v),
        ];
        let (library, exact) = (by_library(n), exactly(n));
        for (i, name) in ["weight", "m", "v"].into_iter().enumerate() {
            assert_eq!(bits(&ours[i]), bits(&library[i]), "{name} of {n}");
            assert_kernel_close(name, &ours[i], &exact[i], &library[i]);
        }
    }
});

kernel_test!(the_two_halves_of_a_master_weight_lose_nothing, |device| {
    let changes_nothing = Scalars {
        decay: 1.0,
        step_size: 0.0,
        ..Scalars::from(&update(1))
    };
    let masters = prop::collection::vec(any::<u32>(), 1..700);
    let mut runner = TestRunner::deterministic();
    for _ in 0..16 {
        let any_bits = masters.new_tree(&mut runner).unwrap().current();
        let any_floats = any_bits.into_iter().map(f32::from_bits);
        let before: Vec<f32> = any_floats.filter(|w| !w.is_nan()).collect();
        let zeros = vec![0f32; before.len()];
        let master = Master::upload(device, &before);
        let [m, v] = [0; 2].map(|_| device.upload(&zeros));
        let launch = Update {
            device,
            grid: 2,
            master: &master,
            grad: &zeros,
            scalars: changes_nothing,
        };
        launch.with_f32_moments(&m, &v);
        assert_eq!(bits(&master.download(device)), bits(&before));
    }
});

proptest! {
    #[test]
    fn the_high_half_of_a_master_weight_is_a_nearest_bf16(bits: u32) {
        let (high, low) = split(bits);
        prop_assert_eq!(join(high, low), bits);
        let (weight, high) = (f32::from_bits(bits), bf16::from_bits(high));
        let is_tie = low == i16::MIN;
        prop_assert!(weight.is_nan() || is_tie || high == bf16::from_f32(weight), "{weight:e} became {high:e}");
    }
}

/// Runs `adamw_sum`.
fn sum(device: &DeviceUnderTest, partial: &Buffer, count: usize) -> f64 {
    let total = device.poisoned::<f64>(1);
    let args = [
        Arg::Buffer(partial),
        Arg::U32(count as u32),
        Arg::Buffer(&total),
    ];
    device.launch("adamw_sum", [1, 1, 1], 0, &args);
    device.download(&total)[0]
}

kernel_test!(the_squared_norm_is_exact_to_the_last_digits, |device| {
    for n in SIZES {
        // The squares of the smallest and of the largest leave the range of f32.
        for (scale, partials) in [(1e-30, 1), (1.0, 3), (1e30, 30)] {
            let grad: Vec<f32> = numbers(n, 1).into_iter().map(|g| g * scale).collect();
            let exact: f64 = grad.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
            let grad = device.upload(&grad);
            let partial = device.poisoned::<f64>(partials);
            let args = [
                Arg::Buffer(&grad),
                Arg::U64(n as u64),
                Arg::Buffer(&partial),
            ];
            device.launch("adamw_squared_norm", [partials as u32, 1, 1], 0, &args);
            let ours = sum(device, &partial, partials);
            assert!((ours / exact - 1.0).abs() < 1e-14, "{ours:e} for {exact:e}");
        }
    }
});

kernel_test!(any_number_of_partial_sums_is_added, |device| {
    for count in [1, 255, 256, 1000] {
        let partial: Vec<f64> = (1..=count).map(|i| i as f64).collect();
        let expected = (count * (count + 1) / 2) as f64;
        assert_eq!(sum(device, &device.upload(&partial), count), expected);
    }
});
