//! `adamw_8bit`: the CPU gives the bits of the kernel and the codes of bitsandbytes, learns as f32 moments do, is stored in
//! 8 bits, and resumes bit for bit.

mod emulated;
mod reference_case;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use emulated::placement_test;
use half::bf16;
use qlora::device::Placement;
use qlora::model::Trainable;
use qlora::ops::adamw::moments_8bit::{self, Moments};
use qlora::ops::adamw::{AdamW, Weight, join_master, split_master};
use qlora::ops::philox::Uniform;
use qlora::quant::{dynamic_map, unsigned_dynamic_map};
use qlora::train::config::{Optim, Resume};
use qlora::train::{TrainConfig, Trainer};
use reference_case::{ReferenceCase, floats, relative_error, trained, values};
use safetensors::{Dtype, SafeTensors};

/// The settings of update `step`: those of `tests/fixtures/make_adamw_8bit.py`.
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

fn fixture() -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/adamw_8bit.safetensors");
    std::fs::read(path).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn vector(values: &[f32]) -> Tensor {
    Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

/// Codes and scales of both moments.
fn stored(moments: &Moments) -> [(Vec<u8>, Vec<u32>); 2] {
    [&moments.m, &moments.v].map(|moment| {
        let codes = moment.codes.to_vec1().unwrap();
        (codes, bits(&moment.absmax.to_vec1::<f32>().unwrap()))
    })
}

#[test]
fn the_maps_are_those_of_bitsandbytes() {
    let data = fixture();
    let tensors = SafeTensors::deserialize(&data).unwrap();
    let map = |name| bits(&floats(&tensors, name));
    assert_eq!(bits(dynamic_map()), map("signed_map"));
    assert_eq!(bits(unsigned_dynamic_map()), map("unsigned_map"));
}

#[test]
fn the_cpu_takes_the_codes_of_bitsandbytes() {
    let data = fixture();
    let tensors = SafeTensors::deserialize(&data).unwrap();
    let weight = vector(&floats(&tensors, "weight"));
    let moments = Moments::zeros(weight.elem_count(), &Device::Cpu).unwrap();
    for step in 1..=4 {
        let grad = vector(&floats(&tensors, &format!("grad.{step}")));
        let operand = Weight {
            value: &weight,
            low: None,
        };
        moments_8bit::forward(&update(step), operand, &grad, &moments).unwrap();
        let after = |name: &str| format!("after.{step}.{name}");
        for (name, moment) in [("m", &moments.m), ("v", &moments.v)] {
            let theirs = tensors.tensor(&after(&format!("{name}_codes"))).unwrap();
            let ours: Vec<u8> = moment.codes.to_vec1().unwrap();
            assert!(ours == theirs.data(), "{name} after step {step}");
        }
        // torch rounds some products and sums together: its f32 differ in the last bits.
        let error = relative_error(&values(&weight), &floats(&tensors, &after("weight")));
        assert!(error < 1e-6, "step {step}: {error}");
    }
}

placement_test!(in_every_order the_cpu_gives_the_bits_of_the_kernel, |placement| {
    let device = &placement.device;
    for n in [1, 255, 600, 40_000] {
        let mut uniform = Uniform::new(n as u64, [0, 0]);
        let mut numbers = |scale: f32| -> Vec<f32> {
            (0..n)
                .map(|i| {
                    let size = 10f32.powi(-(i as i32 % 7)) * scale;
                    (2.0 * uniform.next_f32() - 1.0) * size
                })
                .collect()
        };
        let start = numbers(0.02);
        let weight = vector(&start);
        let (high, low): (Vec<bf16>, Vec<i16>) = start.iter().map(|&w| split_master(w)).unzip();
        let high = Tensor::from_vec(high, n, device).unwrap();
        let low = Tensor::from_vec(low, n, device).unwrap();
        let on_cpu = Moments::zeros(n, &Device::Cpu).unwrap();
        let on_device = Moments::zeros(n, device).unwrap();
        for step in 1..=4 {
            let grad = vector(&numbers(1.0));
            let operand = Weight {
                value: &weight,
                low: None,
            };
            moments_8bit::forward(&update(step), operand, &grad, &on_cpu).unwrap();
            let halves = Weight {
                value: &high,
                low: Some(&low),
            };
            let grad = grad.to_device(device).unwrap();
            moments_8bit::forward(&update(step), halves, &grad, &on_device).unwrap();
            assert!(stored(&on_cpu) == stored(&on_device), "step {step} of {n}");
            let high: Vec<bf16> = high.to_vec1().unwrap();
            let low: Vec<i16> = low.to_vec1().unwrap();
            let masters = high.into_iter().zip(low).map(|(h, l)| join_master(h, l));
            let masters: Vec<f32> = masters.collect();
            assert!(bits(&masters) == bits(&values(&weight)), "step {step} of {n}");
        }
    }
});

/// Rank 64, so that some tensors are large enough for 8 bits and others are not.
fn config(output_dir: &Path, optim: Optim) -> TrainConfig {
    let case = ReferenceCase::read("llama_gqa").dir;
    TrainConfig {
        dataset: case.join("train/data.jsonl").into(),
        model_name_or_path: case,
        output_dir: output_dir.to_path_buf(),
        lora_r: Some(64),
        optim,
        learning_rate: 1e-3,
        per_device_train_batch_size: 2,
        gradient_accumulation_steps: 1,
        max_steps: 8,
        ..TrainConfig::default()
    }
}

#[test]
fn a_run_with_8_bit_moments_learns_as_one_with_f32_moments() {
    let dir = tempfile::tempdir().unwrap();
    let run = |optim| {
        let config = TrainConfig {
            per_device_train_batch_size: 16,
            learning_rate: 5e-3,
            ..config(dir.path(), optim)
        };
        trained(config, &Placement::cpu()).0
    };
    let (eight_bit, f32) = (run(Optim::Adamw8bit), run(Optim::AdamwTorch));
    assert!(eight_bit != f32);
    assert!(f32[7] < 0.98 * f32[0], "the run learns: {f32:?}");
    for (step, (a, b)) in eight_bit.iter().zip(&f32).enumerate() {
        assert!((a - b).abs() < 2e-3 * b, "step {step}: {a} and {b}");
    }
}

#[test]
fn large_tensors_are_stored_in_8_bits_and_small_ones_in_f32() {
    let dir = tempfile::tempdir().unwrap();
    let mut trainer =
        Trainer::new(config(dir.path(), Optim::Adamw8bit), &Placement::cpu()).unwrap();
    trainer.step().unwrap();
    let checkpoint = trainer.save_checkpoint().unwrap();
    let data = std::fs::read(checkpoint.join("optimizer.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&data).unwrap();
    let (mut large, mut small) = (0, 0);
    for (name, trainable) in trainer.decoder().trainables() {
        let n = trainable.value.elem_count();
        for kind in ["exp_avg", "exp_avg_sq"] {
            let moment = tensors.tensor(&format!("{kind}.{name}")).unwrap();
            let scales = tensors.tensor(&format!("{kind}_absmax.{name}"));
            assert_eq!(moment.shape(), trainable.value.dims(), "{name}");
            if n >= 4096 {
                large += 1;
                assert_eq!(moment.dtype(), Dtype::U8, "{name}");
                assert_eq!(scales.unwrap().shape(), [n.div_ceil(256)], "{name}");
            } else {
                small += 1;
                assert_eq!(moment.dtype(), Dtype::F32, "{name}");
                assert!(scales.is_err(), "{name}");
            }
        }
    }
    assert!(large > 0 && small > 0, "{large} and {small}");
}

/// From moments on the device and from paged ones, with the others and with the same.
fn a_run_resumes_bit_for_bit(at: &Placement) {
    const STEPS: i64 = 16;
    // The moments have grown by then: a code that is none of the tensor's would be the largest of its block.
    const SAVED: usize = 12;
    let dir = tempfile::tempdir().unwrap();
    // A rank that leaves the last block of the larger tensors half full.
    let config = |optim| TrainConfig {
        max_steps: STEPS,
        lora_r: Some(66),
        ..config(dir.path(), optim)
    };
    let (losses, adapter) = trained(config(Optim::Adamw8bit), at);
    for optim in [Optim::Adamw8bit, Optim::PagedAdamw8bit] {
        let mut first = Trainer::new(config(optim), at).unwrap();
        for loss in &losses[..SAVED] {
            assert_eq!(first.step().unwrap().loss, *loss);
        }
        let checkpoint = first.save_checkpoint().unwrap();
        for optim in [Optim::Adamw8bit, Optim::PagedAdamw8bit] {
            let resumed = TrainConfig {
                resume_from_checkpoint: Resume::From(checkpoint.clone()),
                ..config(optim)
            };
            let (rest, same_adapter) = trained(resumed, at);
            assert!(rest == losses[SAVED..] && same_adapter == adapter);
        }
    }
}

#[test]
fn a_run_with_8_bit_moments_resumes_bit_for_bit() {
    a_run_resumes_bit_for_bit(&Placement::cpu());
}

placement_test!(a_run_through_the_kernels_resumes_bit_for_bit, |placement| {
    assert_eq!(placement.dtype, DType::BF16);
    a_run_resumes_bit_for_bit(placement);
});

#[test]
fn lora_plus_moves_b_and_magnitudes_by_a_multiple_of_the_learning_rate() {
    const RATIO: f64 = 16.0;
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        (ReferenceCase::read("llama_gqa"), Optim::AdamwTorch),
        (ReferenceCase::read("llama_gqa"), Optim::Adamw8bit),
        (ReferenceCase::of_adapter("dora"), Optim::AdamwTorch),
    ];
    for (case, optim) in cases {
        let step = |loraplus_lr_ratio| {
            let config = TrainConfig {
                model_name_or_path: case.dir.clone(),
                adapter: Some(case.adapter.clone()),
                lora_r: None,
                loraplus_lr_ratio,
                ..config(dir.path(), optim)
            };
            let mut trainer = Trainer::new(config, &Placement::cpu()).unwrap();
            let masters = |trainer: &Trainer| -> Vec<(String, Vec<f32>)> {
                let trainables = trainer.decoder().trainables();
                let master = |(name, t): (String, &Trainable)| (name, t.master().unwrap());
                trainables.map(master).collect()
            };
            let before = masters(&trainer);
            trainer.step().unwrap();
            let moved = |((name, after), (_, before)): ((String, Vec<f32>), (String, Vec<f32>))| {
                (
                    name,
                    after
                        .iter()
                        .zip(&before)
                        .map(|(a, b)| a - b)
                        .collect::<Vec<f32>>(),
                )
            };
            masters(&trainer)
                .into_iter()
                .zip(before)
                .map(moved)
                .collect::<Vec<_>>()
        };
        let (plain, plus) = (step(None), step(Some(RATIO)));
        assert!(step(Some(1.0)) == plain);
        for ((name, plain), (_, plus)) in plain.iter().zip(&plus) {
            if !name.ends_with("lora_A.weight") {
                let expected: Vec<f32> = plain.iter().map(|d| RATIO as f32 * d).collect();
                let error = relative_error(plus, &expected);
                assert!(error < 1e-4, "{name}: {error}");
            } else {
                assert!(plus == plain, "{name}");
            }
        }
    }
}

#[test]
fn moments_of_another_optimizer_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let saved = |optim| {
        let mut trainer = Trainer::new(config(dir.path(), optim), &Placement::cpu()).unwrap();
        trainer.step().unwrap();
        trainer.save_checkpoint().unwrap()
    };
    for (before, after) in [
        (Optim::Adamw8bit, Optim::AdamwTorch),
        (Optim::AdamwTorch, Optim::Adamw8bit),
    ] {
        let config = TrainConfig {
            resume_from_checkpoint: Resume::From(saved(before)),
            resume_with_changes: true,
            ..config(dir.path(), after)
        };
        let error = Trainer::new(config, &Placement::cpu()).err().unwrap();
        assert!(error.to_string().contains("`exp_avg."), "{error}");
    }
}
