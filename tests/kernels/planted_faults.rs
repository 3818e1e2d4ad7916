//! Every fault of `cuda/emulator/src/planted_faults.rs` is noticed in some order of the threads; the kernel without it is the
//! same in all.

use std::cell::{Cell, OnceCell};

use bytemuck::Pod;
use half::bf16;
use qlora_emulator::planted_faults::FAULTS;

use crate::device_under_test::{Arg, Buffer, DeviceUnderTest};
use crate::random_values::{random, random_bf16};

/// A launch whose results a fault has to change.
struct Case {
    kernel: &'static str,
    grid: [u32; 3],
    shared_bytes: usize,
    values: Vec<Value>,
}

enum Value {
    /// What a buffer holds before.
    Bytes(Vec<u8>),
    Null,
    U32(u32),
    U64(u64),
    F32(f32),
}

fn bytes<T: Pod>(values: &[T]) -> Value {
    Value::Bytes(bytemuck::cast_slice(values).to_vec())
}

fn poisoned<T>(len: usize) -> Value {
    Value::Bytes(vec![0xff; len * size_of::<T>()])
}

impl Case {
    fn of(fault: &str) -> Self {
        match fault {
            "table_without_barrier" => dequantize(),
            "sum_without_barrier" => mean(),
            "gradient_without_barrier" => gradient(),
            "keys_without_wait" => attention(),
            "last_vector_unbounded" => residual(),
            "row_one_too_long" => gather(),
            other => panic!("there is no case for the planted fault {other}"),
        }
    }

    fn of_one_block(kernel: &'static str, values: Vec<Value>) -> Self {
        Self {
            kernel,
            grid: [1, 1, 1],
            shared_bytes: 0,
            values,
        }
    }

    /// Every buffer after a launch, or how the launch or a guard tells that something is wrong.
    fn run(&self, device: &DeviceUnderTest, kernel: &str) -> Result<Vec<Vec<u8>>, String> {
        let upload = |value: &Value| match value {
            Value::Bytes(bytes) => Some(device.upload(bytes)),
            _ => None,
        };
        let buffers: Vec<Option<Buffer>> = self.values.iter().map(upload).collect();
        let arg = |(value, buffer)| match (value, buffer) {
            (_, &Some(ref buffer)) => Arg::Buffer(buffer),
            (&Value::U32(value), _) => Arg::U32(value),
            (&Value::U64(value), _) => Arg::U64(value),
            (&Value::F32(value), _) => Arg::F32(value),
            (Value::Null | Value::Bytes(_), None) => Arg::Null,
        };
        let args: Vec<Arg> = self.values.iter().zip(&buffers).map(arg).collect();
        device
            .try_launch(kernel, self.grid, self.shared_bytes, &args)
            .map_err(|fault| fault.to_string())?;
        let read = |buffer: &Buffer| buffer.read().map_err(|()| "a damaged guard".to_string());
        buffers.iter().flatten().map(read).collect()
    }
}

fn dequantize() -> Case {
    let n = 8192;
    let packed: Vec<u8> = (0..n / 2).map(|i| (i * 37) as u8).collect();
    Case::of_one_block(
        "nf4_dequantize_bf16",
        vec![
            bytes(&packed),
            Value::Null,
            bytes(&random(1, n / 64)),
            Value::Null,
            bytes(&random(2, 16)),
            Value::F32(0.0),
            Value::U32(6),
            Value::U32(256),
            Value::U64(n as u64),
            poisoned::<bf16>(n),
        ],
    )
}

fn mean() -> Case {
    let values = random(1, 3000);
    Case::of_one_block(
        "nf4_absmax_mean",
        vec![
            bytes(&values),
            Value::U64(values.len() as u64),
            poisoned::<f32>(1),
        ],
    )
}

fn gradient() -> Case {
    let logits = random(1, 8196);
    Case::of_one_block(
        "linear_cross_entropy_backward_f32",
        vec![
            bytes(&logits),
            bytes(&[5u32]),
            Value::U32(1),
            Value::U32(logits.len() as u32),
            Value::F32(1.0),
            poisoned::<f32>(1),
            poisoned::<f32>(1),
            poisoned::<u32>(1),
        ],
    )
}

/// One head of 64 columns and 42 positions.
fn attention() -> Case {
    let (positions, head_dim) = (42, 64);
    let matrix = |stream| bytes(&random_bf16(stream, positions * head_dim));
    let tile = [0, positions as u32, 0, positions as u32, 0];
    Case {
        shared_bytes: 49_152,
        ..Case::of_one_block(
            "attention_forward_bf16_64",
            vec![
                matrix(1),
                matrix(2),
                matrix(3),
                bytes(&tile),
                Value::U32(1),
                Value::U32(1),
                Value::U32(head_dim as u32),
                Value::F32(0.125),
                Value::U32(0),
                Value::F32(0.0),
                poisoned::<bf16>(positions * head_dim),
                poisoned::<f32>(positions),
            ],
        )
    }
}

fn residual() -> Case {
    let n = 42;
    Case::of_one_block(
        "residual_forward_bf16",
        vec![
            bytes(&random_bf16(1, n)),
            bytes(&random_bf16(2, n)),
            Value::U64(n as u64),
        ],
    )
}

fn gather() -> Case {
    let (rows, d) = (2, 37);
    Case {
        grid: [rows as u32, 1, 1],
        ..Case::of_one_block(
            "embedding_gather_bf16",
            vec![
                bytes(&random_bf16(1, 3 * d)),
                bytes(&[1u32, 0]),
                Value::U32(rows as u32),
                Value::U32(d as u32),
                poisoned::<bf16>(rows * d),
            ],
        )
    }
}

#[test]
fn every_planted_fault_is_noticed() {
    for fault in FAULTS {
        let case = Case::of(fault.name);
        let mutant = format!("{}@{}", case.kernel, fault.name);
        let right = OnceCell::new();
        let is_noticed = Cell::new(false);
        DeviceUnderTest::on_the_emulator(|device| {
            let result = case.run(device, case.kernel).unwrap();
            let right = right.get_or_init(|| result.clone());
            assert!(result == *right, "{} depends on the order", case.kernel);
            if case.run(device, &mutant).as_ref() != Ok(right) {
                is_noticed.set(true);
            }
        });
        assert!(is_noticed.get(), "{} went unnoticed", fault.name);
    }
}
