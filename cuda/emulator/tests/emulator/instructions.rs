//! Warp operations, tensor-core fragments, conversions and bit operations against plain Rust.

use crate::launches::{Arguments, ORDERS, launch_of, run};
use half::{bf16, f16};
use qlora_emulator::Order;

#[test]
fn shuffles_stay_within_their_segment() {
    let mut input: Vec<u32> = (0..32).map(|lane| 7 * lane + 3).collect();
    for order in ORDERS {
        for width in [32, 16, 8, 4, 2, 1] {
            for operand in 0..32 {
                let mut out = [0u32; 128];
                let arguments = Arguments::new()
                    .buffer(&mut input)
                    .number(operand)
                    .number(width)
                    .buffer(&mut out);
                run(&launch_of("shuffles", 1, order), &arguments).unwrap();
                let (operand, width) = (operand as usize, width as usize);
                for lane in 0..32 {
                    let begin = lane / width * width;
                    let end = begin + width;
                    let within = |source: usize| {
                        if (begin..end).contains(&source) {
                            source
                        } else {
                            lane
                        }
                    };
                    let flipped = lane ^ operand;
                    let sources = [
                        begin + operand % width,
                        lane.checked_sub(operand).map_or(lane, within),
                        within(lane + operand),
                        if flipped < end { flipped } else { lane },
                    ];
                    let got: Vec<u32> = (0..4).map(|kind| out[32 * kind + lane]).collect();
                    let expected: Vec<u32> = sources.iter().map(|&source| input[source]).collect();
                    assert_eq!(
                        got, expected,
                        "lane {lane}, operand {operand}, width {width}"
                    );
                }
            }
        }
    }
}

#[test]
fn votes_count_every_lane() {
    for (votes, expected) in [
        (0u32, [0, 0, 0]),
        (0x8000_0101, [0x8000_0101, 1, 0]),
        (u32::MAX, [u32::MAX, 1, 1]),
    ] {
        let mut input: Vec<u32> = (0..32).map(|lane| votes >> lane & 1).collect();
        let mut out = [0u32; 96];
        let arguments = Arguments::new().buffer(&mut input).buffer(&mut out);
        run(&launch_of("votes", 1, Order::Random(3)), &arguments).unwrap();
        for (kind, expected) in expected.into_iter().enumerate() {
            assert_eq!(out[32 * kind..][..32], [expected; 32]);
        }
    }
}

/// Small integers: every product and sum is exact.
fn integers(count: usize, step: usize) -> Vec<bf16> {
    (0..count)
        .map(|i| bf16::from_f32((i * step % 19) as f32 - 9.0))
        .collect()
}

#[test]
fn fragments_multiply_to_the_plain_product() {
    let (mut a, mut b) = (integers(16 * 16, 5), integers(16 * 8, 7));
    let mut c: Vec<f32> = (0..16 * 8).map(|i| i as f32 * 0.5).collect();
    for order in ORDERS {
        for is_b_transposed in [false, true] {
            let mut d = [f32::NAN; 16 * 8];
            let arguments = Arguments::new()
                .buffer(&mut a)
                .buffer(&mut b)
                .number(is_b_transposed.into())
                .buffer(&mut c)
                .buffer(&mut d);
            run(&launch_of("matrix_product", 1, order), &arguments).unwrap();
            for row in 0..16 {
                for column in 0..8 {
                    let b_at = |k: usize| {
                        if is_b_transposed {
                            b[16 * column + k]
                        } else {
                            b[8 * k + column]
                        }
                    };
                    let sum: f32 = (0..16)
                        .map(|k| a[16 * row + k].to_f32() * b_at(k).to_f32())
                        .sum();
                    assert_eq!(
                        d[8 * row + column],
                        c[8 * row + column] + sum,
                        "({row}, {column})"
                    );
                }
            }
        }
    }
}

