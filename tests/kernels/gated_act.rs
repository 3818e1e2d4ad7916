//! The kernels of `cuda/gated_act.cu` against the formulas in f64.

use half::bf16;

use crate::device_under_test::{Arg, assert_kernel_close};
use crate::kernel_test;
use crate::random_values::{exact, random_bf16, round};

/// One element, short of a vector of eight, a tail, and more than one block takes at once.
const SIZES: [usize; 5] = [1, 7, 42, 2053, 5000];

/// A kernel's name, `u(z)` and `u'(z)` of its activation.
type Activation = (&'static str, fn(f64) -> f64, fn(f64) -> f64);

const ACTIVATIONS: [Activation; 2] = [
    ("gated_act", |z| z, |_| 1.0),
    (
        "gated_gelu",
        |z| gelu_scale() * (z + 0.044715 * z.powi(3)),
        |z| gelu_scale() * (1.0 + 3.0 * 0.044715 * z.powi(2)),
    ),
];

fn gelu_scale() -> f64 {
    2.0 * (2.0 / std::f64::consts::PI).sqrt()
}

fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

fn cases() -> impl Iterator<Item = (Activation, usize)> {
    ACTIVATIONS
        .into_iter()
        .flat_map(|activation| SIZES.map(|n| (activation, n)))
}

/// Gates from -12 to 12, where the sigmoid goes all its way.
fn gates(n: usize) -> Vec<bf16> {
    let wide = |z: bf16| bf16::from_f32(4.0 * z.to_f32());
    random_bf16(1, n).into_iter().map(wide).collect()
}

kernel_test!(forward_is_the_activation_of_the_gate_times_up, |device| {
    for ((name, u, _), n) in cases() {
        let (gate, up) = (gates(n), random_bf16(2, n));
        let y: Vec<f64> = exact(&gate)
            .into_iter()
            .zip(exact(&up))
            .map(|(gate, up)| gate * sigmoid(u(gate)) * up)
            .collect();
        let (gate, up) = (device.upload(&gate), device.upload(&up));
        let out = device.poisoned::<bf16>(n);
        device.launch(
            &format!("{name}_forward_bf16"),
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
    for ((name, u, slope), n) in cases() {
        let (dy, gate, up) = (random_bf16(3, n), gates(n), random_bf16(2, n));
        let gradients = exact(&dy).into_iter().zip(exact(&gate)).zip(exact(&up));
        let (d_gate, d_up): (Vec<f64>, Vec<f64>) = gradients
            .map(|((dy, gate), up)| {
                let s = sigmoid(u(gate));
                let d_gate = dy * up * s * (1.0 + gate * slope(gate) * (1.0 - s));
                (d_gate, dy * gate * s)
            })
            .unzip();
        let (dy, gate, up) = (device.upload(&dy), device.upload(&gate), device.upload(&up));
        device.launch(
            &format!("{name}_backward_bf16"),
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
    let gates = [-3e38, -1e4, -90.0, 90.0, 1e4, 3e38].map(bf16::from_f32);
    for (name, _, _) in ACTIVATIONS {
        let passes = |gate: bf16| gate > bf16::ZERO;
        let y = gates.map(|gate| if passes(gate) { gate } else { bf16::ZERO });
        let d_gate = gates.map(|gate| if passes(gate) { bf16::ONE } else { bf16::ZERO });
        let one = [bf16::ONE; 6];
        let (gate, up, dy) = (
            device.upload(&gates),
            device.upload(&one),
            device.upload(&one),
        );
        let out = device.poisoned::<bf16>(6);
        let n = Arg::U64(6);
        let (forward, backward) = (
            [Arg::Buffer(&gate), Arg::Buffer(&up), n, Arg::Buffer(&out)],
            [Arg::Buffer(&dy), Arg::Buffer(&gate), Arg::Buffer(&up), n],
        );
        device.launch(&format!("{name}_forward_bf16"), [1, 1, 1], 0, &forward);
        device.launch(&format!("{name}_backward_bf16"), [1, 1, 1], 0, &backward);
        for (what, found, expected) in [("y", &out, y), ("d_gate", &gate, d_gate), ("d_up", &up, y)]
        {
            for (found, expected) in device.download::<bf16>(found).iter().zip(expected) {
                let error = (found.to_f32() - expected.to_f32()).abs();
                assert!(error < 1e-30, "{name} {what}: {found} for {expected}");
            }
        }
    }
});
