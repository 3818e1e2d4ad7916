//! Laws of the 4-bit format that hold for any weight.

use bytes::Bytes;
use candle_core::DType;
use half::bf16;
use proptest::prelude::*;
use qlora::{
    Error,
    quant::{
        Absmax, DenseTensor, DoubleQuant, FrozenWeight, NESTED_BLOCK_SIZE, Params4bit, QuantType,
        QuantizeOptions,
    },
};

fn options() -> impl Strategy<Value = QuantizeOptions> {
    (
        prop::sample::select(vec![QuantType::Nf4, QuantType::Fp4]),
        prop::sample::select(vec![32usize, 64, 128, 1024, 4096]),
        prop::sample::select(vec![DoubleQuant::No, DoubleQuant::Yes]),
    )
        .prop_map(|(quant_type, block_size, double_quant)| QuantizeOptions {
            quant_type,
            block_size,
            double_quant,
        })
}

/// Values of very different sizes, zeros among them.
fn values(max_len: usize) -> impl Strategy<Value = Vec<f32>> {
    let value = (-1.0f32..1.0, -8i32..8, 0..10).prop_map(|(v, exponent, zero)| {
        if zero == 0 {
            0.0
        } else {
            v * 2f32.powi(exponent)
        }
    });
    prop::collection::vec(value, 1..max_len)
}

fn quantize(values: &[f32], options: QuantizeOptions) -> Params4bit {
    let weight = DenseTensor::from_f32(vec![values.len()], values);
    let quantized = Params4bit::quantize("w", &weight, options).unwrap();
    quantized.validate("w").unwrap();
    quantized
}

fn dequantize(weight: &Params4bit) -> Vec<f32> {
    let mut out = vec![f32::NAN; weight.numel()];
    weight.dequantize(&mut out);
    out
}

/// Everything of a quantized weight, as bytes.
fn stored_bytes(weight: &Params4bit) -> Vec<u8> {
    let mut bytes = weight.packed.to_vec();
    match &weight.absmax {
        Absmax::Single(absmax) => bytes.extend_from_slice(absmax),
        Absmax::Double {
            codes,
            nested_absmax,
            offset,
            ..
        } => {
            bytes.extend_from_slice(codes);
            bytes.extend(nested_absmax.iter().flat_map(|a| a.to_le_bytes()));
            bytes.extend(offset.to_le_bytes());
        }
    }
    bytes
}

