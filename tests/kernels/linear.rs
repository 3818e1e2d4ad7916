//! The kernel of `cuda/linear.cu` gives the bits of a sum in f32, rounded once.

use half::bf16;

use crate::device_under_test::Arg;
use crate::kernel_test;
use crate::random_values::{random, random_bf16};

/// (rows, row length): whole vectors of eight, odd rows, and more than one block takes at once.
const SIZES: [(usize, usize); 5] = [(1, 1), (42, 64), (5, 37), (3, 4), (3, 2056)];

kernel_test!(every_row_takes_up_the_bias, |device| {
    for (rows, d) in SIZES {
        let (y, bias) = (random_bf16(1, rows * d), random(2, d));
        let sum = |(i, y): (usize, &bf16)| bf16::from_f32(y.to_f32() + bias[i % d]);
        let expected: Vec<bf16> = y.iter().enumerate().map(sum).collect();
        let (y, bias) = (device.upload(&y), device.upload(&bias));
        device.launch(
            "linear_add_bias_bf16",
            [2, 1, 1],
            0,
            &[
                Arg::Buffer(&y),
                Arg::Buffer(&bias),
                Arg::U32(rows as u32),
                Arg::U32(d as u32),
            ],
        );
        assert_eq!(device.download::<bf16>(&y), expected, "{rows} rows of {d}");
    }
});
