//! The kernels of `cuda/linear_cross_entropy.cu` against the formulas in f64.

use half::bf16;

use crate::device_under_test::{Arg, Buffer, DeviceUnderTest, assert_kernel_close};
use crate::kernel_test;
use crate::random_values::random;

/// (rows, words): fewer words than threads, rows that 16-byte accesses can and cannot take, one and several tiles of 8192.
const SIZES: [(usize, usize); 8] = [
    (3, 1),
    (42, 5),
    (16, 1000),
    (9, 1001),
    (2, 8192),
    (2, 8196),
    (2, 16_391),
    (1, 20_000),
];

const D_LOSS: f32 = 1.0 / 37.0;

/// None, and one that most logits feel.
const SOFT_CAPS: [f32; 2] = [0.0, 3.0];

/// A logit under the cap, and the slope of the cap there.
fn capped(z: f64, cap: f64) -> (f64, f64) {
    match cap == 0.0 {
        true => (z, 1.0),
        false => (cap * (z / cap).tanh(), 1.0 - (z / cap).tanh().powi(2)),
    }
}

fn cases() -> impl Iterator<Item = ((usize, usize), f32)> {
    let of_size = |size| SOFT_CAPS.map(move |soft_cap| (size, soft_cap));
    SIZES.into_iter().flat_map(of_size)
}

fn logits(rows: usize, vocab: usize) -> Vec<f32> {
    random(1, rows * vocab).iter().map(|z| 4.0 * z).collect()
}

fn labels(rows: usize, vocab: usize) -> Vec<u32> {
    (0..rows).map(|row| (row * 977 % vocab) as u32).collect()
}

/// Results in f64, and with the kernel's formats from the first word to the last.
struct Values<L> {
    exact: Vec<f64>,
    low_precision: Vec<L>,
}

impl<L> Values<L> {
    fn new() -> Self {
        Self {
            exact: Vec::new(),
            low_precision: Vec::new(),
        }
    }

    fn push(&mut self, exact: f64, low_precision: L) {
        self.exact.push(exact);
        self.low_precision.push(low_precision);
    }
}

struct Expected {
    loss: Values<f32>,
    confidence: Values<f32>,
    dz: Values<bf16>,
    prediction: Vec<u32>,
}

fn expected(logits: &[f32], labels: &[u32], vocab: usize, soft_cap: f32) -> Expected {
    let mut expected = Expected {
        loss: Values::new(),
        confidence: Values::new(),
        dz: Values::new(),
        prediction: Vec::new(),
    };
    for (z, &label) in logits.chunks_exact(vocab).zip(labels) {
        let label = label as usize;
        let exact = z.iter().map(|&z| capped(z.into(), soft_cap.into()));
        let (exact, exact_slopes): (Vec<f64>, Vec<f64>) = exact.unzip();
        let z: Vec<f32> = match soft_cap == 0.0 {
            true => z.to_vec(),
            false => z.iter().map(|z| soft_cap * (z / soft_cap).tanh()).collect(),
        };
        let largest = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let prediction = z.iter().position(|&z| z == largest).unwrap();
        expected.prediction.push(prediction as u32);

        let term = |z: f32| (z - largest).exp();
        let exact_largest = exact.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let exact_term = |z: f64| (z - exact_largest).exp();
        let sum: f32 = z.iter().copied().map(term).sum();
        let exact_sum: f64 = exact.iter().copied().map(exact_term).sum();
        let loss = largest + sum.ln() - z[label];
        let exact_loss = exact_largest + exact_sum.ln() - exact[label];
        expected.loss.push(exact_loss, loss);
        expected.confidence.push(1.0 / exact_sum, 1.0 / sum);
        for (word, &z) in z.iter().enumerate() {
            let onehot = if word == label { 1.0 } else { 0.0 };
            let exact_dz =
                f64::from(D_LOSS) * (exact_term(exact[word]) / exact_sum - f64::from(onehot));
            let slope = match soft_cap == 0.0 {
                true => 1.0,
                false => 1.0 - (z / soft_cap).powi(2),
            };
            let exact_dz = exact_dz * exact_slopes[word];
            let dz = D_LOSS * (term(z) / sum - onehot) * slope;
            expected.dz.push(exact_dz, bf16::from_f32(dz));
        }
    }
    expected
}

/// What both kernels make of each row.
struct Outputs {
    loss: Buffer,
    confidence: Buffer,
    prediction: Buffer,
}

impl Outputs {
    fn new(device: &DeviceUnderTest, rows: usize) -> Self {
        Self {
            loss: device.poisoned::<f32>(rows),
            confidence: device.poisoned::<f32>(rows),
            prediction: device.poisoned::<u32>(rows),
        }
    }

    fn check(&self, device: &DeviceUnderTest, expected: &Expected) {
        let check = |name,
                     buffer,
                     Values {
                         exact,
                         low_precision,
                     }: &Values<f32>| {
            assert_kernel_close(name, &device.download::<f32>(buffer), exact, low_precision);
        };
        check("loss", &self.loss, &expected.loss);
        check("confidence", &self.confidence, &expected.confidence);
        let prediction = device.download::<u32>(&self.prediction);
        assert_eq!(prediction, expected.prediction);
    }
}