/// PTX ISA, ldmatrix: lane i holds row i / 4, elements 2 (i % 4) and the next, of each matrix; with .trans of its transpose.
#[test]
fn matrix_loads_hand_each_lane_its_elements() {
    #[repr(align(16))]
    struct Rows([u16; 256]);
    let mut rows = Rows(std::array::from_fn(|i| i as u16));
    let (mut plain, mut transposed) = ([0u32; 128], [0u32; 128]);
    let arguments = Arguments::new()
        .buffer(&mut rows.0)
        .buffer(&mut plain)
        .buffer(&mut transposed);
    run(&launch_of("matrix_loads", 1, Order::Reverse), &arguments).unwrap();
    for lane in 0..32 {
        for matrix in 0..4 {
            let element = |row: u32, column: u32| 64 * matrix + 8 * row + column;
            let (line, pair) = (lane / 4, 2 * (lane % 4));
            let at = (4 * lane + matrix) as usize;
            assert_eq!(
                plain[at],
                element(line, pair) | element(line, pair + 1) << 16
            );
            assert_eq!(
                transposed[at],
                element(pair, line) | element(pair + 1, line) << 16
            );
        }
    }
}

/// A NaN may come back as any NaN.
fn is_same_half(got: u16, expected: u16, infinity: u16) -> bool {
    let is_nan = |bits: u16| bits & 0x7fff > infinity;
    got == expected || (is_nan(got) && is_nan(expected))
}

#[test]
fn floats_round_to_the_nearest_half() {
    // Every half, the two floats next to it, and the middle between it and the next half with its neighbours.
    let mut input: Vec<f32> = Vec::new();
    for bits in 0..=u16::MAX {
        let exact = f32::from_bits(u32::from(bits) << 16);
        let half = f16::from_bits(bits).to_f32();
        for base in [
            exact.to_bits(),
            exact.to_bits() | 0x8000,
            half.to_bits(),
            half.to_bits() | 0x1000,
        ] {
            input.extend([base.wrapping_sub(1), base, base.wrapping_add(1)].map(f32::from_bits));
        }
    }
    let count = input.len();
    let (mut to_bf16, mut to_f16) = (vec![0u16; count], vec![0u16; count]);
    let arguments = Arguments::new()
        .buffer(&mut input)
        .number(count as u64)
        .buffer(&mut to_bf16)
        .buffer(&mut to_f16);
    run(
        &launch_of(
            "float_conversions",
            count.div_ceil(256) as u32,
            Order::Forward,
        ),
        &arguments,
    )
    .unwrap();
    for (i, &value) in input.iter().enumerate() {
        assert!(
            is_same_half(to_bf16[i], bf16::from_f32(value).to_bits(), 0x7f80),
            "{value:e}"
        );
        assert!(
            is_same_half(to_f16[i], f16::from_f32(value).to_bits(), 0x7c00),
            "{value:e}"
        );
    }
}

#[test]
fn halves_become_their_float() {
    let (mut from_bf16, mut from_f16) = (vec![0f32; 1 << 16], vec![0f32; 1 << 16]);
    let arguments = Arguments::new()
        .buffer(&mut from_bf16)
        .buffer(&mut from_f16);
    run(
        &launch_of("half_conversions", 256, Order::Forward),
        &arguments,
    )
    .unwrap();
    let is_same = |got: f32, expected: f32| {
        got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan())
    };
    for bits in 0..=u16::MAX {
        let at = usize::from(bits);
        assert!(
            is_same(from_bf16[at], bf16::from_bits(bits).to_f32()),
            "{bits:04x}"
        );
        assert!(
            is_same(from_f16[at], f16::from_bits(bits).to_f32()),
            "{bits:04x}"
        );
    }
}

#[test]
fn bit_operations_are_those_of_the_gpu() {
    let (a, b) = (0x0012_8480_u32, 0xf0e1_d2c3_u32);
    let mut out = [0u32; 7];
    // Bytes 0 to 3 are those of `a`, 4 to 7 those of `b`; 8 added to a digit spreads the byte's sign.
    let selector = 0x708d_u64;
    let arguments = Arguments::new()
        .number(a.into())
        .number(b.into())
        .number(selector)
        .buffer(&mut out);
    run(&launch_of("bit_operations", 1, Order::Forward), &arguments).unwrap();
    let product = (u64::from(a) * u64::from(b)) >> 32;
    let permuted = 0xf0_80_ff_ff;
    let packed = 0xc000_3f80;
    let expected = [
        product as u32,
        a.count_ones(),
        a.leading_zeros(),
        a.trailing_zeros() + 1,
        a.reverse_bits(),
        permuted,
        packed,
    ];
    assert_eq!(out, expected);
}