proptest! {
    #[test]
    fn a_range_equals_the_slice_of_the_whole(
        values in values(5000), options in options(),
        start in any::<prop::sample::Index>(), end in any::<prop::sample::Index>(),
    ) {
        let weight = quantize(&values, options);
        let whole = dequantize(&weight);
        let start = start.index(values.len());
        let end = end.index(values.len() + 1).max(start);
        let mut range = vec![f32::NAN; end - start];
        weight.dequantize_range(start, &mut range);
        prop_assert_eq!(&range, &whole[start..end]);
    }

    #[test]
    fn a_tile_equals_its_rows_and_columns_of_the_whole(
        rows in 1usize..12, cols in 1usize..200, options in options(),
        r in any::<(prop::sample::Index, prop::sample::Index)>(),
        c in any::<(prop::sample::Index, prop::sample::Index)>(),
    ) {
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 64.0).collect();
        let dense = DenseTensor::from_f32(vec![rows, cols], &values);
        let quantized = Params4bit::quantize("w", &dense, options).unwrap();
        let (r0, c0) = (r.0.index(rows), c.0.index(cols));
        let (r1, c1) = (r.1.index(rows + 1).max(r0), c.1.index(cols + 1).max(c0));
        for (weight, whole) in [
            (FrozenWeight::Quantized(quantized.clone()), dequantize(&quantized)),
            (FrozenWeight::Dense(dense), values),
        ] {
            let mut tile = vec![f32::NAN; (r1 - r0) * (c1 - c0)];
            weight.read_tile(r0..r1, c0..c1, &mut tile);
            let expected: Vec<f32> = (r0..r1).flat_map(|r| whole[r * cols + c0..r * cols + c1].to_vec()).collect();
            prop_assert_eq!(tile, expected);
        }
    }

    #[test]
    fn dense_reads_widen_exactly_at_any_alignment(bits in prop::collection::vec(any::<u16>(), 1..600), shift in 0usize..4) {
        for dtype in [DType::BF16, DType::F16] {
            let mut data = vec![0; shift];
            data.extend(bits.iter().flat_map(|b| b.to_le_bytes()));
            let tensor = DenseTensor { dtype, shape: vec![bits.len()], data: Bytes::from(data).slice(shift..) };
            tensor.validate("w").unwrap();
            let start = bits.len() / 3;
            let mut out = vec![0.0; bits.len() - start];
            tensor.read_range(start, &mut out);
            for (&out, &bits) in out.iter().zip(&bits[start..]) {
                let expected = match dtype {
                    DType::BF16 => bf16::from_bits(bits).to_f32(),
                    _ => half::f16::from_bits(bits).to_f32(),
                };
                prop_assert!(out.to_bits() == expected.to_bits() || out.is_nan() && expected.is_nan());
            }
        }
    }

    #[test]
    fn without_double_quantization_a_second_round_trip_changes_no_value(
        values in values(3000), quant_type in prop::sample::select(vec![QuantType::Nf4, QuantType::Fp4]),
    ) {
        let options = QuantizeOptions { quant_type, double_quant: DoubleQuant::No, ..Default::default() };
        let once = dequantize(&quantize(&values, options));
        let twice = dequantize(&quantize(&once, options));
        prop_assert_eq!(once, twice);
    }

    #[test]
    fn an_error_is_at_most_half_the_widest_step_of_the_code(values in values(3000)) {
        let options = QuantizeOptions { double_quant: DoubleQuant::No, ..Default::default() };
        let dequantized = dequantize(&quantize(&values, options));
        for (block, dequantized) in values.chunks(64).zip(dequantized.chunks(64)) {
            let absmax = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            for (a, b) in block.iter().zip(dequantized) {
                prop_assert!((a - b).abs() <= 0.152 * absmax, "{a} became {b} in a block up to {absmax}");
            }
        }
    }

    #[test]
    fn validation_accepts_no_other_length(values in values(3000), options in options(), part in 0..3, longer: bool) {
        let resize = |data: &Bytes| {
            let mut data = data.to_vec();
            data.resize(if longer { data.len() + 1 } else { data.len() - 1 }, 0);
            Bytes::from(data)
        };
        let mut weight = quantize(&values, options);
        match (part, &mut weight.absmax) {
            (0, _) => weight.packed = resize(&weight.packed),
            (_, Absmax::Single(absmax)) => *absmax = resize(absmax),
            (1, Absmax::Double { codes, .. }) => *codes = resize(codes),
            (_, Absmax::Double { nested_absmax, .. }) if longer => nested_absmax.push(1.0),
            (_, Absmax::Double { nested_absmax, .. }) => { nested_absmax.pop(); }
        }
        let error = weight.validate("w").unwrap_err();
        prop_assert!(matches!(error, Error::TensorMismatch { .. }), "{error}");
    }

    #[test]
    fn hostile_sizes_are_refused_without_overflow(
        shape in prop::collection::vec(prop::sample::select(vec![2usize, 1 << 20, 1 << 31, 1 << 62, usize::MAX]), 2..5),
        block_size in prop::sample::select(vec![0usize, 1, 31, 33, 64, 8192, usize::MAX]),
        nested_block_size in prop::sample::select(vec![0usize, 1, 256, usize::MAX]),
    ) {
        let mut weight = quantize(&[1.0; 100], QuantizeOptions::default());
        weight.shape = shape.clone();
        weight.block_size = block_size;
        if let Absmax::Double { nested_block_size: size, .. } = &mut weight.absmax {
            *size = nested_block_size;
        }
        prop_assert!(weight.validate("w").is_err());
        let dense = DenseTensor { dtype: DType::F32, shape, data: Bytes::from_static(&[0; 60]) };
        prop_assert!(dense.validate("w").is_err());
    }
}

#[test]
fn quantization_does_not_depend_on_the_number_of_threads() {
    let values: Vec<bf16> = (0..1031 * 257u32)
        .map(|i| {
            bf16::from_f32((i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32 - 0.5)
        })
        .collect();
    let weight = DenseTensor::from_bf16(vec![1031, 257], &values);
    let with_threads = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let quantized = Params4bit::quantize("w", &weight, QuantizeOptions::default()).unwrap();
            (stored_bytes(&quantized), dequantize(&quantized))
        })
    };
    let one = with_threads(1);
    let blocks = values.len().div_ceil(64);
    assert_eq!(
        one.0.len(),
        values.len().div_ceil(2) + blocks + 4 * blocks.div_ceil(NESTED_BLOCK_SIZE) + 4
    );
    assert!(one == with_threads(2));
    assert!(one == with_threads(5));
}

#[test]
fn the_first_value_that_is_not_finite_is_named() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = vec![0.25; 300_000];
        values[70_001] = bad;
        values[70_003] = f32::NAN;
        values[299_999] = f32::INFINITY;
        let weight = DenseTensor::from_f32(vec![300, 1000], &values);
        let error =
            Params4bit::quantize("layer.weight", &weight, QuantizeOptions::default()).unwrap_err();
        let Error::NonFinite {
            tensor,
            index,
            value,
        } = error
        else {
            panic!("{error}")
        };
        assert_eq!((tensor.as_str(), index), ("layer.weight", 70_001));
        assert_eq!(value.to_bits(), bad.to_bits());
    }
}

#[test]
fn block_sizes_beyond_the_format_are_refused() {
    let weight = DenseTensor::from_f32(vec![4], &[1.0; 4]);
    for block_size in [0, 16, 48, 8192] {
        let options = QuantizeOptions {
            block_size,
            ..Default::default()
        };
        let error = Params4bit::quantize("w", &weight, options).unwrap_err();
        assert!(matches!(error, Error::Config { .. }), "{error}");
    }
}

#[test]
fn a_double_quantized_weight_takes_4_127_bits_an_element() {
    let weight = quantize(&vec![0.5; 1 << 20], QuantizeOptions::default());
    let bits = weight.nbytes() as f64 * 8.0 / weight.numel() as f64;
    assert!((bits - 4.127).abs() < 0.001, "{bits}");
}
