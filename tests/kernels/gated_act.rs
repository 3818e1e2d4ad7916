//! The kernels of `cuda/gated_act.cu` against the formulas in f64.

use half::bf16;

use crate::device_under_test::{Arg, assert_kernel_close};
use crate::kernel_test;
use crate::random_values::{exact, random_bf16, round};

/// One element, short of a vector of eight, a tail, and more than one block takes at once.
const SIZES: [usize; 5] = [1, 7, 42, 2053, 5000];

fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

/// Gates from -12 to 12, where the sigmoid goes all its way.
fn gates(n: usize) -> Vec<bf16> {
    let wide = |z: bf16| bf16::from_f32(4.0 * z.to_f32());
    random_bf16(1, n).into_iter().map(wide).collect()
}

kernel_test!(forward_is_silu_of_the_gate_times_up, |device| {
    for n in SIZES {
        let (gate, up) = (gates(n), random_bf16(2, n));
        let y: Vec<f64> = exact(&gate)
            .into_iter()
            .zip(exact(&up))
            .map(|(gate, up)| gate * sigmoid(gate) * up)
            .collect();
        let (gate, up) = (device.upload(&gate), device.upload(&up));
        let out = device.poisoned::<bf16>(n);
        device.launch(
            "gated_act_forward_bf16",
            [2, 1, 1],
            0,
            &[
                Arg::Buffer(&gate),
                Arg::Buffer(&up),
                Arg::U64(n as u64),
                Arg::Buffer(&out),
            ],
        );
        assert_kernel_close("y", &device.download::<bf16>(&out), &y, &round(&y));
    }
});

kernel_test!(backward_replaces_gate_and_up_by_their_gradients, |device| {
    for n in SIZES {
        let (dy, gate, up) = (random_bf16(3, n), gates(n), random_bf16(2, n));
        let gradients = exact(&dy).into_iter().zip(exact(&gate)).zip(exact(&up));
        let (d_gate, d_up): (Vec<f64>, Vec<f64>) = gradients
            .map(|((dy, gate), up)| {
                let s = sigmoid(gate);
                (dy * up * s * (1.0 + gate * (1.0 - s)), dy * gate * s)
            })
            .unzip();
        let (dy, gate, up) = (device.upload(&dy), device.upload(&gate), device.upload(&up));
        device.launch(
            "gated_act_backward_bf16",
            [2, 1, 1],
            0,
            &[
                Arg::Buffer(&dy),
                Arg::Buffer(&gate),
                Arg::Buffer(&up),
                Arg::U64(n as u64),
            ],
        );
        let got = [&gate, &up].map(|buffer| device.download::<bf16>(buffer));
        assert_kernel_close("d_gate", &got[0], &d_gate, &round(&d_gate));
        assert_kernel_close("d_up", &got[1], &d_up, &round(&d_up));
    }
});

kernel_test!(a_saturated_gate_passes_or_stops, |device| {
    let gate = [-3e38, -1e4, -90.0, 90.0, 1e4, 3e38].map(bf16::from_f32);
    let up = [bf16::ONE; 6];
    let expected = gate.map(|gate| if gate > bf16::ZERO { gate } else { -bf16::ZERO });
    let (gate, up) = (device.upload(&gate), device.upload(&up));
    let out = device.poisoned::<bf16>(6);
    device.launch(
        "gated_act_forward_bf16",
        [1, 1, 1],
        0,
        &[
            Arg::Buffer(&gate),
            Arg::Buffer(&up),
            Arg::U64(6),
            Arg::Buffer(&out),
        ],
    );
    let got = device.download::<bf16>(&out);
    for (got, expected) in got.iter().zip(expected) {
        let error = (got.to_f32() - expected.to_f32()).abs();
        assert!(error < 1e-30, "{got} for {expected}");
    }
});