fn forward(device: &DeviceUnderTest, logits: &[f32], labels: &[u32], soft_cap: f32) -> Outputs {
    let rows = labels.len();
    let outputs = Outputs::new(device, rows);
    let vocab = logits.len() / rows;
    let (logits, labels) = (device.upload(logits), device.upload(labels));
    device.launch(
        "linear_cross_entropy_forward_f32",
        [rows as u32, 1, 1],
        0,
        &[
            Arg::Buffer(&logits),
            Arg::Buffer(&labels),
            Arg::U32(rows as u32),
            Arg::U32(vocab as u32),
            Arg::F32(soft_cap),
            Arg::Buffer(&outputs.loss),
            Arg::Buffer(&outputs.confidence),
            Arg::Buffer(&outputs.prediction),
        ],
    );
    outputs
}

/// The outputs, and the bf16 at the start of each row's memory.
fn backward(
    device: &DeviceUnderTest,
    logits: &[f32],
    labels: &[u32],
    soft_cap: f32,
) -> (Outputs, Vec<bf16>) {
    let rows = labels.len();
    let outputs = Outputs::new(device, rows);
    let vocab = logits.len() / rows;
    let (logits, labels) = (device.upload(logits), device.upload(labels));
    device.launch(
        "linear_cross_entropy_backward_f32",
        [rows as u32, 1, 1],
        0,
        &[
            Arg::Buffer(&logits),
            Arg::Buffer(&labels),
            Arg::U32(rows as u32),
            Arg::U32(vocab as u32),
            Arg::F32(soft_cap),
            Arg::F32(D_LOSS),
            Arg::Buffer(&outputs.loss),
            Arg::Buffer(&outputs.confidence),
            Arg::Buffer(&outputs.prediction),
        ],
    );
    let memory = device.download::<bf16>(&logits);
    let dz = memory.chunks_exact(2 * vocab).flat_map(|row| &row[..vocab]);
    (outputs, dz.copied().collect())
}

kernel_test!(forward_is_the_loss_of_each_row, |device| {
    for ((rows, vocab), soft_cap) in cases() {
        let (logits, labels) = (logits(rows, vocab), labels(rows, vocab));
        let outputs = forward(device, &logits, &labels, soft_cap);
        outputs.check(device, &expected(&logits, &labels, vocab, soft_cap));
    }
});

kernel_test!(
    backward_leaves_the_gradient_in_the_place_of_the_logits,
    |device| {
        for ((rows, vocab), soft_cap) in cases() {
            let (logits, labels) = (logits(rows, vocab), labels(rows, vocab));
            let (outputs, dz) = backward(device, &logits, &labels, soft_cap);
            let expected = expected(&logits, &labels, vocab, soft_cap);
            outputs.check(device, &expected);
            let Values {
                exact,
                low_precision,
            } = &expected.dz;
            let ones = vec![1.0; exact.len()];
            let relative = |dz: &[bf16]| -> Vec<f64> {
                let ratio = |(dz, &exact): (&bf16, &f64)| {
                    if exact == 0.0 {
                        1.0 + dz.to_f64()
                    } else {
                        dz.to_f64() / exact
                    }
                };
                dz.iter().zip(exact).map(ratio).collect()
            };
            // Most are tiny beside that of the label.
            assert_kernel_close("dz", &relative(&dz), &ones, &relative(low_precision));
        }
    }
);

kernel_test!(the_lowest_of_equal_words_is_predicted, |device| {
    for vocab in [5, 1000, 9001] {
        let mut logits = vec![0f32; 2 * vocab];
        // All equal in the first row, and in the second two equals that different threads meet, the later one first.
        (logits[vocab + vocab / 2], logits[2 * vocab - 1]) = (3.0, 3.0);
        let outputs = forward(device, &logits, &[0, 1], 0.0);
        let prediction = device.download::<u32>(&outputs.prediction);
        assert_eq!(prediction, [0, vocab as u32 / 2], "{vocab} words");
    }
});

kernel_test!(words_without_a_chance_have_no_part, |device| {
    let vocab = 2000;
    let mut logits = vec![f32::NEG_INFINITY; vocab];
    (logits[7], logits[1500]) = (-1e30, -1e30);
    let (outputs, dz) = backward(device, &logits, &[7], 0.0);
    let loss = device.download::<f32>(&outputs.loss)[0];
    assert!((f64::from(loss) - 2f64.ln()).abs() < 1e-6, "{loss}");
    let half = bf16::from_f32(D_LOSS / 2.0);
    for (word, dz) in dz.into_iter().enumerate() {
        let expected = match word {
            7 => -half,
            1500 => half,
            _ => bf16::ZERO,
        };
        assert_eq!(dz, expected, "word {word}");
    }
});

kernel_test!(logits_are_capped_in_place, |device| {
    let logits = logits(1, 1001);
    let buffer = device.upload(&logits);
    device.launch(
        "linear_cross_entropy_soft_cap_f32",
        [2, 1, 1],
        0,
        &[
            Arg::Buffer(&buffer),
            Arg::U64(logits.len() as u64),
            Arg::F32(3.0),
        ],
    );
    let exact: Vec<f64> = logits.iter().map(|&z| capped(z.into(), 3.0).0).collect();
    let in_f32: Vec<f32> = logits.iter().map(|z| 3.0 * (z / 3.0).tanh()).collect();
    assert_kernel_close("z", &device.download::<f32>(&buffer), &exact, &in_f32);
});
