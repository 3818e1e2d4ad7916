//! The kernels of `cuda/nf4.cu` give the bits of [`qlora::quant`], also on the fixtures of bitsandbytes.

use std::path::Path;

use bytemuck::Pod;
use bytes::Bytes;
use candle_core::DType;
use half::{bf16, f16};
use qlora::quant::{
    Absmax, DenseTensor, DequantizeTo, DoubleQuant, NESTED_BLOCK_SIZE, Params4bit, QuantType,
    QuantizeOptions, dynamic_map,
};
use safetensors::{Dtype, SafeTensors};

use crate::device_under_test::{Arg, DeviceUnderTest};
use crate::kernel_test;

/// (elements, block size): one element, odd tails, a short last block, whole spans of 1024 and a part of one, blocks that
/// are larger than a span, and more spans than the warps of a launch take at once.
const SIZES: [(usize, usize); 12] = [
    (1, 64),
    (2, 32),
    (63, 64),
    (455, 64),
    (1023, 32),
    (1024, 32),
    (1025, 64),
    (3000, 128),
    (4096, 1024),
    (4195, 2048),
    (12_289, 4096),
    (40_001, 64),
];

const QUANT_TYPES: [QuantType; 2] = [QuantType::Nf4, QuantType::Fp4];

/// Launches of one block of threads and of several give the same bits.
const GRIDS: [u32; 2] = [1, 3];

/// A type of weights that the kernels read and write.
trait Element: DequantizeTo + Pod {
    const ZERO: Self;
    const SUFFIX: &str;
}

impl Element for f32 {
    const ZERO: f32 = 0.0;
    const SUFFIX: &str = "f32";
}

impl Element for bf16 {
    const ZERO: bf16 = bf16::ZERO;
    const SUFFIX: &str = "bf16";
}

impl Element for f16 {
    const ZERO: f16 = f16::ZERO;
    const SUFFIX: &str = "f16";
}

/// Uniform values; each run of 64 has a size of its own, and some are zeros or subnormals.
fn values(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    (0..n)
        .map(|i| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let uniform = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
            match i / 64 % 8 {
                3 => 0.0,
                5 => uniform * 1e-39,
                size => uniform * 10f32.powi(size as i32 - 4),
            }
        })
        .collect()
}

/// The same values in each type.
fn weights(n: usize) -> [DenseTensor; 3] {
    let values = values(n);
    let bf16s: Vec<_> = values.iter().map(|&v| bf16::from_f32(v)).collect();
    let f16s: Vec<_> = values.iter().map(|&v| f16::from_f32(v)).collect();
    [
        DenseTensor::from_f32(vec![n], &values),
        DenseTensor::from_bf16(vec![n], &bf16s),
        DenseTensor::from_f16(vec![n], &f16s),
    ]
}

fn options(quant_type: QuantType, block_size: usize, double_quant: DoubleQuant) -> QuantizeOptions {
    QuantizeOptions {
        quant_type,
        block_size,
        double_quant,
    }
}

fn quantize_by_library(weight: &DenseTensor, options: QuantizeOptions) -> Params4bit {
    Params4bit::quantize("w", weight, options).unwrap()
}

