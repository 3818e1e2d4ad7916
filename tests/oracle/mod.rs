//! What tests of gradients share: random tensors, candle's autograd as the oracle, finite differences, tolerances.

#![allow(dead_code)]

use candle_core::{DType, Device, Tensor, Var};
use qlora::ops::attention::Segment;
use qlora::ops::philox::Uniform;

/// Random numbers for one test, given by its name.
pub struct Random(Uniform);

impl Random {
    pub fn new(test: &str) -> Self {
        let seed = test.bytes().fold(0u64, |seed, byte| {
            seed.wrapping_mul(31).wrapping_add(u64::from(byte))
        });
        Self(Uniform::new(seed, [0, 0]))
    }

    /// Uniform in [-1, 1), f64 values that f32 holds exactly.
    pub fn tensor(&mut self, shape: &[usize]) -> Tensor {
        let n: usize = shape.iter().product();
        let values: Vec<f64> = (0..n)
            .map(|_| f64::from(2.0 * self.0.next_f32() - 1.0))
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }
}

pub fn f32(t: &Tensor) -> Tensor {
    t.to_dtype(DType::F32).unwrap()
}

pub fn f64s(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    f64s(a).iter().zip(f64s(b)).map(|(a, b)| a * b).sum()
}

/// The output of `f` in f64 and the gradients of `sum(cotangent * output)` for each input, by autograd.
///
/// Checks the gradients against central differences along random directions first, so that the oracle itself is proven.
pub fn oracle(
    random: &mut Random,
    inputs: &[Tensor],
    cotangent: &Tensor,
    f: impl Fn(&[Tensor]) -> Tensor,
) -> (Tensor, Vec<Tensor>) {
    let vars: Vec<Var> = inputs
        .iter()
        .map(|t| Var::from_tensor(t).unwrap())
        .collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let output = f(&tensors);
    let grads = (&output * cotangent)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    let grads: Vec<Tensor> = vars
        .iter()
        .map(|v| grads.get(v).expect("every input gets a gradient").clone())
        .collect();
    const STEP: f64 = 1e-5;
    for (i, grad) in grads.iter().enumerate() {
        for _ in 0..3 {
            let direction = random.tensor(inputs[i].dims());
            let along = |step: f64| {
                let mut moved = inputs.to_vec();
                moved[i] = (&inputs[i] + (&direction * step).unwrap()).unwrap();
                dot(&f(&moved), cotangent)
            };
            let difference = (along(STEP) - along(-STEP)) / (2.0 * STEP);
            let derivative = dot(grad, &direction);
            let scale = (dot(grad, grad) * dot(&direction, &direction)).sqrt();
            assert!(
                (difference - derivative).abs() <= 1e-7 * scale + 1e-9,
                "input {i}: finite difference {difference}, autograd {derivative}"
            );
        }
    }
    (output.detach(), grads)
}

/// Sequences of these lengths, one after another.
pub fn segments(lengths: &[usize]) -> Vec<Segment> {
    let ends = lengths.iter().scan(0, |end, len| {
        *end += len;
        Some(*end)
    });
    let segment = |(end, len): (usize, &usize)| Segment {
        queries: end - len..end,
        keys: end - len..end,
    };
    ends.zip(lengths).map(segment).collect()
}

/// Asserts that `got` is `want` within `tolerance` times the root mean square of `want`.
#[track_caller]
pub fn assert_close(name: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert!(
        tolerance <= 0.25,
        "{name}: a bound this loose proves nothing"
    );
    assert_eq!(
        got.elem_count(),
        want.elem_count(),
        "{name}: shape {:?} against {:?}",
        got.dims(),
        want.dims()
    );
    let (got, want) = (f64s(got), f64s(want));
    let rms = (want.iter().map(|w| w * w).sum::<f64>() / want.len() as f64).sqrt();
    assert!(rms > 0.0, "{name}: the reference is all zero");
    let worst = got
        .iter()
        .zip(&want)
        .map(|(g, w)| (g - w).abs())
        .fold(0.0, |a: f64, b| if b > a || b.is_nan() { b } else { a });
    assert!(
        worst <= tolerance * rms,
        "{name}: off by {worst:e}, {:e} of the RMS {rms:e}",
        worst / rms
    );
}
