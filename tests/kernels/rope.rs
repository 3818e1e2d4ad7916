//! The kernel of `cuda/rope.cu` against the rotation in f64.

use half::bf16;

use crate::device_under_test::{Arg, Buffer, DeviceUnderTest, assert_kernel_close};
use crate::kernel_test;
use crate::random_values::{exact, random_bf16, round};

#[derive(Clone, Copy)]
struct Case {
    rows: usize,
    q_heads: usize,
    k_heads: usize,
    half: usize,
    /// Columns of a head behind those that turn.
    rest: usize,
    neighbours: bool,
}

impl Case {
    const fn of_neighbours(self) -> Self {
        Self {
            neighbours: true,
            ..self
        }
    }

    fn head_dim(&self) -> usize {
        2 * self.half + self.rest
    }
}

/// Grouped heads, one row, halves that are no whole vectors, rows without keys, and heads of which a part turns, and neighbours.
const CASES: [Case; 11] = [
    case(42, 6, 2, 16),
    case(1, 1, 1, 64),
    case(5, 3, 3, 10),
    case(7, 2, 1, 1),
    case(9, 4, 0, 40),
    with_rest(42, 6, 2, 24, 16),
    with_rest(5, 2, 1, 24, 6),
    with_rest(7, 3, 3, 3, 2),
    case(42, 6, 2, 16).of_neighbours(),
    with_rest(5, 2, 1, 24, 16).of_neighbours(),
    with_rest(7, 3, 3, 3, 2).of_neighbours(),
];

const fn case(rows: usize, q_heads: usize, k_heads: usize, half: usize) -> Case {
    with_rest(rows, q_heads, k_heads, half, 0)
}

const fn with_rest(rows: usize, q_heads: usize, k_heads: usize, half: usize, rest: usize) -> Case {
    Case {
        rows,
        q_heads,
        k_heads,
        half,
        rest,
        neighbours: false,
    }
}

const POSITIONS: usize = 100;

/// Cosines and sines of `[POSITIONS, half]` angles.
fn table(half: usize) -> [Vec<f32>; 2] {
    let angle = |i: usize| (i / half) as f64 * 10_000f64.powf(-((i % half) as f64) / half as f64);
    let table = |f: fn(f64) -> f64| (0..POSITIONS * half).map(|i| f(angle(i)) as f32).collect();
    [table(f64::cos), table(f64::sin)]
}

/// Positions in no order, some twice, as where several sequences lie in one batch.
fn positions(rows: usize) -> Vec<u32> {
    (0..rows)
        .map(|row| (row * row * 7 % POSITIONS) as u32)
        .collect()
}

fn rotated(x: &[bf16], heads: usize, case: Case, sign: f64) -> Vec<f64> {
    let (half, head_dim) = (case.half, case.head_dim());
    let [cos, sin] = table(half);
    let mut x = exact(x);
    if heads == 0 {
        return x;
    }
    let positions = positions(x.len() / (heads * head_dim));
    for (row, position) in x.chunks_exact_mut(heads * head_dim).zip(positions) {
        for head in row.chunks_exact_mut(head_dim) {
            for i in 0..half {
                let angle = position as usize * half + i;
                let (cos, sin) = (f64::from(cos[angle]), sign * f64::from(sin[angle]));
                let [a, b] = match case.neighbours {
                    false => [i, i + half],
                    true => [2 * i, 2 * i + 1],
                };
                let (x, y) = (head[a], head[b]);
                head[a] = x * cos - y * sin;
                head[b] = y * cos + x * sin;
            }
        }
    }
    x
}

fn rotate(device: &DeviceUnderTest, case: Case, [q, k]: [&Buffer; 2], sign: f32) {
    let [cos, sin] = table(case.half).map(|table| device.upload(&table));
    let positions = device.upload(&positions(case.rows));
    device.launch(
        "rope_rotate_bf16",
        [2, 1, 1],
        0,
        &[
            Arg::Buffer(q),
            if case.k_heads == 0 {
                Arg::Null
            } else {
                Arg::Buffer(k)
            },
            Arg::Buffer(&positions),
            Arg::Buffer(&cos),
            Arg::Buffer(&sin),
            Arg::U32(case.rows as u32),
            Arg::U32(case.q_heads as u32),
            Arg::U32(case.k_heads as u32),
            Arg::U32(case.half as u32),
            Arg::U32(case.head_dim() as u32),
            Arg::U32(case.neighbours.into()),
            Arg::F32(sign),
        ],
    );
}

kernel_test!(every_head_turns_by_the_angle_of_its_position, |device| {
    for case in CASES {
        for sign in [1.0, -1.0] {
            let heads = [case.q_heads, case.k_heads];
            let elements = |heads: usize| case.rows * heads * case.head_dim();
            let x = heads.map(|heads| random_bf16(heads as u32, elements(heads)));
            let [q, k] = [&x[0], &x[1]].map(|x| device.upload(x));
            rotate(device, case, [&q, &k], sign);
            for ((x, buffer), heads) in x.iter().zip([&q, &k]).zip(heads) {
                let expected = rotated(x, heads, case, sign.into());
                let got = device.download::<bf16>(buffer);
                if heads > 0 {
                    assert_kernel_close("x", &got, &expected, &round(&expected));
                }
            }
        }
    }
});

kernel_test!(the_opposite_angle_turns_back, |device| {
    let case = CASES[0];
    let x = random_bf16(1, case.rows * case.q_heads * 2 * case.half);
    let q = device.upload(&x);
    let case = Case { k_heads: 0, ..case };
    rotate(device, case, [&q, &q], 1.0);
    rotate(device, case, [&q, &q], -1.0);
    for (got, x) in device.download::<bf16>(&q).iter().zip(x) {
        let error = (got.to_f32() - x.to_f32()).abs();
        assert!(error < 0.04, "{x} came back as {got}");
    }
});