fn single_absmax(weight: &Params4bit) -> Vec<f32> {
    let Absmax::Single(bytes) = &weight.absmax else {
        panic!("double quantization was not asked for")
    };
    let (values, _) = bytes.as_chunks();
    values.iter().map(|&v| f32::from_le_bytes(v)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// What `nf4_quantize` makes of a weight.
struct Quantized {
    packed: Vec<u8>,
    absmax: Vec<f32>,
    first_non_finite: u64,
}

fn quantize(
    device: &DeviceUnderTest,
    weight: &DenseTensor,
    quant_type: QuantType,
    block_size: usize,
    grid: u32,
) -> Quantized {
    let kernel = match weight.dtype {
        DType::F32 => "nf4_quantize_f32",
        DType::BF16 => "nf4_quantize_bf16",
        DType::F16 => "nf4_quantize_f16",
        other => panic!("{other:?}"),
    };
    let n = weight.numel();
    let w = device.upload::<u8>(&weight.data);
    let packed = device.poisoned::<u8>(n.div_ceil(2));
    let absmax = device.poisoned::<f32>(n.div_ceil(block_size));
    let first_non_finite = device.upload(&[u64::MAX]);
    device.launch(
        kernel,
        [grid, 1, 1],
        0,
        &[
            Arg::Buffer(&w),
            Arg::U64(n as u64),
            Arg::U32(block_size.ilog2()),
            Arg::U32(u32::from(quant_type == QuantType::Fp4)),
            Arg::Buffer(&packed),
            Arg::Buffer(&absmax),
            Arg::Buffer(&first_non_finite),
        ],
    );
    Quantized {
        packed: device.download(&packed),
        absmax: device.download(&absmax),
        first_non_finite: device.download(&first_non_finite)[0],
    }
}

/// What `nf4_dequantize` makes of a weight.
fn dequantize<T: Element>(device: &DeviceUnderTest, weight: &Params4bit, grid: u32) -> Vec<T> {
    let packed = device.upload::<u8>(&weight.packed);
    let code = device.upload(weight.quant_type.code());
    let dynamic_map = device.upload(dynamic_map());
    let (codes, absmax, nested_block_size, offset) = match &weight.absmax {
        Absmax::Single(_) => (None, device.upload(&single_absmax(weight)), 0, 0.0),
        Absmax::Double {
            codes,
            nested_absmax,
            nested_block_size,
            offset,
        } => (
            Some(device.upload::<u8>(codes)),
            device.upload(nested_absmax),
            *nested_block_size,
            *offset,
        ),
    };
    let out = device.poisoned::<T>(weight.numel());
    device.launch(
        &format!("nf4_dequantize_{}", T::SUFFIX),
        [grid, 1, 1],
        0,
        &[
            Arg::Buffer(&packed),
            codes.as_ref().map_or(Arg::Null, Arg::Buffer),
            Arg::Buffer(&absmax),
            Arg::Buffer(&dynamic_map),
            Arg::Buffer(&code),
            Arg::F32(offset),
            Arg::U32(weight.block_size.ilog2()),
            Arg::U32(nested_block_size as u32),
            Arg::U64(weight.numel() as u64),
            Arg::Buffer(&out),
        ],
    );
    device.download(&out)
}

fn assert_dequantizes_as_the_library<T: Element>(device: &DeviceUnderTest, weight: &Params4bit) {
    let mut expected = vec![T::ZERO; weight.numel()];
    weight.dequantize(&mut expected);
    for grid in GRIDS {
        let ours = dequantize::<T>(device, weight, grid);
        assert!(
            bytemuck::cast_slice::<T, u8>(&ours) == bytemuck::cast_slice::<T, u8>(&expected),
            "{} elements in blocks of {} to {}",
            weight.numel(),
            weight.block_size,
            T::SUFFIX,
        );
    }
}

kernel_test!(dequantized_weights_have_the_bits_of_the_library, |device| {
    for (n, block_size) in SIZES {
        let [dense, ..] = weights(n);
        for quant_type in QUANT_TYPES {
            for double_quant in [DoubleQuant::No, DoubleQuant::Yes] {
                let weight =
                    quantize_by_library(&dense, options(quant_type, block_size, double_quant));
                assert_dequantizes_as_the_library::<f32>(device, &weight);
                assert_dequantizes_as_the_library::<bf16>(device, &weight);
                assert_dequantizes_as_the_library::<f16>(device, &weight);
            }
        }
    }
});

kernel_test!(any_nested_block_size_is_dequantized, |device| {
    let n: usize = 9000;
    let blocks = n.div_ceil(64);
    for nested_block_size in [1, 7, 100, 1 << 20] {
        let weight = Params4bit {
            packed: (0..n / 2).map(|i| (i * 37) as u8).collect(),
            absmax: Absmax::Double {
                codes: (0..blocks).map(|i| (i * 11) as u8).collect(),
                nested_absmax: (0..blocks.div_ceil(nested_block_size))
                    .map(|i| 0.01 + 0.001 * i as f32)
                    .collect(),
                nested_block_size,
                offset: 0.07,
            },
            quant_type: QuantType::Nf4,
            block_size: 64,
            dtype: DType::BF16,
            shape: vec![n],
        };
        weight.validate("w").unwrap();
        assert_dequantizes_as_the_library::<bf16>(device, &weight);
    }
});

kernel_test!(quantized_weights_have_the_bits_of_the_library, |device| {
    for (n, block_size) in SIZES {
        for weight in weights(n) {
            for quant_type in QUANT_TYPES {
                let options = options(quant_type, block_size, DoubleQuant::No);
                let expected = quantize_by_library(&weight, options);
                for grid in GRIDS {
                    let ours = quantize(device, &weight, quant_type, block_size, grid);
                    let case = format!("{n} {:?} in blocks of {block_size}", weight.dtype);
                    assert_eq!(
                        bits(&ours.absmax),
                        bits(&single_absmax(&expected)),
                        "{case}"
                    );
                    assert_eq!(ours.packed, expected.packed, "{case}");
                    assert_eq!(ours.first_non_finite, u64::MAX, "{case}");
                }
            }
        }
    }
});

kernel_test!(the_first_value_that_is_not_finite_is_found, |device| {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = values(5001);
        for i in [2307, 2309, 5000] {
            values[i] = bad;
        }
        let weight = DenseTensor::from_f32(vec![values.len()], &values);
        let ours = quantize(device, &weight, QuantType::Nf4, 64, 2);
        assert_eq!(ours.first_non_finite, 2307, "{bad}");
    }
});

kernel_test!(scales_have_the_codes_of_the_library, |device| {
    // One scale, all equal, a short and a whole nested block, and more scales than the mean has threads.
    for (n, block_size) in [
        (40, 64),
        (96, 32),
        (255 * 32, 32),
        (256 * 32, 32),
        (257 * 64, 64),
        (2500 * 32 - 1, 32),
    ] {
        let [mut weight, ..] = weights(n);
        if n == 96 {
            weight = DenseTensor::from_f32(vec![n], &vec![0.5; n]);
        }
        let [single, double] = [DoubleQuant::No, DoubleQuant::Yes].map(|double_quant| {
            quantize_by_library(&weight, options(QuantType::Nf4, block_size, double_quant))
        });
        let Absmax::Double {
            codes: expected_codes,
            nested_absmax: expected_nested_absmax,
            offset: expected_offset,
            ..
        } = double.absmax
        else {
            panic!("double quantization was asked for")
        };

        let absmax = single_absmax(&single);
        let m = absmax.len();
        let map = dynamic_map();
        let lower_bounds: Vec<f32> = (0..256)
            .map(|k| match k {
                0 => f32::NEG_INFINITY,
                _ => 0.5 * (map[k - 1] + map[k]),
            })
            .collect();
        let absmax = device.upload(&absmax);
        let lower_bounds = device.upload(&lower_bounds);
        let offset = device.poisoned::<f32>(1);
        let codes = device.poisoned::<u8>(m);
        let nested_absmax = device.poisoned::<f32>(m.div_ceil(NESTED_BLOCK_SIZE));
        device.launch(
            "nf4_absmax_mean",
            [1, 1, 1],
            0,
            &[
                Arg::Buffer(&absmax),
                Arg::U64(m as u64),
                Arg::Buffer(&offset),
            ],
        );
        device.launch(
            "nf4_quantize_absmax",
            [m.div_ceil(NESTED_BLOCK_SIZE) as u32, 1, 1],
            0,
            &[
                Arg::Buffer(&absmax),
                Arg::U64(m as u64),
                Arg::Buffer(&offset),
                Arg::Buffer(&lower_bounds),
                Arg::Buffer(&codes),
                Arg::Buffer(&nested_absmax),
            ],
        );
        assert_eq!(
            bits(&device.download(&offset)),
            bits(&[expected_offset]),
            "{m} scales"
        );
        assert_eq!(
            bits(&device.download(&nested_absmax)),
            bits(&expected_nested_absmax),
            "{m} scales"
        );
        assert_eq!(device.download::<u8>(&codes), expected_codes, "{m} scales");
    }
});

/// A fixture of `tests/fixtures/make_quant.py`.
struct Fixture {
    name: String,
    quant_type: QuantType,
    data: Vec<u8>,
}

impl Fixture {
    fn all() -> Vec<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quant");
        let fixtures: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                let quant_type = match name.contains(".nf4.") {
                    true => QuantType::Nf4,
                    false => QuantType::Fp4,
                };
                Self {
                    name,
                    quant_type,
                    data: std::fs::read(&path).unwrap(),
                }
            })
            .collect();
        assert_eq!(fixtures.len(), 52, "every fixture is found");
        fixtures
    }

    fn bytes(&self, tensor: &str) -> Bytes {
        let tensors = SafeTensors::deserialize(&self.data).unwrap();
        Bytes::copy_from_slice(tensors.tensor(tensor).unwrap().data())
    }

    fn f32s(&self, tensor: &str) -> Vec<f32> {
        let bytes = self.bytes(tensor);
        let (values, _) = bytes.as_chunks();
        values.iter().map(|&v| f32::from_le_bytes(v)).collect()
    }

    fn input(&self) -> DenseTensor {
        let tensors = SafeTensors::deserialize(&self.data).unwrap();
        let input = tensors.tensor("input").unwrap();
        DenseTensor {
            dtype: match input.dtype() {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::BF16,
                other => panic!("{other:?}"),
            },
            shape: input.shape().to_vec(),
            data: self.bytes("input"),
        }
    }

    /// The weight that bitsandbytes stored.
    fn stored(&self) -> Params4bit {
        let state = self.bytes(match self.quant_type {
            QuantType::Nf4 => "weight.quant_state.bitsandbytes__nf4",
            QuantType::Fp4 => "weight.quant_state.bitsandbytes__fp4",
        });
        let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
        let input = self.input();
        Params4bit {
            packed: self.bytes("weight"),
            absmax: Absmax::Double {
                codes: self.bytes("weight.absmax"),
                nested_absmax: self.f32s("weight.nested_absmax"),
                nested_block_size: state["nested_blocksize"].as_u64().unwrap() as usize,
                offset: state["nested_offset"].as_f64().unwrap() as f32,
            },
            quant_type: self.quant_type,
            block_size: state["blocksize"].as_u64().unwrap() as usize,
            dtype: input.dtype,
            shape: input.shape,
        }
    }
}

kernel_test!(
    fixtures_of_bitsandbytes_are_quantized_to_their_codes,
    |device| {
        for fixture in Fixture::all() {
            let block_size = fixture.stored().block_size;
            let ours = quantize(device, &fixture.input(), fixture.quant_type, block_size, 1);
            assert_eq!(
                ours.packed,
                fixture.bytes("spec.packed"),
                "{}",
                fixture.name
            );
        }
    }
);

kernel_test!(
    fixtures_of_bitsandbytes_are_dequantized_to_their_values,
    |device| {
        for fixture in Fixture::all() {
            let weight = fixture.stored();
            let ours: Vec<u8> = match weight.dtype {
                DType::F32 => bytemuck::cast_slice(&dequantize::<f32>(device, &weight, 1)).to_vec(),
                DType::BF16 => {
                    bytemuck::cast_slice(&dequantize::<bf16>(device, &weight, 1)).to_vec()
                }
                _ => bytemuck::cast_slice(&dequantize::<f16>(device, &weight, 1)).to_vec(),
            };
            assert_eq!(ours, fixture.bytes("dequant"), "{}", fixture.name);
        }
    }
);
