//! The kernels of `cuda/rms_norm.cu` against the formulas in f64.

use half::bf16;

use crate::device_under_test::{Arg, Buffer, DeviceUnderTest, assert_kernel_close};
use crate::kernel_test;
use crate::random_values::{exact, random, random_bf16, round};

/// Large enough to be seen in every result.
const EPS: f32 = 0.1;

/// (rows, row length): a warp for each row up to 1024 elements, a block above, what threads do not hold above 8192; rows of
/// whole vectors of eight, and others.
const SIZES: [(usize, usize); 10] = [
    (1, 1),
    (42, 64),
    (9, 37),
    (3, 1000),
    (17, 1024),
    (5, 1032),
    (3, 1037),
    (2, 8192),
    (2, 9000),
    (1, 16_392),
];

/// Weights around 1, as trained models have them.
fn weights(d: usize) -> Vec<f32> {
    random(9, d).iter().map(|w| 1.0 + 0.3 * w).collect()
}

fn inverse_rms(x: &[f64]) -> f64 {
    let mean_square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    1.0 / (mean_square + f64::from(EPS)).sqrt()
}

fn normalized(x: &[bf16], d: usize) -> Vec<f64> {
    let weights = exact(&weights(d));
    let norm_of_row = |x: &[f64]| {
        let scale = inverse_rms(x);
        let y = |(x, w): (&f64, &f64)| w * x * scale;
        x.iter().zip(&weights).map(y).collect::<Vec<f64>>()
    };
    exact(x).chunks_exact(d).flat_map(norm_of_row).collect()
}

/// The gradient, added to `dx`.
fn with_gradient(dx: &[bf16], dy: &[bf16], x: &[bf16], d: usize) -> Vec<f64> {
    let (mut dx, dy, x) = (exact(dx), exact(dy), exact(x));
    let weights = exact(&weights(d));
    let rows = dx
        .chunks_exact_mut(d)
        .zip(dy.chunks_exact(d))
        .zip(x.chunks_exact(d));
    for ((dx, dy), x) in rows {
        let scale = inverse_rms(x);
        let g: Vec<f64> = dy.iter().zip(&weights).map(|(dy, w)| dy * w).collect();
        let mean = g.iter().zip(x).map(|(g, x)| g * x).sum::<f64>() / d as f64;
        for i in 0..d {
            dx[i] += scale * (g[i] - x[i] * scale * scale * mean);
        }
    }
    dx
}

/// Launches a kernel with its buffers before and after the sizes that all of them take.
fn launch(
    device: &DeviceUnderTest,
    kernel: &str,
    inputs: &[&Buffer],
    (rows, d): (usize, usize),
    options: &[u32],
    outputs: &[&Buffer],
) {
    let blocks = if d <= 1024 { rows.div_ceil(8) } else { rows };
    let mut args: Vec<Arg> = inputs.iter().map(|&buffer| Arg::Buffer(buffer)).collect();
    args.extend([Arg::U32(rows as u32), Arg::U32(d as u32), Arg::F32(EPS)]);
    args.extend(options.iter().map(|&option| Arg::U32(option)));
    args.extend(outputs.iter().map(|&buffer| Arg::Buffer(buffer)));
    device.launch(kernel, [blocks as u32, 1, 1], 0, &args);
}

kernel_test!(forward_divides_each_row_by_its_rms, |device| {
    for (rows, d) in SIZES {
        let x = random_bf16(1, rows * d);
        let expected = normalized(&x, d);
        let (x, weight) = (device.upload(&x), device.upload(&weights(d)));
        let y = device.poisoned::<bf16>(rows * d);
        launch(
            device,
            "rms_norm_forward_bf16",
            &[&x, &weight],
            (rows, d),
            &[],
            &[&y],
        );
        let got = device.download::<bf16>(&y);
        assert_kernel_close("y", &got, &expected, &round(&expected));
    }
});

kernel_test!(a_row_of_zeros_stays_zero, |device| {
    let (x, weight) = (
        device.upload(&[bf16::ZERO; 64]),
        device.upload(&weights(64)),
    );
    let y = device.poisoned::<bf16>(64);
    launch(
        device,
        "rms_norm_forward_bf16",
        &[&x, &weight],
        (1, 64),
        &[],
        &[&y],
    );
    assert_eq!(device.download::<bf16>(&y), [bf16::ZERO; 64]);
});

kernel_test!(
    the_sum_with_the_branch_is_normalized_as_it_is_stored,
    |device| {
        for (rows, d) in SIZES {
            let (x, branch) = (random_bf16(1, rows * d), random_bf16(2, rows * d));
            let add = |(x, branch): (&bf16, &bf16)| bf16::from_f32(x.to_f32() + branch.to_f32());
            let sum: Vec<bf16> = x.iter().zip(&branch).map(add).collect();
            let expected = normalized(&sum, d);
            let (x, weight) = (device.upload(&x), device.upload(&weights(d)));
            for in_place in [false, true] {
                let branch = device.upload(&branch);
                let apart = device.poisoned::<bf16>(rows * d);
                let sum_out = if in_place { &branch } else { &apart };
                let y = device.poisoned::<bf16>(rows * d);
                let inputs = [&x, &branch, &weight];
                launch(
                    device,
                    "rms_norm_forward_residual_bf16",
                    &inputs,
                    (rows, d),
                    &[],
                    &[sum_out, &y],
                );
                assert_eq!(device.download::<bf16>(sum_out), sum, "{rows} rows of {d}");
                let got = device.download::<bf16>(&y);
                assert_kernel_close("y", &got, &expected, &round(&expected));
            }
        }
    }
);

kernel_test!(backward_adds_the_gradient_to_dx, |device| {
    for (rows, d) in SIZES {
        let [dy, x, dx] = [1, 2, 3].map(|stream| random_bf16(stream, rows * d));
        let expected = with_gradient(&dx, &dy, &x, d);
        let [dy, x, dx] = [dy, x, dx].map(|values| device.upload(&values));
        let weight = device.upload(&weights(d));
        launch(
            device,
            "rms_norm_backward_bf16",
            &[&dy, &x, &weight],
            (rows, d),
            &[1],
            &[&dx],
        );
        let got = device.download::<bf16>(&dx);
        assert_kernel_close("dx", &got, &expected, &round(&expected));
    }
});

kernel_test!(
    backward_gives_the_gradient_alone_whatever_lies_in_dx,
    |device| {
        for (rows, d) in SIZES {
            let [dy, x] = [1, 2].map(|stream| random_bf16(stream, rows * d));
            let expected = with_gradient(&vec![bf16::ZERO; rows * d], &dy, &x, d);
            let [dy, x] = [dy, x].map(|values| device.upload(&values));
            let weight = device.upload(&weights(d));
            let dx = device.poisoned::<bf16>(rows * d);
            launch(
                device,
                "rms_norm_backward_bf16",
                &[&dy, &x, &weight],
                (rows, d),
                &[0],
                &[&dx],
            );
            let got = device.download::<bf16>(&dx);
            assert_kernel_close("dx", &got, &expected, &round(&expected));
        }
    }
);
